"""`Source`, the base class of all datasets of image-text pairs, and what sources share: splits, subsets, reading image files."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.images.formats import IMAGE_EXTENSIONS
from coalign.data.text.captions import printable
from coalign.errors import BadSample, UserError
from coalign.types import Record

IMAGES_PER_LABEL = 4  # captions with at least this number of images each, on average, are class labels
MAX_NAMED = 200  # rows or files that are named for each reason to leave them out
FOLDER = "folder"  # as `DataConfig.captions_from`: the class is the name of the image's folder


@dataclass(frozen=True)
class LeftOut:
    """Something that opening a source found, but that is in none of its samples."""

    where: str  # the file or row, or the first of several
    reason: str
    count: int = 1  # images, rows or archive members; 0 if no sample is lost


class LeftOutPlaces:
    """Rows or files that are left out one by one. The first of each reason are named; the last of these has the count of all others."""

    def __init__(self) -> None:
        self._by_reason: dict[str, list[LeftOut]] = {}

    def add(self, where: str, reason: str) -> None:
        named = self._by_reason.setdefault(reason, [])
        if len(named) < MAX_NAMED:
            named.append(LeftOut(where, reason))
        else:
            named[-1] = replace(named[-1], count=named[-1].count + 1)

    def entries(self) -> list[LeftOut]:
        return [each for named in self._by_reason.values() for each in named]


Splits = dict[str, np.ndarray]  # split name -> int64 indices, ascending

_SPLIT_NAMES = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}

_CANONICAL_SPLITS = {alias: name for name, aliases in _SPLIT_NAMES.items() for alias in aliases}


@dataclass(frozen=True)
class Fingerprints:
    """64-bit hashes that identify a source's samples, images and captions. Unusable samples have no captions."""

    keys: np.ndarray  # uint64 [sample]
    images: np.ndarray  # uint64 [sample]
    captions: np.ndarray  # uint64 [caption], in sample order
    caption_counts: np.ndarray  # int64 [sample]


@dataclass(frozen=True)
class Classes:
    """The classes of a source whose captions are class labels."""

    names: Sequence[str]
    of: np.ndarray  # int64 [sample]; -1 for a sample without a class
    templates: Sequence[str]  # of the captions, with {} for the class name
    in_captions: bool = False  # the captions as they are were found to be class labels


class Source(ABC):
    """A dataset of image-text pairs with random access.

    `record` and `image` raise `BadSample` for a sample that cannot be used; a sample without a caption has a record without any. Functions
    that open a source raise `UserError`. Members with a default are optional: the default says that the source does not have them.

    Attributes:
        name: The name of the data in tables and reports.
        splits: The data's own splits: name to int64 indices, ascending. None: it has none.
        left_out: What opening the data found, but has in none of its samples.
        unread: What lies beside the data and looks like data, such as "captions.csv".
        classes: The class of each sample, if the captions are class labels.
        prompts: The prompts for names of classes, as in `coalign.data.text.prompts.templates`.
        has_columns: Whether columns can be chosen by name (`DataConfig`), as in a table.
    """

    name: str
    splits: Splits | None = None
    left_out: Sequence[LeftOut] = ()
    unread: Sequence[str] = ()
    classes: Classes | None = None
    prompts: Sequence[str] = ("default",)
    has_columns: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Returns the number of samples, unusable ones included."""

    @abstractmethod
    def record(self, index: int) -> Record:
        """Returns the captions, the tags and the key of a sample. Raises `BadSample` if it cannot be used."""

    @abstractmethod
    def image(self, index: int) -> bytes | np.ndarray:
        """Returns the bytes of the encoded file, or decoded RGB pixels, uint8 [height, width, 3]. Raises `BadSample` like `record`."""

    def image_path(self, index: int) -> str | None:
        """Returns the path of the sample's image file; None if the image is not a file of its own. Raises `BadSample` like `record`."""
        return None

    def fingerprints(self) -> Fingerprints | None:
        """Returns fingerprints that are known without reading all samples. `coalign.data.fingerprints` computes those of any source."""
        return None

    def stamp(self) -> int | None:
        """Returns a hash that changes whenever the data does, used as a cache key; None if there is no fast one."""
        return None


class PackedStrings(Sequence[bytes]):
    """Many byte strings in one buffer with end offsets.

    Takes a tenth of a list's memory, and forked loader workers share the buffer; a list is copied as its reference
    counts change.
    """

    def __init__(self, strings: Iterable[bytes]) -> None:
        strings = list(strings)
        self._ends = np.cumsum([len(string) for string in strings], dtype=np.int64)
        self._bytes = b"".join(strings)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self._ends):
            raise IndexError(index)
        return self._bytes[self._ends[index - 1] if index else 0 : self._ends[index]]


class Subset(Source):
    """The samples of a source at `indices`, in that order."""

    def __init__(self, source: Source, indices: np.ndarray, split: str) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = f"{source.name} [{split}]"
        self.left_out, self.unread = source.left_out, source.unread
        if source.classes is not None:
            self.classes = replace(source.classes, of=source.classes.of[self.indices])

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> Record:
        return self.source.record(int(self.indices[index]))

    def image(self, index: int) -> bytes | np.ndarray:
        return self.source.image(int(self.indices[index]))

    def image_path(self, index: int) -> str | None:
        return self.source.image_path(int(self.indices[index]))


def are_labels(captions: int, images: int) -> bool:
    """Whether this number of distinct captions is so small for the images that the captions are class labels."""
    return 0 < captions * IMAGES_PER_LABEL <= images


def hash64(content: bytes) -> int:
    """64-bit hash, stable across machines."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def read_image_file(path: str | Path) -> bytes:
    """Content of an image file. Raises BadSample if it is missing or unreadable."""
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            return file.read()
    except FileNotFoundError:
        raise BadSample("image file is missing", printable(str(path))) from None
    except (OSError, ValueError) as error:  # ValueError: the path contains NUL
        raise BadSample("image file cannot be read", f"{printable(str(path))}: {error}") from None


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # opening a named pipe would otherwise wait for a writer


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def canonical_split(name: str) -> str | None:
    """The split that an alias stands for ("validation" -> "val"), or None if `name` is not a known alias."""
    return _CANONICAL_SPLITS.get(name.strip().lower())


def splits_by_name(names: Sequence[str]) -> Splits | None:
    """Groups sample indices by split, given one split name per sample; an empty name means train.

    Returns None if there is neither a val nor a test split: only train, or names such as fold numbers.
    """
    canonical = {name: canonical_split(name) or name.strip() or "train" for name in set(names)}
    if not {"val", "test"} & set(canonical.values()):
        return None
    number: dict[str, int] = {}
    of = np.fromiter((number.setdefault(canonical[name], len(number)) for name in names), np.int64, len(names))
    ends = np.cumsum(np.bincount(of))
    return dict(zip(number, np.split(np.argsort(of, kind="stable"), ends[:-1])))


def choose_split(source: Source, split: str | None, splits: Splits) -> Source:
    """The subset of `source` in `split` (a name or alias); all of it if None. Raises UserError if it does not exist."""
    if split is None:
        return source
    name = split if split in splits else canonical_split(split) or split
    if name not in splits:
        raise UserError(f"{source.name} has no split {split!r}; available splits: {', '.join(splits)}")
    return Subset(source, splits[name], name)
