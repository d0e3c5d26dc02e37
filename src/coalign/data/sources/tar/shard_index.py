"""Byte-offset index of a tar shard, built by reading the shard once and stored in a small file next to it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np

from coalign.data.images.formats import IMAGE_EXTENSIONS
from coalign.data.sources.base import LeftOut, hash64
from coalign.data.sources.folders.scan import split_folder
from coalign.data.sources.tar.members import DamagedTarError, Read, compression, read_member
from coalign.data.sources.tar.shard_samples import IMAGE, KINDS, ShardSamples
from coalign.data.text.captions import printable
from coalign.errors import UserError
from coalign.files import cache_folder, write_atomically

MISSING = 0xFFFFFFFF  # block number of a member that the sample lacks
SPLITS = ("", "train", "val", "test")
_VERSION = 4
_SUFFIX = ".coalign-index"
_T = TypeVar("_T")


@dataclass
class SampleOffsets:
    """Locations of a shard's samples, sufficient to read them."""

    # uint32 [sample, kind of member], block of the first header of the image, text, .json and .cls; or MISSING
    starts: np.ndarray
    splits: np.ndarray  # uint8 [sample], index in `SPLITS` of the split that a folder in the archive is named for
    left_out: list[LeftOut]


@dataclass
class ShardIndex(SampleOffsets):
    """Locations and hashes of a shard's samples; the hashes are needed to split the data."""

    keys: np.ndarray  # uint64 [sample], hash of the sample's name
    images: np.ndarray  # uint64 [sample], hash of the image file
    captions: np.ndarray  # uint64 [caption], hashes of the cleaned captions, in sample order
    caption_counts: np.ndarray  # uint32 [sample]; 0 for a sample without usable captions


def shard_stamp(shard: str) -> np.ndarray:
    """Index version, image types, file size and modification time, int64 [4]. Changes whenever the samples may do."""
    status = os.stat(shard)
    # Plugins for Pillow add types.
    types = hash64(" ".join(sorted(IMAGE_EXTENSIONS)).encode()) >> 1
    return np.array([_VERSION, types, status.st_size, status.st_mtime_ns], dtype=np.int64)


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


def _read_head(file: BinaryIO) -> tuple[np.ndarray, np.ndarray, list[LeftOut]]:
    starts, splits, left_out = (_read_array(file) for _ in range(3))
    entries = json.loads(left_out.tobytes())
    return starts, splits, [LeftOut(str(where), str(reason), int(count)) for where, reason, count in entries]


def _read_array(file: BinaryIO) -> np.ndarray:
    return np.load(file, allow_pickle=False)


def _write(path: Path, stamp: np.ndarray, index: ShardIndex) -> None:
    if path.parent.name == "shards":
        path.parent.mkdir(parents=True, exist_ok=True)
    left_out = np.frombuffer(json.dumps([astuple(each) for each in index.left_out]).encode(), dtype=np.uint8)
    arrays = [
        stamp,
        index.starts,
        index.splits,
        left_out,
        index.keys,
        index.images,
        index.captions,
        index.caption_counts,
    ]

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for array in arrays:
                np.save(file, array, allow_pickle=False)

    write_atomically(path, write)


def build_index(shard: str) -> ShardIndex:
    """Indexes a shard by reading all of it.

    A damaged or truncated shard yields its complete samples; `left_out` describes the damage and counts what is skipped.
    Raises UserError if the shard is compressed.
    """
    with open(shard, "rb", buffering=1 << 20) as file:
        if kind := compression(file.read(6)):
            raise UserError(
                f"{printable(shard)} is compressed with {kind}, which does not support random access; "
                "decompress it to a plain .tar first."
            )
        size = os.fstat(file.fileno()).st_size
        samples = ShardSamples()
        offset = 0
        damage, truncated = None, None
        try:
            while (member := read_member(_reader(file), offset)) is not None:
                if member.data + member.size > size:
                    truncated = member.name
                    raise DamagedTarError(f"truncated inside {printable(member.name)}")
                samples.add(member, _reader(file))
                offset = member.end
            trailing = _reader(file)(offset, 1 << 20)
        except DamagedTarError as error:
            damage = str(error) if size else "the file is empty"
            trailing = b""
    index = _finish(samples, damage, truncated)
    if any(trailing):
        index.left_out.append(LeftOut("", f"{size - offset:,} bytes after the end-of-archive marker are not read", 0))
    return index


def _finish(samples: ShardSamples, damage: str | None, truncated: str | None) -> ShardIndex:
    left_out = samples.finish(damage, truncated)
    found = samples.samples.values()
    captions = [sample.captions() for sample in found]
    starts = [
        [sample.parts[kind].start if kind in sample.parts else MISSING for kind in range(len(KINDS))]
        for sample in found
    ]
    return ShardIndex(
        starts=np.array(starts, dtype=np.uint32).reshape(-1, len(KINDS)),
        splits=np.array([SPLITS.index(_split(name)) for name in samples.samples], dtype=np.uint8),
        keys=np.array([hash64(os.fsencode(name)) for name in samples.samples], dtype=np.uint64),
        images=np.array([sample.parts[IMAGE].hash for sample in found], dtype=np.uint64),
        captions=np.array([caption for sample in captions for caption in sample], dtype=np.uint64),
        caption_counts=np.array([len(sample) for sample in captions], dtype=np.uint32),
        left_out=left_out,
    )


def _split(name: str) -> str:
    found = split_folder(name.split("/")[:-1])
    return found[0] if found else ""


def _reader(file: BinaryIO) -> Read:
    def read(offset: int, size: int) -> bytes:
        file.seek(offset)
        return file.read(size)

    return read
