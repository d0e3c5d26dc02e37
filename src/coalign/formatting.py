"""Durations and percentages as text."""

from __future__ import annotations

from itertools import pairwise


def duration(seconds: float) -> str:
    """Formats seconds in the two largest units: "0.36 s", "45 s", "12 min 5 s", "3 h 20 min", "2 d 4 h"."""
    if 0 < seconds < 1:
        return f"{seconds:.2g} s"
    whole = round(seconds)
    for (unit, size), (smaller_unit, smaller) in pairwise((("d", 86400), ("h", 3600), ("min", 60), ("s", 1))):
        if whole >= size:
            return f"{whole // size:,} {unit} {whole % size // smaller} {smaller_unit}"
    return f"{whole} s"


def percent(fraction: float) -> str:
    """Formats a fraction as a percentage with one decimal, "38.1 %"; below 0.95 % with two significant digits, "0.21 %"."""
    shown = 100 * fraction
    return f"{shown:.1f} %" if abs(shown) >= 0.95 or shown == 0 else f"{shown:.2g} %"


def foil_kind(kind: str) -> str:
    """Formats a kind of foils. The stored kind "colour" keeps its spelling: it seeds generators."""
    return kind.replace("_", " ").replace("colour", "color")


def data_size(num_bytes: float) -> str:
    """Formats a number of bytes: 12,345,678 -> "12 MB"."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.{0 if num_bytes >= 9.95 or unit == 'bytes' else 1}f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"
