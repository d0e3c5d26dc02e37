"""Images with class labels: the captions are made of the class names, or are the class labels themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from coalign.data.scenes.source import Scenes
from coalign.data.sources.base import (
    FOLDER,
    IMAGES_PER_LABEL,
    Classes,
    Fingerprints,
    Source,
    are_labels,
    canonical_split,
    hash64,
    splits_by_name,
)
from coalign.data.sources.folders.folder import FolderSource
from coalign.data.text.captions import clean_caption, printable
from coalign.errors import BadSample, UserError
from coalign.types import Record

_SAMPLE = 2000  # captions to read before all of them
_INDEX = re.compile(r"(?:n\d{8}|\d+)[._-]+\s*(?=\S)")  # "001.Sparrow", "n02085620-Chihuahua"
_GENERIC = frozenset({"images", "image", "imgs", "img", "jpg", "jpeg", "png", "photos", "pictures"})


class LabeledSource(Source):
    """`source` with captions made of class names, unless `classes.in_captions`."""

    classes: Classes

    def __init__(self, source: Source, classes: Classes) -> None:
        self.source, self.classes = source, classes
        self.name, self.splits = source.name, source.splits
        self.left_out, self.unread, self.has_columns = source.left_out, source.unread, source.has_columns

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        record = self.source.record(index)
        if self.classes.in_captions:
            return record
        number = int(self.classes.of[index % len(self)])  # a mixture's repeated samples have indices beyond its length
        if number < 0:
            return replace(record, captions=(), no_caption=("no class", ""))
        name = self.classes.names[number]
        return replace(record, captions=tuple(each.replace("{}", name) for each in self.classes.templates))

    def image(self, index: int) -> bytes | np.ndarray:
        return self.source.image(index)

    def image_path(self, index: int) -> str | None:
        return self.source.image_path(index)

    def fingerprints(self) -> Fingerprints | None:
        return self.source.fingerprints() if self.classes.in_captions else None

    def stamp(self) -> int | None:
        stamp = self.source.stamp()
        captions = f"{stamp} {self.classes.names} {self.classes.templates} {self.classes.in_captions}"
        return None if stamp is None else hash64(captions.encode() + self.classes.of.tobytes())


def label_source(source: Source, captions_from: str, templates: Sequence[str]) -> LabeledSource:
    """Returns `source` with captions made of the names of its images' folders, or of the values of a column.

    Numbers in front of all class names ("001.Sparrow") are removed, and underscores are spaces. Raises UserError if no sample has a class.
    """
    if captions_from == FOLDER:
        labels, splits = _innermost(*_folders(source))
    else:
        labels, splits = _column(source, captions_from), None
    names, of = _number(labels)
    if not names:
        raise UserError(_no_class(source, captions_from))
    labeled = LabeledSource(source, Classes(names, of, tuple(templates)))
    labeled.splits = source.splits or splits
    return labeled


def label_by_captions(source: Source) -> Source:
    """Returns `source` with its captions as classes if they are class labels: few distinct ones, but two or more, over many images.

    Simple captions of scenes are few, but no labels.
    """
    if source.classes is not None or isinstance(source, Scenes):
        return source
    chosen = np.unique(np.random.default_rng(0).integers(len(source), size=_SAMPLE))
    if len(source) > _SAMPLE:  # nearly all are distinct: there is no need to read all of them
        sample = [_captions(source, index) for index in chosen.tolist()]
        if len(_distinct(sample)) > 0.9 * sum(map(bool, sample)):
            return source
    number: dict[str, int] = {}  # of each distinct caption
    of = np.full(len(source), -1)  # the number of each sample's first caption
    for index in range(len(source)):
        numbers = [number.setdefault(caption, len(number)) for caption in _captions(source, index)]
        of[index] = next(iter(numbers), -1)
        if len(number) * IMAGES_PER_LABEL > len(source):  # there is no need to read the rest
            return source
    if len(number) < 2 or not are_labels(len(number), int(np.count_nonzero(of >= 0))):
        return source
    captions = list(number)
    ranked = sorted(np.unique(of[of >= 0]).tolist(), key=captions.__getitem__)
    class_of = np.full(len(captions) + 1, -1)  # by number; the last entry is for -1
    class_of[ranked] = np.arange(len(ranked))
    names = [captions[each] for each in ranked]
    return LabeledSource(source, Classes(names, class_of[of], ("{}",), in_captions=True))


def _distinct(captions: Iterable[Sequence[str]]) -> set[str]:
    return {caption for own in captions for caption in own}


def _captions(source: Source, index: int) -> tuple[str, ...]:
    try:
        return source.record(index).captions
    except BadSample:
        return ()


# ---------------------------------------------------------------- classes of samples


def _folders(source: Source) -> tuple[list[list[str]], np.ndarray]:
    """The distinct folders of the images, each from the outermost, and the folder of each sample, int64 [sample].

    They are below the root if the source is a folder.
    """
    number: dict[str, int] = {}
    of = np.zeros(len(source), np.int64)
    for index in range(len(source)):
        try:
            folder = source.record(index).facts.get("folder")
            path = source.image_path(index)
        except BadSample:
            folder, path = None, None
        if folder is None and path is not None and not isinstance(source, FolderSource):
            folder = printable(Path(path).parent.as_posix())
        of[index] = number.setdefault(str(folder or "").replace("\\", "/"), len(number))
    return [[part for part in folder.split("/") if part] for folder in number], of


def _innermost(folders: Sequence[list[str]], of: np.ndarray) -> tuple[list[str], dict[str, np.ndarray] | None]:
    """The innermost folder of each sample that is not one of splits or of all images, and the splits if these are innermost."""
    splits = None
    while True:
        names = [parts[-1] if parts else "" for parts in folders]
        above = [parts[:-1] for parts in folders]
        levels = {name for name in names if name}
        if not any(above):
            return [names[number] for number in of], splits
        if all(map(canonical_split, levels)):
            splits = splits_by_name([names[number] for number in of])
        elif not all(name.lower() in _GENERIC for name in levels):
            return [names[number] for number in of], splits
        folders = above


def _column(source: Source, column: str) -> list[str]:
    """The value of a column, or of another fact, of each sample; "" if it has none."""
    values = []
    for index in range(len(source)):
        try:
            values.append(source.record(index).fact(column))
        except BadSample:
            values.append("")
    return values


def _number(labels: Sequence[str]) -> tuple[list[str], np.ndarray]:
    """The distinct class names, sorted, and the class of each label; -1 for an empty label."""
    distinct = {label for label in labels if label}
    cleaned = {label: _clean(label) for label in distinct}
    if all(map(_INDEX.match, distinct)):
        short = {label: _clean(_INDEX.sub("", label, count=1)) for label in distinct}
        if len(set(short.values())) == len(set(cleaned.values())):  # else the numbers distinguish classes
            cleaned = short
    names = sorted({name for name in cleaned.values() if name})
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number.get(cleaned.get(label, ""), -1) for label in labels], np.int64)


def _clean(label: str) -> str:
    try:
        return clean_caption(label.replace("_", " "))
    except BadSample:
        return ""


def _no_class(source: Source, captions_from: str) -> str:
    if captions_from == FOLDER:
        return (
            f"The images of {source.name} are not in class folders, which --captions-from folder needs; "
            "name a column that holds the class."
        )
    columns: dict[str, None] = {}
    for index in range(min(100, len(source))):
        try:
            columns |= dict.fromkeys(source.record(index).facts)
        except BadSample:
            continue
    found = f"the samples have {', '.join(columns)}" if columns else "the samples have no columns"
    return f"No sample of {source.name} has a class in {captions_from!r} (--captions-from); {found}."
