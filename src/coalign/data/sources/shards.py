"""WebDataset and img2dataset tar shards, with random access through a byte-offset index stored next to each shard.

Members form a sample if their paths agree up to the first dot of the file name. Captions are read from the .txt (one per
line), else from the .json (`captions`, `caption` or `text`); tags and facts from the .json. Nothing is extracted,
executed or unpickled.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from glob import escape as glob_escape
from glob import glob
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coalign.data.sources.base import Fingerprints, Source, canonical_split, hash64, splits_by_name
from coalign.data.sources.remote import is_remote, local_copies
from coalign.data.sources.shard_index import (
    MISSING,
    TEXT_FIELDS,
    json_captions,
    json_fields,
    load_index,
    load_offsets,
    sample_name,
    shard_stamp,
)
from coalign.data.sources.tar import BLOCK, DamagedTarError, Member, read_member
from coalign.data.text.captions import make_record, printable, tag_values, text_lines
from coalign.errors import BadSample, UserError
from coalign.types import Record

_T = TypeVar("_T")
_MAX_OPEN = 256  # shards kept open per process; further ones are opened for each read


class ShardSource(Source):
    """The samples of all shards, in order. Takes 12 bytes of memory per sample; everything else is read on access.

    `problems` lists what is skipped: damaged parts, incomplete samples, links, devices and unknown file types.
    """

    def __init__(self, name: str, shards: list[str]) -> None:
        self.name = name
        self._shards = shards
        base = os.path.commonpath([os.path.dirname(shard) or "." for shard in map(os.path.abspath, shards)])
        self._labels = [
            printable(os.path.relpath(shard, base).removesuffix(".tar").replace(os.sep, "/")) for shard in shards
        ]
        indexes = _load_all(shards, load_offsets)
        # Per shard, uint32 [sample, 3]: blocks of the image, .txt and .json. Concatenating would double peak memory.
        self._starts = [index.starts for index in indexes]
        self._ends = np.cumsum([len(starts) for starts in self._starts])
        self.problems = [
            (f"{label}.tar: {where}" if where else f"{label}.tar", reason)
            for label, index in zip(self._labels, indexes)
            for where, reason in index.problems
        ]
        if not len(self):
            first = ": ".join(self.problems[0]) if self.problems else "the shards are empty"
            raise UserError(f"No images found in {name} ({first}).")
        folders = [label.split("/")[0] if "/" in label else "" for label in self._labels]
        if all(map(canonical_split, folders)):
            self.splits = splits_by_name(np.repeat(folders, np.diff(self._ends, prepend=0)).tolist())
        self._open: dict[int, int] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes open their own files. Forked ones share descriptors, which is safe: pread takes an offset.
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> Record:
        shard, (image, text, meta) = self._locate(index)
        label = self._labels[shard]
        name = self._member(shard, image).name
        key = f"{label}/{printable(sample_name(name)[0])}"
        fields = json_fields(self._content(shard, meta), key) if meta != MISSING else {}
        raws = text_lines(self._content(shard, text)) if text != MISSING else json_captions(fields)
        tags = tag_values(fields.get("tags", fields.get("keywords")))
        facts = {
            field: value
            for field, value in fields.items()
            if isinstance(value, (str, int, float)) and field not in TEXT_FIELDS
        }
        return make_record(key, raws, tags, facts)

    def image(self, index: int) -> bytes:
        shard, (image, _, _) = self._locate(index)
        return self._content(shard, image)

    def fingerprints(self) -> Fingerprints:
        """Fingerprints of all samples, read from the indexes."""
        indexes = _load_all(self._shards, load_index)
        return Fingerprints(
            keys=np.concatenate(
                [index.keys ^ np.uint64(hash64(label.encode())) for label, index in zip(self._labels, indexes)]
            ),
            images=np.concatenate([index.images for index in indexes]),
            captions=np.concatenate([index.captions for index in indexes]),
            caption_counts=np.concatenate([index.caption_counts for index in indexes]),
        )

    def stamp(self) -> int:
        """Hash of the shards' names, sizes and modification times, used as a cache key."""
        return hash64(
            b"".join(label.encode() + shard_stamp(shard).tobytes() for label, shard in zip(self._labels, self._shards))
        )

    def _locate(self, index: int) -> tuple[int, list[int]]:
        shard = int(np.searchsorted(self._ends, index, side="right"))
        return shard, self._starts[shard][index - self._ends[shard]].tolist()  # a negative index: counted from the end

    def _member(self, shard: int, block: int) -> Member:
        try:
            member = read_member(lambda offset, size: self._read(shard, offset, size), block * BLOCK)
        except DamagedTarError as error:
            raise BadSample("damaged shard", f"{self._labels[shard]}.tar: {error}") from None
        if member is None or member.kind != "file":
            raise BadSample("damaged shard", f"{self._labels[shard]}.tar has changed since it was opened")
        return member

    def _content(self, shard: int, block: int) -> bytes:
        member = self._member(shard, block)
        content = self._read(shard, member.data, member.size)
        if len(content) < member.size:
            raise BadSample("damaged shard", f"{self._labels[shard]}.tar is truncated inside {printable(member.name)}")
        return content

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        try:
            if shard in self._open:
                return os.pread(self._open[shard], size, offset)
            descriptor = os.open(self._shards[shard], os.O_RDONLY)
            if len(self._open) < _MAX_OPEN:
                self._open[shard] = descriptor
                return os.pread(descriptor, size, offset)
            try:
                return os.pread(descriptor, size, offset)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise BadSample("shard cannot be read", f"{self._labels[shard]}.tar: {error.strerror}") from None

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


def _load_all(shards: list[str], load: Callable[[str], _T]) -> list[_T]:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(load, shards))


# ---------------------------------------------------------------- finding shards


def open_shards(spec: str) -> ShardSource:
    """Opens shards given by a brace pattern ("cc3m/{00000..00331}.tar"), a glob, one file or a folder.

    A folder contains shards or split folders (train, val, test) with shards. Patterns, globs and files may also be URLs
    ("s3://bucket/{00000..00331}.tar"). Raises UserError if shards are missing, compressed or without images.
    """
    if is_remote(spec):
        return ShardSource(printable(spec), local_copies(spec, lambda pattern: list(expand_braces(pattern))))
    if os.path.isdir(spec):
        shards = shards_in(spec)
    elif os.path.exists(spec):
        shards = [spec]
    elif "{" in spec:
        shards = list(expand_braces(spec))
    else:
        shards = sorted(glob(spec))
    missing = [shard for shard in shards if not os.path.isfile(shard)]
    if missing:
        raise UserError(f"{len(missing)} of {len(shards)} shards of {spec} are missing, starting with {missing[0]}")
    if not shards:
        raise UserError(f"No shards match {spec}")
    return ShardSource(printable(spec), shards)


def shards_in(folder: str) -> list[str]:
    """Shards directly in `folder`; if there are none, those in its split folders (train, val, test)."""
    direct = sorted(glob(os.path.join(glob_escape(folder), "*.tar")))
    return direct or [
        shard
        for shard in sorted(glob(os.path.join(glob_escape(folder), "*", "*.tar")))
        if canonical_split(Path(shard).parent.name)
    ]


def expand_braces(pattern: str) -> Iterator[str]:
    """Expands {first..last} ranges (zero-padded as written) and {one,two} lists, in order. Raises UserError if malformed."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        yield pattern
        return
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if bounds:
        first, last = bounds.groups()
        width = max(len(first), len(last)) if first.startswith("0") else 0
        choices = [f"{number:0{width}d}" for number in range(int(first), int(last) + 1)]
    else:
        choices = match[1].split(",")
    if (not bounds and len(choices) < 2) or not choices:
        raise UserError(
            f"Invalid braces {{{match[1]}}} in {pattern}; "
            "write a range such as {00000..00331} or a list such as {train,val}."
        )
    for choice in choices:
        yield from expand_braces(pattern[: match.start()] + choice + pattern[match.end() :])
