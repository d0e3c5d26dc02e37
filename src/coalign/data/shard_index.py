"""The byte-offset index of one tar shard: built by reading it once, kept in a small file beside it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np

from coalign.data.common import (
    IMAGE_EXTENSIONS,
    Problems,
    cache_folder,
    caption_values,
    clean_captions,
    hash64,
    printable,
    text_lines,
)
from coalign.data.tar import BLOCK, DamagedTarError, Member, Read, compression, read_member
from coalign.errors import BadSample, UserError

NONE = 0xFFFFFFFF  # the block of a member that a sample does not have
TEXT_FIELDS = ("captions", "caption", "text", "tags", "keywords")
_VERSION = 2
_SUFFIX = ".coalign-index"
_IMAGE, _TEXT, _META = range(3)
_MAX_TEXT = 1 << 26  # bytes of a .txt or .json that are read
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass
class Places:
    """Where a shard's samples lie: all that reading them needs."""

    # uint32 [sample, 3], block of the first header of the image, .txt and .json; NONE where there is none
    starts: np.ndarray
    problems: Problems


@dataclass
class ShardIndex(Places):
    """And what tells its samples apart: all that a split needs."""

    keys: np.ndarray  # uint64 [sample], hash of the sample's name
    images: np.ndarray  # uint64 [sample], hash of the image's bytes
    captions: np.ndarray  # uint64 [caption], hashes of the cleaned captions in the samples' order
    caption_counts: np.ndarray  # uint32 [sample]; 0 for a sample whose captions are no use


def shard_stamp(shard: str) -> np.ndarray:
    """What changes when a shard does, int64 [3]."""
    status = os.stat(shard)
    return np.array([_VERSION, status.st_size, status.st_mtime_ns], dtype=np.int64)


def load_places(shard: str) -> Places:
    """The start of the shard's index, which is read in a third of the time. Else as `load_index`."""
    stamp = shard_stamp(shard)
    for place in _index_files(shard):
        if (found := _read_places(place, stamp)) is not None:
            return found
    return load_index(shard)


def load_index(shard: str) -> ShardIndex:
    """The shard's index from its file, or built (and stored beside the shard, or else in the cache folder). Raises
    UserError."""
    stamp = shard_stamp(shard)
    places = _index_files(shard)
    for place in places:
        if (index := _read(place, stamp)) is not None:
            return index
    _log.info("reading %s once to index it", printable(shard))
    index = build_index(shard)
    for place in places:
        try:
            _write(place, stamp, index)
            break
        except OSError:
            continue
    return index


def _index_files(shard: str) -> list[Path]:
    """Where a shard's index may be."""
    cached = f"{hash64(os.fsencode(os.path.abspath(shard))):016x}{_SUFFIX}"
    return [Path(shard + _SUFFIX), cache_folder() / "shards" / cached]


def _read(place: Path, stamp: np.ndarray) -> ShardIndex | None:
    """The index in the file, None if it is absent, damaged, or of another state of the shard."""
    return _open(place, stamp, lambda file: ShardIndex(*_start(file), *(_array(file) for _ in range(4))))


def _read_places(place: Path, stamp: np.ndarray) -> Places | None:
    return _open(place, stamp, lambda file: Places(*_start(file)))


def _open(place: Path, stamp: np.ndarray, read: Callable[[BinaryIO], _T]) -> _T | None:
    try:
        with open(place, "rb") as file:
            return read(file) if np.array_equal(_array(file), stamp) else None
    except (OSError, ValueError, EOFError):
        return None


def _start(file: BinaryIO) -> tuple[np.ndarray, Problems]:
    starts, listed = _array(file), _array(file)
    return starts, [(str(where), str(reason)) for where, reason in json.loads(listed.tobytes())]


def _array(file: BinaryIO) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def _write(place: Path, stamp: np.ndarray, index: ShardIndex) -> None:
    if place.parent.name == "shards":
        place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f"{place.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            problems = np.frombuffer(json.dumps(index.problems).encode(), dtype=np.uint8)
            for array in [
                stamp,
                index.starts,
                problems,
                index.keys,
                index.images,
                index.captions,
                index.caption_counts,
            ]:
                np.save(file, array, allow_pickle=False)
        os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def build_index(shard: str) -> ShardIndex:
    """Reads the whole shard. A damaged or cut one gives the samples that are complete; what is lost is named in
    `problems`."""
    with open(shard, "rb", buffering=1 << 20) as file:
        if kind := compression(file.read(6)):
            raise UserError(
                f"{printable(shard)} is compressed with {kind}, so its samples have no addresses; "
                "unpack it to a plain .tar first"
            )
        size = os.fstat(file.fileno()).st_size
        builder = _Builder()
        offset = 0
        damage = None
        try:
            while (member := read_member(_reader(file), offset)) is not None:
                if member.data + member.size > size:
                    builder.cut = builder.rows.get(sample_name(member.name)[0])
                    raise DamagedTarError(f"it is cut inside {printable(member.name)}")
                builder.add(member, _reader(file))
                offset = member.end
            rest = _reader(file)(offset, 1 << 20)
        except DamagedTarError as error:
            damage = str(error) if size else "it is empty"
            rest = b""
    index = builder.finish(damage)
    if any(rest):
        index.problems.append(("", f"{size - offset:,} bytes after its end mark are not read"))
    return index


def _reader(file: BinaryIO) -> Read:
    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read


class _Builder:
    """Groups members to samples, wherever in the shard they lie."""

    def __init__(self) -> None:
        self.rows: dict[str, int] = {}
        self.starts: list[list[int]] = []
        self.images: list[int] = []
        self.captions: list[dict[int, list[int]]] = []  # by kind of member
        self.last = 0  # the row of the member that was read last
        self.cut: int | None = None  # the row whose member the end of the shard cuts
        self.unused: dict[str, list[Any]] = {}  # reason -> [first example, count]

    def note(self, name: str, reason: str) -> None:
        self.unused.setdefault(reason, [printable(name), 0])[1] += 1

    def add(self, member: Member, read: Read) -> None:
        if member.kind == "folder":
            return
        if member.kind != "file":
            return self.note(member.name, f"a {member.kind} is not read")
        name, extension = sample_name(member.name)
        kind = _IMAGE if extension in IMAGE_EXTENSIONS else {"txt": _TEXT, "json": _META}.get(extension)
        if kind is None or not name.rpartition("/")[2]:
            return self.note(member.name, "neither an image nor .txt nor .json, not read")
        if member.name.startswith("/") or ".." in member.name.split("/"):
            self.note(member.name, "the name points outside the archive (harmless, nothing is extracted)")
        row = self.rows.setdefault(name, len(self.starts))
        if row == len(self.starts):
            self.starts.append([NONE, NONE, NONE])
            self.images.append(0)
            self.captions.append({})
        elif self.starts[row][kind] != NONE:
            return self.note(member.name, "a second image or text of one sample, not read")
        self.last = row
        self.starts[row][kind] = member.start // BLOCK
        if kind == _IMAGE:
            self.images[row] = hash64(read(member.data, member.size))
        elif member.size <= _MAX_TEXT:
            self.captions[row][kind] = _caption_hashes(read(member.data, member.size), kind)

    def finish(self, damage: str | None) -> ShardIndex:
        starts = np.array(self.starts, dtype=np.uint32).reshape(-1, 3)
        complete = starts[:, _IMAGE] != NONE
        lost = ""
        if damage is not None and len(starts):
            present = starts != NONE
            # A cut may have taken the end of the last sample: it must have what the first one has, and a text.
            whole = present[self.last] >= present[0]
            if not whole.all() or not present[self.last, _TEXT:].any():
                complete[self.last] = False
            if self.cut is not None:
                complete[self.cut] = False
            lost = f"; {np.count_nonzero(~complete)} incomplete samples are not used, {np.count_nonzero(complete)} are"
        problems = [] if damage is None else [("", damage + lost)]
        if damage is None and (bare := [name for name, row in self.rows.items() if not complete[row]]):
            problems.append((_example(printable(bare[0]), len(bare)), "text without an image"))
        problems += [(_example(name, count), reason) for reason, (name, count) in self.unused.items()]
        kept = np.flatnonzero(complete)
        names = list(self.rows)
        captions = [self.captions[row].get(_TEXT if starts[row, _TEXT] != NONE else _META, []) for row in kept]
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
        return [hash64(caption.encode()) for caption in clean_captions(raws, "")]
    except BadSample:
        return []


# ---------------------------------------------------------------- what a sample's members mean


def sample_name(member: str) -> tuple[str, str]:
    """ "./dir/000.seg.png" -> ("dir/000", "seg.png"): the sample's name, and the extension in lower case."""
    folder, slash, file = member.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    return folder + slash + stem, extension.lower()


def json_fields(content: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise BadSample("broken JSON", where)
    return value


def json_captions(values: Mapping[str, Any]) -> list[bytes]:
    return next(
        (caption_values(values[name]) for name in ("captions", "caption", "text") if values.get(name) is not None), []
    )
