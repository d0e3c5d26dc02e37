"""What the sources share: captions and tags from loose values, packed strings, split names, parts of a source."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.curate import clean_caption
from coalign.errors import BadSample, NoCaption, UserError
from coalign.types import Record, Source

IMAGE_EXTENSIONS = frozenset({"jpg", "jpeg", "png", "gif", "webp", "bmp", "tif", "tiff"})

Problems = list[tuple[str, str]]  # (where, reason): what was found and is not used
Splits = dict[str, np.ndarray]  # split name -> int64 indices, ascending

_SPLIT_NAMES = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
_CANONICAL_SPLITS = {alias: name for name, aliases in _SPLIT_NAMES.items() for alias in aliases}


@dataclass(frozen=True)
class Fingerprints:
    """64-bit hashes that tell a source's samples, images and captions apart. A sample that cannot be used has no
    caption."""

    keys: np.ndarray  # uint64 [sample]
    images: np.ndarray  # uint64 [sample]
    captions: np.ndarray  # uint64 [caption], in the samples' order
    caption_counts: np.ndarray  # int64 [sample]


class PackedStrings(Sequence[bytes]):
    """Many byte strings in two arrays: a tenth of a list's memory, and loader workers share it instead of copying it
    on touch."""

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


class Subset:
    """Some samples of a source, in the order of `indices`."""

    def __init__(self, source: Source, indices: np.ndarray, split: str) -> None:
        self.source = source
        self.indices = np.asarray(indices, dtype=np.int64)
        self.name = f"{source.name} [{split}]"
        self.splits: Splits | None = None
        self.problems: Problems = getattr(source, "problems", [])

    def __len__(self) -> int:
        return len(self.indices)

    def record(self, index: int) -> Record:
        return self.source.record(int(self.indices[index]))

    def image(self, index: int) -> bytes | np.ndarray:
        return self.source.image(int(self.indices[index]))


def hash64(content: bytes) -> int:
    """64-bit hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def cache_folder() -> Path:
    """Where what can be computed again is kept if it cannot lie beside the data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coalign"


def raw_bytes(text: str) -> bytes:
    """The bytes that `text` was read from, with those that were no UTF-8, so that the caption rules see them."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half an emoji, as a JSON escape can spell it
        return text.encode("utf-8", "surrogatepass")


def caption_values(value: Any) -> list[bytes]:
    """The raw captions in a cell or JSON value: a string, a list of them, or a string that is a JSON list of them."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, (list, tuple)):
        return [caption for item in value for caption in caption_values(item)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, str) and (items := _json_strings(value)) is not None:
        return [raw_bytes(item) for item in items]
    return [raw_bytes(str(value))]


def tag_values(value: Any) -> tuple[str, ...]:
    """The tags in a cell or JSON value: a list, a JSON list, or one string with commas, semicolons or bars between
    them."""
    if isinstance(value, str):
        items = _json_strings(value)
        if items is None:
            items = value.replace(";", ",").replace("|", ",").split(",")
    else:
        items = [raw.decode("utf-8", "backslashreplace") for raw in caption_values(value)]
    return tuple(tag for item in items if (tag := printable(item).strip()))


def printable(text: str) -> str:
    """File names may hold bytes that are no UTF-8; what is printed or written as JSON may not."""
    return raw_bytes(text).decode("utf-8", "backslashreplace")


def _json_strings(text: str) -> list[str] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None


def captioned(
    key: str, raws: Iterable[bytes], where: str, tags: tuple[str, ...] = (), facts: Mapping[str, Any] | None = None
) -> Record:
    """A record with the usable captions. Raises BadSample only where none is left, with the first one's reason: NoCaption
    if there was none, or an empty one."""
    facts = facts or {}
    try:
        return Record(key, clean_captions(raws, where), tags, facts)
    except BadSample as bad:
        if bad.reason in ("no caption", "empty caption"):
            raise NoCaption(bad.reason, bad.detail, Record(key, (), tags, facts)) from None
        raise


def clean_captions(raws: Iterable[bytes], where: str) -> tuple[str, ...]:
    """The usable captions. Raises BadSample only where none is left: the first one's reason, or "no caption" where
    there was none."""
    kept: list[str] = []
    first_bad: BadSample | None = None
    for raw in raws:
        try:
            kept.append(clean_caption(raw))
        except BadSample as bad:
            first_bad = first_bad or bad
    if not kept:
        raise first_bad or BadSample("no caption", where)
    return tuple(kept)


def text_lines(content: bytes) -> list[bytes]:
    """One caption a line; an empty file is one empty caption."""
    return content.splitlines() or [b""]


def read_image_file(path: str | Path) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError:
        raise BadSample("image file is missing", printable(str(path))) from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise BadSample("image file cannot be read", f"{printable(str(path))}: {error}") from None


def is_image_name(name: str) -> bool:
    return name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS


def canonical_split(name: str) -> str | None:
    """ "validation" -> "val"; None where the name is not that of a split."""
    return _CANONICAL_SPLITS.get(name.strip().lower())


def splits_by_name(names: Sequence[str]) -> Splits | None:
    """The indices of each split from one name a sample; an empty name means train. None where nothing but train is
    named, and where no name is that of a split (folds by number, say)."""
    canonical = np.array([canonical_split(name) or name.strip() or "train" for name in names], dtype=object)
    found = {str(name): np.flatnonzero(canonical == name) for name in dict.fromkeys(canonical.tolist())}
    return found if set(found) & {"val", "test"} else None


def choose_split(source: Source, split: str | None, splits: Splits) -> Source:
    """The part of the source named `split` (any of its aliases). Raises UserError where there is none."""
    if split is None:
        return source
    name = split if split in splits else canonical_split(split) or split
    if name not in splits:
        raise UserError(f"{source.name} has no split {split!r}; it has {', '.join(splits)}")
    return Subset(source, splits[name], name)
