"""Byte-offset index of a tar shard, built by reading the shard once and stored in a small file next to it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from coalign.data.sources.base import IMAGE_EXTENSIONS, Problem, hash64
from coalign.data.sources.tar import BLOCK, DamagedTarError, Member, Read, compression, read_member
from coalign.data.text.captions import caption_values, clean_captions, printable, text_lines
from coalign.errors import BadSample, UserError
from coalign.files import cache_folder, write_atomically

MISSING = 0xFFFFFFFF  # block number of a member that the sample lacks
TEXT_FIELDS = ("captions", "caption", "text", "tags", "keywords")
_VERSION = 2
_SUFFIX = ".coalign-index"
_IMAGE, _TEXT, _META = range(3)
_MAX_TEXT = 1 << 26  # bytes; larger .txt and .json members are not read
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class SampleOffsets:
    """Locations of a shard's samples, sufficient to read them."""

    starts: np.ndarray  # uint32 [sample, 3], block of the first header of the image, .txt and .json; or MISSING
    problems: list[Problem]


@dataclass
class ShardIndex(SampleOffsets):
    """Locations and hashes of a shard's samples; the hashes are needed to split the data."""

    keys: np.ndarray  # uint64 [sample], hash of the sample's name
    images: np.ndarray  # uint64 [sample], hash of the image file
    captions: np.ndarray  # uint64 [caption], hashes of the cleaned captions, in sample order
    caption_counts: np.ndarray  # uint32 [sample]; 0 for a sample without usable captions


def shard_stamp(shard: str) -> np.ndarray:
    """Index version, file size and modification time, int64 [3]. Changes whenever the shard does."""
    status = os.stat(shard)
    return np.array([_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def load_offsets(shard: str) -> SampleOffsets:
    """Like `load_index`, but reads only the offsets from a stored index, which takes a third of the time."""
    stamp = shard_stamp(shard)
    for path in _index_paths(shard):
        if (offsets := _read_offsets(path, stamp)) is not None:
            return offsets
    return load_index(shard)


def load_index(shard: str) -> ShardIndex:
    """Reads the stored index of a shard, or builds and stores it: next to the shard, else in the cache folder.

    Raises UserError if the shard is compressed.
    """
    stamp = shard_stamp(shard)
    paths = _index_paths(shard)
    for path in paths:
        if (index := _read(path, stamp)) is not None:
            return index
    _log.info("indexing %s (once)", printable(shard))
    index = build_index(shard)
    for path in paths:
        try:
            _write(path, stamp, index)
            break
        except OSError:
            continue
    return index


def _index_paths(shard: str) -> list[Path]:
    """Paths at which a shard's index may be stored, in order of preference."""
    cached = f"{hash64(os.fsencode(os.path.abspath(shard))):016x}{_SUFFIX}"
    return [Path(shard + _SUFFIX), cache_folder() / "shards" / cached]


def _read(path: Path, stamp: np.ndarray) -> ShardIndex | None:
    """The index stored at `path`; None if it is missing, damaged or outdated."""
    return _read_if_current(
        path, stamp, lambda file: ShardIndex(*_read_head(file), *(_read_array(file) for _ in range(4)))
    )


def _read_offsets(path: Path, stamp: np.ndarray) -> SampleOffsets | None:
    return _read_if_current(path, stamp, lambda file: SampleOffsets(*_read_head(file)))


def _read_if_current(path: Path, stamp: np.ndarray, read: Callable[[BinaryIO], _T]) -> _T | None:
    try:
        with open(path, "rb") as file:
            return read(file) if np.array_equal(_read_array(file), stamp) else None
    except (OSError, ValueError, EOFError):
        return None


def _read_head(file: BinaryIO) -> tuple[np.ndarray, list[Problem]]:
    starts, problems = _read_array(file), _read_array(file)
    return starts, [(str(where), str(reason)) for where, reason in json.loads(problems.tobytes())]


def _read_array(file: BinaryIO) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def _write(path: Path, stamp: np.ndarray, index: ShardIndex) -> None:
    if path.parent.name == "shards":
        path.parent.mkdir(parents=True, exist_ok=True)
    problems = np.frombuffer(json.dumps(index.problems).encode(), dtype=np.uint8)
    arrays = [stamp, index.starts, problems, index.keys, index.images, index.captions, index.caption_counts]

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for array in arrays:
                np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


def build_index(shard: str) -> ShardIndex:
    """Indexes a shard by reading all of it.

    A damaged or truncated shard yields its complete samples; `problems` describes the damage and counts what is skipped.
    Raises UserError if the shard is compressed.
    """
    with open(shard, "rb", buffering=1 << 20) as file:
        if kind := compression(file.read(6)):
            raise UserError(
                f"{printable(shard)} is compressed with {kind}, which does not support random access; "
                "decompress it to a plain .tar first."
            )
        size = os.fstat(file.fileno()).st_size
        builder = _Builder()
        offset = 0
        damage = None
        try:
            while (member := read_member(_reader(file), offset)) is not None:
                if member.data + member.size > size:
                    builder.truncated_row = builder.rows.get(sample_name(member.name)[0])
                    raise DamagedTarError(f"truncated inside {printable(member.name)}")
                builder.add(member, _reader(file))
                offset = member.end
            trailing = _reader(file)(offset, 1 << 20)
        except DamagedTarError as error:
            damage = str(error) if size else "the file is empty"
            trailing = b""
    index = builder.finish(damage)
    if any(trailing):
        index.problems.append(("", f"skipped {size - offset:,} bytes after the end-of-archive marker"))
    return index


def _reader(file: BinaryIO) -> Read:
    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read


class _Builder:
    """Groups members into samples by name; a sample's members need not be adjacent."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.starts: list[list[int]] = []
        self.images: list[int] = []
        self.captions: list[dict[int, list[int]]] = []  # by member type
        self.last_row = 0  # of the member read last
        self.truncated_row: int | None = None  # of the member that the end of the file truncates
        self.notes: dict[str, list[Any]] = {}  # reason -> [first example, count]

    def note(self, name: str, reason: str) -> None:
        self.notes.setdefault(reason, [printable(name), 0])[1] += 1

    def add(self, member: Member, read: Read) -> None:
        if member.kind == "folder":
            return
        if member.kind != "file":
            return self.note(member.name, f"skipped: {member.kind}")
        name, extension = sample_name(member.name)
        kind = _IMAGE if extension in IMAGE_EXTENSIONS else {"txt": _TEXT, "json": _META}.get(extension)
        if kind is None or not name.rpartition("/")[2]:
            return self.note(member.name, "skipped: not an image, .txt or .json file")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self.note(member.name, "path points outside the archive (harmless, nothing is extracted)")
        row = self.rows.setdefault(name, len(self.starts))
        if row == len(self.starts):
            self.starts.append([MISSING, MISSING, MISSING])
            self.images.append(0)
            self.captions.append({})
        elif self.starts[row][kind] != MISSING:
            return self.note(member.name, "skipped: the sample already has a file of this type")
        self.last_row = row
        self.starts[row][kind] = member.start // BLOCK
        if kind == _IMAGE:
            self.images[row] = hash64(read(member.data, member.size))
        elif member.size <= _MAX_TEXT:
            self.captions[row][kind] = _caption_hashes(read(member.data, member.size), kind)

    def finish(self, damage: str | None) -> ShardIndex:
        starts = np.array(self.starts, dtype=np.uint32).reshape(-1, 3)
        complete = starts[:, _IMAGE] != MISSING
        skipped = ""
        if damage is not None and len(starts):
            present = starts != MISSING
            # The last sample may lack members: keep it if it has a text and every type of member that the first has.
            matches_first = present[self.last_row] >= present[0]
            if not matches_first.all() or not present[self.last_row, _TEXT:].any():
                complete[self.last_row] = False
            if self.truncated_row is not None:
                complete[self.truncated_row] = False
            skipped = f"; skipped {np.count_nonzero(~complete)} incomplete samples, kept {np.count_nonzero(complete)}"
        problems = [] if damage is None else [("", damage + skipped)]
        if damage is None and (imageless := [name for name, row in self.rows.items() if not complete[row]]):
            problems.append((_example(printable(imageless[0]), len(imageless)), "text without an image"))
        problems += [(_example(name, count), reason) for reason, (name, count) in self.notes.items()]
        kept = np.flatnonzero(complete)
        names = list(self.rows)
        captions = [self.captions[row].get(_TEXT if starts[row, _TEXT] != MISSING else _META, []) for row in kept]
        return ShardIndex(
            starts=starts[kept],
            keys=np.array([hash64(os.fsencode(names[row])) for row in kept], dtype=np.uint64),
            images=np.array([self.images[row] for row in kept], dtype=np.uint64),
            captions=np.array([caption for sample in captions for caption in sample], dtype=np.uint64),
            caption_counts=np.array([len(sample) for sample in captions], dtype=np.uint32),
            problems=problems,
        )


def _example(name: str, count: int) -> str:
    return name if count == 1 else f"{name} and {count - 1} more"


def _caption_hashes(content: bytes, kind: int) -> list[int]:
    try:
        raws = text_lines(content) if kind == _TEXT else json_captions(json_fields(content, ""))
        return [hash64(caption.encode()) for caption in clean_captions(raws)]
    except BadSample:
        return []


# ---------------------------------------------------------------- members of a sample


def sample_name(member: str) -> tuple[str, str]:
    """Splits a member's path into sample name and lower-case extension: "./dir/000.seg.png" -> ("dir/000", "seg.png")."""
    folder, slash, file = member.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def json_fields(content: bytes, where: str) -> dict[str, Any]:
    """The fields of a sample's .json member. Raises BadSample if it is not a JSON object."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadSample("broken JSON", where)
    return value


def json_captions(values: Mapping[str, Any]) -> list[bytes]:
    """Raw captions from the first of `captions`, `caption` and `text` that is set."""
    return next(
        (caption_values(values[name]) for name in ("captions", "caption", "text") if values.get(name) is not None), []
    )
