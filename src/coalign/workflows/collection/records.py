"""What a collection knows of its images besides their embeddings: keys, captions, tags, folders, and the images themselves."""

from __future__ import annotations

import difflib
import posixpath
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from coalign.data.loading.samples import sample_key
from coalign.data.sources.base import Source
from coalign.errors import BadSample, UserError
from coalign.workflows.evaluate.samples import captions_of, tags_of


class Records(ABC):
    """The images of a collection by row."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def key(self, row: int) -> str: ...

    @abstractmethod
    def captions(self, row: int) -> tuple[str, ...]: ...

    @abstractmethod
    def tags(self, row: int) -> tuple[str, ...]: ...

    @abstractmethod
    def image(self, row: int) -> bytes | np.ndarray:
        """Returns the image as `Source.image` does. Raises BadSample if it is gone, UserError if the data cannot be opened."""

    def folder(self, row: int) -> str:
        """Returns the folder in the image's key, such as "cats/young" of "cats/young/1.jpg"; "" without one."""
        return posixpath.dirname(self.key(row))

    def row(self, key: str) -> int:
        """Returns the row of a key. Raises UserError if no image has it."""
        row = self._rows.get(key)
        if row is None:
            raise UserError(f"No image has the key {key!r}{_hint(key, self._rows)}.")
        return row

    def matching(self, tags: Sequence[str], folder: str | None) -> np.ndarray | None:
        """Returns the rows, ascending, that have all `tags` and are in `folder` or below it; None: there is no filter.

        Raises UserError for a tag or a folder that no image has.
        """
        groups = []
        for kind, names, known in (("tag", tags, self.by_tag), ("folder", _folder(folder), self.by_folder)):
            for name in names:
                if name not in known:
                    raise UserError(f"No image has the {kind} {name!r}{_hint(name, known)}.")
                groups.append(known[name])
        if not groups:
            return None
        rows = groups[0]
        for other in groups[1:]:
            rows = np.intersect1d(rows, other, assume_unique=True)
        return rows

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {self.key(row): row for row in range(len(self))}

    @cached_property
    def by_tag(self) -> dict[str, np.ndarray]:
        """The rows of each tag, ascending."""
        return _grouped(map(self.tags, range(len(self))))

    @cached_property
    def by_folder(self) -> dict[str, np.ndarray]:
        """The rows in each folder and below it, ascending."""
        return _grouped(_with_parents(self.folder(row)) for row in range(len(self)))


class SourceRecords(Records):
    """The samples of a source at `indices`."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self._indices, self._captions = source, indices, captions_of(source)

    def __len__(self) -> int:
        return len(self._indices)

    def key(self, row: int) -> str:
        return sample_key(self.source, self._indices[row])

    def captions(self, row: int) -> tuple[str, ...]:
        return tuple(self._captions(self._indices[row]))

    def tags(self, row: int) -> tuple[str, ...]:
        return tuple(tags_of(self.source, self._indices[row]))

    def image(self, row: int) -> bytes | np.ndarray:
        return self.source.image(self._indices[row])


class StoredRecords(Records):
    """Records from the columns of a table, whose images are found again in the data by their key.

    columns: "key", "captions" and "tags", each a pyarrow array. numbers: of each row, its number among the samples when they were
    embedded, where it is looked for first. open_data: returns the data and the samples' indices in it; called for the first image.
    """

    def __init__(self, columns: Any, numbers: np.ndarray, open_data: Callable[[], tuple[Source, np.ndarray]]) -> None:
        self._columns, self._numbers, self._open_data = columns, numbers, open_data

    def __len__(self) -> int:
        return len(self._numbers)

    def key(self, row: int) -> str:
        return self._columns["key"][row].as_py()

    def captions(self, row: int) -> tuple[str, ...]:
        return tuple(self._columns["captions"][row].as_py() or ())

    def tags(self, row: int) -> tuple[str, ...]:
        return tuple(self._columns["tags"][row].as_py() or ())

    def image(self, row: int) -> bytes | np.ndarray:
        source, indices = self._data
        key, number = self.key(row), int(self._numbers[row])
        if number < len(indices) and sample_key(source, int(indices[number])) == key:
            return source.image(int(indices[number]))
        index = self._indices_by_key.get(key)
        if index is None:
            raise BadSample("it is no longer in the data")
        return source.image(index)

    @cached_property
    def _data(self) -> tuple[Source, np.ndarray]:
        return self._open_data()

    @cached_property
    def _indices_by_key(self) -> dict[str, int]:
        source, indices = self._data
        return {sample_key(source, index): index for index in indices.tolist()}


def _grouped(names_of_rows: Any) -> dict[str, np.ndarray]:
    rows: dict[str, list[int]] = defaultdict(list)
    for row, names in enumerate(names_of_rows):
        for name in dict.fromkeys(names):
            rows[name].append(row)
    return {name: np.array(each, np.int64) for name, each in sorted(rows.items())}


def _folder(folder: str | None) -> list[str]:
    return [] if folder is None else [folder.strip("/")]


def _with_parents(folder: str) -> list[str]:
    parts = folder.split("/") if folder else []
    return ["/".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _hint(name: str, known: Any) -> str:
    if not known:
        return "; the collection has none"
    if len(known) > 20_000:  # a comparison with all would take seconds
        return ""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; the nearest is {matches[0]!r}" if matches else f"; there are {', '.join(list(known)[:5])}"
