"""Groups the curves of a run's log into panels. Only the trainer's keys are known by name; a method's are grouped by prefix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Series = tuple[np.ndarray, np.ndarray]  # steps, values
_TRAINER = {"step", "epoch", "samples", "seconds", "bad_samples", "pairs_per_second", "data_wait", "lr", "grad_norm"}


@dataclass
class Panel:
    title: str
    series: dict[str, Series]
    small: bool = False
    percent: bool = False


def panels(rows: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """The panels of all keys in metrics.jsonl: large ones for loss, recalls, learning rate and gradient norm; small ones for every loss
    term (their scales differ), every scalar of the method, and the throughput."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    terms = [key for key in keys if key.startswith("loss/")]
    recalls = [key for key in keys if key.startswith("val/") and not key.endswith(("loss", "rank"))]
    losses = {"training loss": "loss", "held-out loss": "val/loss"}
    scalars = [key for key in keys if key not in _TRAINER and key not in {*losses.values(), *terms, *recalls}]
    found = [
        _panel(rows, "Loss", losses),
        _panel(rows, "Recall and accuracy", {_words(key): key for key in recalls}, percent=True),
        _panel(rows, "Learning rate", {"Learning rate": "lr"}),
        _panel(rows, "Gradient norm", {"Gradient norm": "grad_norm"}),
    ]
    found += [_panel(rows, title, {title: key}, small=True) for key in terms if (title := f"Term: {_words(key)}")]
    for stem, members in families(scalars).items():
        title = _capital(stem.replace("/", " ").replace("_", " "))
        labels = {title if len(members) == 1 else _rest(key, stem): key for key in members}
        found.append(_panel(rows, title, labels, small=True))
    found.append(_panel(rows, "Pairs per second", {"Pairs per second": "pairs_per_second"}, small=True))
    found.append(
        _panel(rows, "Time waiting for data", {"Time waiting for data": "data_wait"}, small=True, percent=True)
    )
    return found


def families(keys: Sequence[str]) -> dict[str, list[str]]:
    """Groups keys of one quantity by their common prefix: keys in a scope ("scale/image"), and keys whose prefix is itself a key ("scale",
    "scale_text_text") or is shared by three or more. Other keys form groups of one."""
    left = list(keys)
    found: dict[str, list[str]] = {}
    parts = {key: key.replace("/", "_").split("_") for key in keys}
    stems = {key[: key.rindex("/")] for key in keys if "/" in key}
    stems |= {"_".join(key.split("_")[:n]) for key in keys if "/" not in key for n in range(1, len(parts[key]) + 1)}
    for stem in sorted(stems, key=lambda stem: (-len(stem.split("_")), stem)):  # the longest first
        members = [key for key in left if key == stem or key.startswith((f"{stem}_", f"{stem}/"))]
        scoped = all(key.startswith(f"{stem}/") for key in members)
        if len(members) > 1 and (scoped or stem in members or len(members) > 2):
            found[stem] = members
            left = [key for key in left if key not in members]
    for key in left:
        found[key] = [key]
    return dict(sorted(found.items(), key=lambda item: keys.index(item[1][0])))


def _panel(
    rows: Sequence[Mapping[str, Any]], title: str, keys: Mapping[str, str], small: bool = False, percent: bool = False
) -> Panel:
    series = {label: _series(rows, key) for label, key in keys.items()}
    return Panel(title, {label: one for label, one in series.items() if len(one[0])}, small, percent)


def _series(rows: Sequence[Mapping[str, Any]], key: str) -> Series:
    pairs = [
        (row["step"], row[key])
        for row in rows
        if isinstance(row.get(key), (int, float)) and math.isfinite(row[key]) and row.get("step") is not None
    ]
    steps, values = zip(*pairs) if pairs else ((), ())
    return np.array(steps, dtype=float), np.array(values, dtype=float)


def _words(key: str) -> str:
    scope, _, name = key.rpartition("/")
    name = name.replace("_", " ")
    if scope != "val":
        return name
    return name.replace(" to ", " → ").replace(" r10", " R@10").replace(" r1", " R@1").replace(" r5", " R@5")


def _rest(key: str, stem: str) -> str:
    """The part of a key that follows its group's name."""
    return _words(key.removeprefix(stem).strip("_/")) or _words(key)


def _capital(words: str) -> str:
    return words[:1].upper() + words[1:]
