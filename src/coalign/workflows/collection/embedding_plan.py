"""Which parts of a folder of embeddings to write: it compares the samples of the data with the rows of the parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from coalign.data.loading.samples import naming
from coalign.data.sources.base import Source, hash64
from coalign.errors import BadSample
from coalign.types import Record
from coalign.workflows.collection.embedding_files import part_files, read_groups

UNREAD = 0  # stamp of a sample whose image was not read, as no row of it can be out of date


@dataclass(frozen=True)
class Task:
    """A part to write. Each row is a sample to embed, or a row of the old part of that name."""

    name: str
    samples: np.ndarray  # int64 [row], index in the source
    kept: np.ndarray  # int64 [row], row of the old part; -1: embed the sample
    stamps: np.ndarray  # uint64 [row], of samples to embed; UNREAD: to compute then

    @property
    def embedded(self) -> np.ndarray:
        """The samples to embed, in order."""
        return self.samples[self.kept < 0]

    def with_rows(self, samples: np.ndarray) -> Task:
        """Returns the part with more samples to embed at its end."""
        kept = np.concatenate([self.kept, np.full(len(samples), -1)])
        return replace(self, samples=np.concatenate([self.samples, samples]), kept=kept)


@dataclass(frozen=True)
class Plan:
    """The parts to write and to remove, and how many samples are new, changed, gone, and the same as before."""

    tasks: list[Task]
    removed: list[str]  # parts without rows
    added: int = 0
    changed: int = 0
    deleted: int = 0
    unchanged: int = 0


@dataclass
class SampleReader:
    """Reads the key, record and stamp of samples."""

    source: Source
    _image_hashes: np.ndarray | None = field(default=None, init=False)
    _has_hashes: bool | None = field(default=None, init=False)

    def record(self, index: int) -> tuple[Record, BadSample | None]:
        """Returns a sample's record; one without captions, and why, if it cannot be used."""
        try:
            with naming(self.source, index):
                return self.source.record(index), None
        except BadSample as bad:
            return Record(f"{self.source.name}[{index}]", ()), bad.copy()

    def path(self, index: int) -> str | None:
        """Returns the path of the sample's image file, if it has one."""
        try:
            return self.source.image_path(index)
        except BadSample:
            return None

    def stamp(self, index: int, record: Record) -> int:
        """Returns a hash of the captions, the tags, and the image file's size and time, or the image if it is not a file of its own."""
        path = self.path(index)
        image = self._content(index) if path is None else _file_state(path)
        return hash64(repr((image, record.captions, record.tags)).encode("utf-8", "surrogateescape")) or 1

    def _content(self, index: int) -> object:
        if self._has_hashes is None:
            known = self.source.fingerprints()  # such as those in the indexes of shards
            self._has_hashes, self._image_hashes = known is not None, None if known is None else known.images
        if self._image_hashes is not None:
            return int(self._image_hashes[index])
        try:
            image = self.source.image(index)
        except BadSample as bad:
            return bad.reason
        return hash64(image if isinstance(image, bytes) else f"{image.shape}".encode() + image.tobytes())


def _file_state(path: str) -> object:
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return "missing"
    return status.st_size, status.st_mtime_ns


# ---------------------------------------------------------------- the plan

_NONE = np.empty(0, np.int64)


@dataclass
class _Rows:
    """The rows of all parts, and the sample of each."""

    names: list[str]
    starts: np.ndarray  # int64 [part + 1], of the rows of each part
    ids: np.ndarray  # uint64 [row]
    stamps: np.ndarray  # uint64 [row]
    samples: np.ndarray = field(default_factory=lambda: _NONE)  # int64 [row]; -1: it is gone
    same: np.ndarray = field(default_factory=lambda: _NONE)  # bool [row], whether the row stays as it is

    def part(self, number: int) -> Task:
        """Returns the rows of a part whose samples still exist."""
        start, end = self.starts[number : number + 2].tolist()
        rows = start + np.flatnonzero(self.samples[start:end] >= 0)
        return Task(self.names[number], self.samples[rows], np.where(self.same[rows], rows - start, -1), _NONE)


def make_plan(
    reader: SampleReader,
    indices: np.ndarray,
    folder: Path,
    chunk: int,
    trusted: bool,
    on_progress: Callable[[int], None],
) -> Plan:
    """Returns what to write so that the folder has a row for each sample at `indices`, and no other.

    Parts that need no change stay as they are. A changed sample stays in its row. New samples go to parts of `chunk` samples, the same
    ones whenever the process was killed before. trusted: whether images that are not files are the same as when the parts were written.
    """
    rows = _read_rows(folder)
    ids, stamps = _identify(reader, indices, bool(len(rows.ids)) and not trusted, on_progress)
    rows.samples = _positions(ids, rows.ids)
    is_new = np.ones(len(ids), bool)
    is_new[rows.samples[rows.samples >= 0]] = False
    stamps_now = stamps[rows.samples] if len(stamps) else np.full(len(rows.ids), UNREAD, np.uint64)
    rows.same = (rows.samples >= 0) & ((stamps_now == UNREAD) | (stamps_now == rows.stamps))
    tasks = {task.name: task for task in map(rows.part, _parts_with(rows, ~rows.same)) if len(task.samples)}
    _add(rows, tasks, np.flatnonzero(is_new), chunk)
    empty = [name for number, name in enumerate(rows.names) if not len(rows.part(number).samples)]
    deleted, unchanged = np.count_nonzero(rows.samples < 0), np.count_nonzero(rows.same)
    return Plan(
        [
            replace(task, samples=indices[task.samples], stamps=stamps[task.samples])
            for _, task in sorted(tasks.items())
        ],
        [name for name in empty if name not in tasks],
        added=int(np.count_nonzero(is_new)),
        changed=int(len(rows.ids) - deleted - unchanged),
        deleted=int(deleted),
        unchanged=int(unchanged),
    )


def _parts_with(rows: _Rows, changed: np.ndarray) -> list[int]:
    """Returns the parts with a changed row."""
    return np.unique(np.searchsorted(rows.starts, np.flatnonzero(changed), side="right") - 1).tolist()


def _add(rows: _Rows, tasks: dict[str, Task], new: np.ndarray, chunk: int) -> None:
    """Adds parts of new samples: a part of `chunk` consecutive ones if its name is free, else the last part while it has room."""
    others = [_NONE]
    for group in np.split(new, np.flatnonzero(np.diff(new // chunk)) + 1) if len(new) else []:
        name = part_name(int(group[0]) // chunk)
        if name in rows.names:
            others.append(group)
        else:
            tasks[name] = Task(name, _NONE, _NONE, _NONE).with_rows(group)
    rest = np.concatenate(others)
    while len(rest):
        last = max([*rows.names, *tasks])
        task = tasks.get(last) or rows.part(rows.names.index(last))
        if (room := chunk - len(task.samples)) <= 0:
            last = part_name(int(last.removeprefix("part-").removesuffix(".parquet")) + 1)
            task, room = Task(last, _NONE, _NONE, _NONE), chunk
        tasks[last] = task.with_rows(rest[:room])
        rest = rest[room:]


def part_name(number: int) -> str:
    return f"part-{number:06d}.parquet"


# ---------------------------------------------------------------- identity of samples and rows


def _identify(
    reader: SampleReader, indices: np.ndarray, with_content: bool, on_progress: Callable[[int], None]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the ids and stamps of samples, uint64 [sample]. Images that are not files are only read `with_content`."""
    ids, stamps = np.empty(len(indices), np.uint64), np.full(len(indices), UNREAD, np.uint64)
    for number, index in enumerate(indices.tolist()):
        record, _ = reader.record(index)
        ids[number] = hash64(record.key.encode("utf-8", "surrogateescape"))
        if with_content or reader.path(index) is not None:
            stamps[number] = reader.stamp(index, record)
        on_progress(number + 1)
    return _distinct(ids), stamps


def _read_rows(folder: Path) -> _Rows:
    files = part_files(folder)
    ends, ids, stamps = [0], [np.empty(0, np.uint64)], [np.empty(0, np.uint64)]
    for path in files:
        for batch in read_groups(path, ["key", "stamp"]):
            keys, values = batch["key"].to_pylist(), batch["stamp"].to_pylist()
            ids.append(np.fromiter((hash64(key.encode()) for key in keys), np.uint64, len(keys)))
            stamps.append(np.fromiter((int(value, 16) for value in values), np.uint64, len(keys)))
        ends.append(sum(map(len, ids)))
    return _Rows([path.name for path in files], np.array(ends), _distinct(np.concatenate(ids)), np.concatenate(stamps))


def _positions(ids: np.ndarray, sought: np.ndarray) -> np.ndarray:
    """Returns the position of each sought id, int64 [sought]; -1 for one that is absent."""
    if not len(ids):
        return np.full(len(sought), -1, np.int64)
    order = np.argsort(ids)
    found = order[np.minimum(np.searchsorted(ids, sought, sorter=order), len(ids) - 1)]
    return np.where(ids[found] == sought, found, -1)


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """Returns hashes of which none is repeated: equal ones are numbered, so that samples that share a key keep a row each."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    first = np.searchsorted(ordered, ordered)  # of its run of equal ones
    distinct = np.empty_like(hashes)
    distinct[order] = ordered + (np.arange(len(hashes)) - first).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return distinct
