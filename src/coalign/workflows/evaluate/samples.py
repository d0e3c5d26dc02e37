"""Selects the samples of a task, and reads their captions, tags and classes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import Source, Splits
from coalign.data.sources.open import check_columns, open_any
from coalign.data.splits import assign_splits, nested_subset, run_splits
from coalign.data.text.prompts import read_classes
from coalign.errors import BadSample, UserError
from coalign.runs.folder import SavedConfig, data_name
from coalign.runs.run import Run

Origin = Run | SavedConfig  # a run, or what an export knows of it
LABEL_FACTS = ("label", "class", "category", "folder")  # in order of precedence


@dataclass(frozen=True)
class Samples:
    """Samples of a source."""

    source: Source
    indices: np.ndarray  # int64


@dataclass(frozen=True)
class Labels:
    """Samples of a source with their classes; those without a class are left out and counted."""

    source: Source
    classnames: list[str]
    class_of: Mapping[int, int]  # sample index -> class
    unlabeled: int = 0  # number of samples without a class
    own_prompts: Mapping[str, Sequence[str]] = field(
        default_factory=dict
    )  # class name -> prompts, instead of templates

    def subset(self, indices: np.ndarray) -> Labels:
        kept = {i: self.class_of[i] for i in indices.tolist() if i in self.class_of}
        return replace(self, class_of=kept, unlabeled=0)

    def train_val_split(self) -> tuple[Labels, Labels]:
        """Splits the samples at random into four fifths and one fifth."""
        shuffled = np.random.default_rng(0).permutation(sorted(self.class_of))
        val, train = np.split(shuffled, [len(shuffled) // 5])
        return self.subset(train), self.subset(val)


def select_split(source: Source, data: str, run: Origin | None, split: str | None) -> tuple[str, np.ndarray]:
    """Returns the name and the sample indices of the split to evaluate; see `evaluate` for the default.

    Of data without splits, "val" are the samples that training on it would hold out by default, and "train" are the others.

    run: the run that the model is of or was exported from; of its training data, it gives the splits. Raises UserError if the split does
    not exist, or if there is no default, as the run held out nothing.
    """
    all_indices = np.arange(len(source))
    if split == "all":
        return "all", all_indices
    splits = source.splits
    if run is not None and is_trained_on(run, data) and _are_splits_of(run, own := run_splits(source, run.config)):
        splits = {name: indices for name, indices in own.items() if len(indices)}
        split = split or next((name for name in ("val", "test") if name in splits), None)
        if split is None:
            raise UserError(
                f"No pairs of {data} were held out of training; set --split train to evaluate training pairs."
            )
    if split is None:
        split = next((name for name in ("test", "val") if splits and len(splits.get(name, ()))), None)
        if split is None:
            return "all", all_indices
    splits = splits or (assign_splits(source)[0] if split in ("train", "val") else {})
    if not len(splits.get(split, ())):
        known = ", ".join([*(splits or ("train", "val")), "all"])
        raise UserError(f"{data} has no split named {split!r}; choose from {known}.")
    return split, splits[split].astype(np.int64)


def _are_splits_of(run: Origin, splits: Splits) -> bool:
    """Returns whether the splits have the sizes of the run's, as other data may have the name that an export knows its data by."""
    if not isinstance(run, SavedConfig):
        return True
    if run.config.val_data is None:
        return len(splits.get("val", ())) == run.num_val
    return len(nested_subset(splits.get("train", np.arange(0)), run.config.train_fraction)) == run.num_train


def is_trained_on(run: Origin, data: str) -> bool:
    """Returns whether a run was trained on the data. An export only knows the name of its data, not the folder."""
    return data_name(data) == run.data if isinstance(run, SavedConfig) else same_data(run.data, data)


def same_data(one: str, other: str) -> bool:
    """Returns whether two ways to name data, as given by the user, are of the same data."""
    return one == other or (Path(one).exists() and Path(other).exists() and Path(one).samefile(other))


def reading_of(data: str, run: Origin | None, given: DataConfig = DETECT) -> DataConfig:
    """Returns how to read `data`: as given; what is unset, as the run reads it if it was trained on it."""
    if run is None or not is_trained_on(run, data):
        return given
    changes = {name: value for name, value in vars(given).items() if value != getattr(DETECT, name)}
    return replace(run.config.reading, **changes)


def open_as_trained(data: str, run: Origin | None, given: DataConfig = DETECT) -> Source:
    """Opens data, read as `reading_of` returns. Raises UserError if an option on columns is given, but the data has none."""
    source = open_any(data, reading_of(data, run, given))
    check_columns([source], given)  # not the run's, which may be for its --val-data
    return source


def captions_of(source: Source) -> Callable[[int], Sequence[str]]:
    """Returns a function of the sample index that returns its captions; a bad record has none, and is reported with the images.

    Of captions that are made of a class name, it returns the first: the others differ only in their template.
    """
    number = None if source.classes is None or source.classes.in_captions else 1

    def captions(index: int) -> Sequence[str]:
        try:
            return source.record(index).captions[:number]
        except BadSample:
            return ()

    return captions


def tags_of(source: Source, index: int) -> Sequence[str]:
    """Returns the tags of a sample; a bad record has none."""
    try:
        return source.record(index).tags
    except BadSample:
        return ()


def read_labels(
    parts: Sequence[Samples], classes: Path | None = None, label: str | None = None, prompts: Sequence[str] = ()
) -> list[Labels]:
    """Reads the class of every sample that has one, from the fact `label` (default: the first of LABEL_FACTS that it has).

    With a classes file, the label fact or else the first tag that is listed in the file gives the class; otherwise the classes are the
    values in all parts. prompts: the templates that the user chose. Raises UserError if no sample of the first part has a class, and as
    `read_classes`.
    """
    facts = (label,) if label else LABEL_FACTS
    values = [_values(part, facts, with_tags=classes is not None) for part in parts]
    own_prompts: dict[str, Sequence[str]] = {}
    if classes:
        entries = read_classes(classes, prompts)
        own_prompts = {entry.name: entry.prompts for entry in entries if entry.prompts}
        names, number = [entry.name for entry in entries], {entry.label: i for i, entry in enumerate(entries)}
    else:
        distinct = sorted({value for part in values for sample_values in part.values() for value in sample_values})
        names, number = [value.replace("_", " ") for value in distinct], {value: i for i, value in enumerate(distinct)}
    labels = []
    for part, part_values in zip(parts, values):
        class_of = {
            index: next(number[value] for value in sample_values if value in number)
            for index, sample_values in part_values.items()
            if set(sample_values) & set(number)
        }
        labels.append(Labels(part.source, names, class_of, len(part.indices) - len(class_of), own_prompts))
    if not labels[0].class_of:
        raise UserError(_no_class(parts[0].source, values[0], facts, classes))
    return labels


def has_labels(source: Source) -> bool:
    """Whether one of the first samples has a class in its facts."""
    for index in range(min(10, len(source))):
        with suppress(BadSample):
            facts = source.record(index).facts
            if any(facts.get(name) for name in LABEL_FACTS):
                return True
    return False


def class_labels(samples: Samples) -> Labels:
    """Returns the classes that the captions are labels of."""
    classes = samples.source.classes
    assert classes is not None
    class_of = {index: label for index in samples.indices.tolist() if (label := int(classes.of[index])) >= 0}
    return Labels(samples.source, list(classes.names), class_of, len(samples.indices) - len(class_of))


def _values(samples: Samples, facts: Sequence[str], with_tags: bool) -> dict[int, list[str]]:
    """Returns what may be the class of each sample: its label fact and, if they count, its tags."""
    values: dict[int, list[str]] = {}
    for index in samples.indices.tolist():
        try:
            record = samples.source.record(index)
        except BadSample:
            values[index] = []
            continue
        fact = next((str(record.facts[name]) for name in facts if record.facts.get(name) not in (None, "")), None)
        values[index] = ([fact] if fact is not None else []) + (list(record.tags) if with_tags else [])
    return values


def _no_class(source: Source, values: Mapping[int, list[str]], facts: Sequence[str], classes: Path | None) -> str:
    fields = " or ".join(facts)
    if not classes:
        return (
            f"No sample of {source.name} has a class in {fields}; set --label to the column or fact that holds it, or --captions-from if "
            "the captions are classes."
        )
    examples = sorted({value for sample_values in values.values() for value in sample_values})[:5]
    shown = f"there are values such as {', '.join(map(repr, examples))}" if examples else "they are empty"
    return f"No sample of {source.name} has one of the classes in {classes}; they are matched with {fields} and tags: {shown}."
