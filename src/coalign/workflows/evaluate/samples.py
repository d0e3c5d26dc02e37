"""Selects the samples of a task, and reads their captions, tags and classes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coalign.data.sources.base import Source
from coalign.data.splits import assign_splits
from coalign.errors import BadSample, UserError
from coalign.evaluation.prompts import read_classes
from coalign.runs.run import Run

LABEL_FACTS = ("label", "class", "category", "folder")  # in order of precedence


@dataclass
class Labels:
    """The classes of a source's samples."""

    classnames: list[str]
    class_of: dict[int, int]  # sample index -> class
    unlabeled: int  # number of samples without a class


def select_split(source: Source, data: str, run: Run | None, split: str | None) -> tuple[str, np.ndarray]:
    """Returns the name and the sample indices of the split to evaluate; see `evaluate` for the default.

    Raises UserError if the split does not exist.
    """
    all_indices = np.arange(len(source))
    if split == "all":
        return "all", all_indices
    source_splits = source.splits
    trained_on = run is not None and _same_data(run.data, data)
    if trained_on and split in (None, "train", "val") and run is not None and run.config.val_data is None:
        splits = assign_splits(source, run.config.val_fraction, by=run.config.val_by)[0]
        return split or "val", splits[split or "val"]
    if split is None:
        split = next((name for name in ("test", "val") if source_splits and len(source_splits.get(name, ()))), None)
        return (split, source_splits[split]) if source_splits and split else ("all", all_indices)
    if not source_splits or split not in source_splits:
        known = ", ".join([*(source_splits or {}), "all"])
        raise UserError(f"{data} has no split named {split!r}; choose from {known}.")
    return split, source_splits[split]


def _same_data(one: str, other: str) -> bool:
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def captions_of(source: Source) -> Callable[[int], Sequence[str]]:
    """Returns a function of the sample index that returns its captions; a bad record has none, and is reported with the images."""

    def captions(index: int) -> Sequence[str]:
        try:
            return source.record(index).captions
        except BadSample:
            return ()

    return captions


def tags_of(source: Source, index: int) -> Sequence[str]:
    """Returns the tags of a sample; a bad record has none."""
    try:
        return source.record(index).tags
    except BadSample:
        return ()


def read_labels(source: Source, indices: np.ndarray, classes: Path | None = None, label: str | None = None) -> Labels:
    """Reads the class of every sample that has one, from the fact `label` (default: the first of LABEL_FACTS that it has).

    With a classes file, the label fact or else the first tag that is listed in the file gives the class. Raises UserError if no sample has
    a class.
    """
    values: dict[int, list[str]] = {}
    facts = (label,) if label else LABEL_FACTS
    for index in indices.tolist():
        try:
            record = source.record(index)
        except BadSample:
            values[index] = []
            continue
        fact = next((str(record.facts[name]) for name in facts if record.facts.get(name) not in (None, "")), None)
        values[index] = ([fact] if fact is not None else []) + (list(record.tags) if classes else [])
    if classes:
        entries = read_classes(classes)
        names, number = [entry.name for entry in entries], {entry.label: i for i, entry in enumerate(entries)}
    else:
        distinct = sorted({value for sample_values in values.values() for value in sample_values})
        names, number = [value.replace("_", " ") for value in distinct], {value: i for i, value in enumerate(distinct)}
    class_of = {
        index: next(number[value] for value in sample_values if value in number)
        for index, sample_values in values.items()
        if set(sample_values) & set(number)
    }
    if not class_of:
        fields = f"the samples' {' or '.join(facts)}"
        if classes:
            examples = sorted({value for sample_values in values.values() for value in sample_values})[:5]
            shown = f"there are values such as {', '.join(map(repr, examples))}" if examples else "they are empty"
            raise UserError(
                f"No sample of {source.name} has one of the classes in {classes}; they are matched with {fields} and tags: {shown}."
            )
        raise UserError(
            f"No sample of {source.name} has a class in {fields}; set --label to the column or fact that holds it."
        )
    return Labels(names, class_of, len(indices) - len(class_of))
