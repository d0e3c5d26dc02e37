"""What a source leaves out, by reason, and its classes, for the terminal and for reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from coalign.data.sources.base import Source

MAX_SHOWN = 4  # reasons and unread files in a line, and notes


def left_out(source: Source) -> Counter[str]:
    """Returns how many images, rows or archive members opening the source left out, by reason, the most frequent first."""
    counts: Counter[str] = Counter()
    for each in source.left_out:
        counts[each.reason] += each.count
    return Counter({reason: count for reason, count in counts.most_common() if count})


def notes(source: Source) -> list[str]:
    """Returns what opening the source found that costs no sample, each with the first place."""
    places: dict[str, str] = {}
    for each in source.left_out:
        if not each.count:
            places.setdefault(each.reason, each.where)
    return [reason + (f" ({where})" if where else "") for reason, where in places.items()]


def account_lines(source: Source, with_notes: bool = True) -> list[str]:
    """Returns lines on what opening the source found: what is left out, notes with an example each, and what lies unread."""
    counts = left_out(source)
    lines = []
    if counts:
        reasons = [f"{reason} ({count:,})" for reason, count in counts.items()]
        lines.append(f"Left out {counts.total():,} of {counts.total() + len(source):,}: {_shortened(reasons)}.")
    if with_notes:
        found = notes(source)
        lines += [f"Note: {note}." for note in found[:MAX_SHOWN]]
        if len(found) > MAX_SHOWN:
            lines.append(f"Notes that are not shown: {len(found) - MAX_SHOWN:,}.")
    if source.unread:
        lines.append(f"Not read, although it looks like data: {_shortened(list(source.unread))}.")
    return lines


def class_lines(source: Source, train: np.ndarray, val: np.ndarray) -> list[str]:
    """Returns a line on the classes if the captions are class labels, and a line each on what is not trained on or not evaluated.

    The latter are images without a class, and classes that are in only one of `train` and `val` (indices), as a class with one image is.
    """
    classes = source.classes
    if classes is None:
        return []
    found = "The captions are few for the images, and are taken as class labels" if classes.in_captions else "Classes"
    lines = [f"{found}: {_named(classes.names)}."]
    if not classes.in_captions and (unlabeled := int(np.count_nonzero(classes.of < 0))):
        lines.append(f"Images without a class, which are not used: {unlabeled:,}.")
    trained, held_out = (set(np.unique(classes.of[split % len(source)]).tolist()) - {-1} for split in (train, val))
    if held_out and (only := sorted(trained - held_out)):
        lines.append(
            f"Classes without held-out images, whose recall is not measured: {_named([classes.names[i] for i in only])}."
        )
    if only := sorted(held_out - trained):
        lines.append(
            f"Classes without training images, which the model does not learn: {_named([classes.names[i] for i in only])}."
        )
    return lines


def _named(names: Sequence[str]) -> str:
    return f"{len(names):,} ({', '.join(map(repr, names[:3]))}{' …' if len(names) > 3 else ''})"


def _shortened(parts: list[str]) -> str:
    more = len(parts) - MAX_SHOWN
    return ", ".join(parts[:MAX_SHOWN]) + (f" and {more:,} more" if more > 0 else "")
