"""The lines of the benchmarks' table: scripts print their measurements with `line`, and `all.py` collects them."""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

LINES_FILE = "COALIGN_BENCHMARK_LINES"  # environment variable: path of the file that collects the lines


def line(
    name: str, ratios: Sequence[float], *, at_least: float | None = None, at_most: float | None = None, more: str = ""
) -> None:
    """Prints the median, the minimum and the maximum of `ratios` (one per run), whether the target is met, and the text `more`."""
    ordered = sorted(ratios)
    median = statistics.median(ordered)
    target = f"at least {at_least:g}" if at_least is not None else f"at most {at_most:g}" if at_most is not None else ""
    holds = None
    if target:
        holds = median >= at_least if at_least is not None else median <= (at_most or 0)
    spread = f"{ordered[0]:.3g} to {ordered[-1]:.3g} in {len(ordered)} runs" if len(ordered) > 1 else "1 run"
    details = [
        spread,
        *([f"target {target}: {'met' if holds else 'MISSED'}"] if target else []),
        *([more] if more else []),
    ]
    print(f"  {name}: RATIO {median:.3g} ({'; '.join(details)})", flush=True)
    if LINES_FILE in os.environ:
        values = {
            "script": Path(sys.argv[0]).name, "what": name, "median": median, "least": ordered[0], "most": ordered[-1],
            "measured": len(ordered), "target": target, "holds": holds, "more": more,
        }  # fmt: skip
        with open(os.environ[LINES_FILE], "a") as file:
            file.write(json.dumps(values) + "\n")
