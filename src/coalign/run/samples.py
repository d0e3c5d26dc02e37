"""Which samples of a source a task takes, their captions and their classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coalign.data.splits import assign_splits
from coalign.errors import BadSample, NoCaption, UserError
from coalign.evaluation.prompts import read_classes
from coalign.run.model import Run
from coalign.types import Source

LABEL_FACTS = ("label", "class", "category", "folder")  # looked for in this order


@dataclass
class Labels:
    """Classes, and which samples belong to them."""

    classnames: list[str]
    of_index: dict[int, int]  # sample index -> class
    unlabelled: int  # samples that are of none of the classes


def select_split(source: Source, data: str, run: Run | None, split: str | None) -> tuple[str, np.ndarray]:
    """The name and the sample indices of the split to evaluate (see `run.evaluate`)."""
    everything = np.arange(len(source))
    if split == "all":
        return "all", everything
    own: dict[str, np.ndarray] | None = getattr(source, "splits", None)
    trained_on = run is not None and _same_data(run.data, data)
    if trained_on and split in (None, "train", "val") and run is not None and run.config.val_data is None:
        splits = assign_splits(source, run.config.val_fraction, by=run.config.val_by)[0]
        return split or "val", splits[split or "val"]
    if split is None:
        split = next((name for name in ("test", "val") if own and len(own.get(name, ()))), None)
        return (split, own[split]) if own and split else ("all", everything)
    if not own or split not in own:
        known = ", ".join([*(own or {}), "all"])
        raise UserError(f"{data} has no split named {split!r}; there is {known}.")
    return split, own[split]


def _same_data(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def captions_of(source: Source) -> Callable[[int], Sequence[str]]:
    """The captions of a sample; none where its record is bad, which the image batches list."""

    def captions(index: int) -> Sequence[str]:
        try:
            return source.record(index).captions
        except BadSample:
            return ()

    return captions


def tags_of(source: Source, index: int) -> Sequence[str]:
    """The tags of a sample; none where its record is bad."""
    try:
        return source.record(index).tags
    except NoCaption as bad:
        return bad.record.tags
    except BadSample:
        return ()


def label_function(
    source: Source, indices: np.ndarray, classes: Path | None = None, label: str | None = None
) -> Labels:
    """The class of every sample that has one: by the fact `label`, or by the classes file, whose labels are looked for among the sample's
    label fact and its tags (the first class that fits)."""
    values: dict[int, list[str]] = {}
    facts = (label,) if label else LABEL_FACTS
    for index in indices.tolist():
        try:
            record = source.record(index)
        except NoCaption as bad:
            record = bad.record
        except BadSample:
            values[index] = []
            continue
        fact = next((str(record.facts[name]) for name in facts if record.facts.get(name) not in (None, "")), None)
        values[index] = ([fact] if fact is not None else []) + (list(record.tags) if classes else [])
    if classes:
        entries = read_classes(classes)
        names, number = [entry.name for entry in entries], {entry.label: i for i, entry in enumerate(entries)}
    else:
        found = sorted({value for listed in values.values() for value in listed})
        names, number = [value.replace("_", " ") for value in found], {value: i for i, value in enumerate(found)}
    of_index = {
        index: next(number[value] for value in listed if value in number)
        for index, listed in values.items()
        if set(listed) & set(number)
    }
    if not of_index:
        looked = f"labels are looked for in the samples' {' or '.join(facts)}"
        found = sorted({value for listed in values.values() for value in listed})[:5]
        if classes:
            there = f"there are {', '.join(map(repr, found))}, for example" if found else "there are none"
            raise UserError(f"No sample of {source.name} is of a class in {classes}; {looked} and tags, and {there}.")
        raise UserError(f"No sample of {source.name} belongs to a class; {looked}: name the right one with --label.")
    return Labels(names, of_index, len(indices) - len(of_index))
