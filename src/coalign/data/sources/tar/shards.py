"""WebDataset and img2dataset tar shards, with random access through a byte-offset index stored next to each shard.

Members form a sample if their paths agree up to the extension (see `shard_samples`). Captions are read from its text member, one
per line, else from its .json; tags and facts from the .json (see `caption_content`). `facts["cls"]` is the class of its .cls member, and
`facts["folder"]` the folder in the archive. Nothing is extracted, executed or unpickled.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from glob import glob
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from coalign.cores import num_cores
from coalign.data.sources.base import Fingerprints, LeftOut, Source, hash64, splits_by_name
from coalign.data.sources.caption_content import json_facts, json_fields, json_tags, raw_captions, text_captions
from coalign.data.sources.folders.scan import FolderScan, scan_folder, splits_of_paths
from coalign.data.sources.tar.members import BLOCK, DamagedTarError, Member, read_member
from coalign.data.sources.tar.remote import is_remote, local_copies
from coalign.data.sources.tar.shard_index import (
    MISSING,
    SPLITS,
    load_index,
    load_offsets,
    shard_stamp,
)
from coalign.data.sources.tar.shard_samples import UNREAD, sample_name
from coalign.data.text.captions import make_record, printable
from coalign.errors import BadSample, UserError
from coalign.progress import track
from coalign.types import Record

_T = TypeVar("_T")
_MAX_OPEN = 256  # shards kept open per process; further ones are opened for each read


class ShardSource(Source):
    """The samples of all shards, in order. Takes 16 bytes of memory per sample; everything else is read on access.

    `left_out` lists what is skipped: damaged parts, incomplete samples, links, devices and unknown file types. Shards in folders named for
    splits, or with such names ("train-0000.tar"), are these splits; so are such folders in the archives.
    """

    def __init__(self, name: str, shards: list[str]) -> None:
        self.name = name
        self._shards = shards
        base = os.path.commonpath([os.path.dirname(shard) or "." for shard in map(os.path.abspath, shards)])
        self._labels = [
            printable(re.sub(r"\.tar$", "", os.path.relpath(shard, base), flags=re.I).replace(os.sep, "/"))
            for shard in shards
        ]
        indexes = _load_all(shards, load_offsets)
        # Per shard, uint32 [sample, kind of member]: blocks of the members. Concatenating would double peak memory.
        self._starts = [index.starts for index in indexes]
        self._ends = np.cumsum([len(starts) for starts in self._starts])
        found = [
            LeftOut(f"{label}.tar: {each.where}" if each.where else f"{label}.tar", each.reason, each.count)
            for label, index in zip(self._labels, indexes)
            for each in index.left_out
        ]
        self.left_out = [each for each in found if each.reason != UNREAD]
        self.unread = [each.where for each in found if each.reason == UNREAD]
        if not len(self):
            first = f"{self.left_out[0].where}: {self.left_out[0].reason}" if self.left_out else "the shards are empty"
            raise UserError(f"No images found in {name} ({first}).")
        self._set_splits(np.concatenate([index.splits for index in indexes]))
        self._class_names = _class_names({os.path.dirname(shard) for shard in shards} | {base})
        self._open: dict[int, int] = {}

    def _set_splits(self, in_archives: np.ndarray) -> None:
        """Sets the splits by the names of the shards and their folders, else by the folders in the archives, uint8 [sample]."""
        shards = splits_of_paths([f"{label}/" for label in self._labels])  # also finds split names of shards
        if shards.names and len(set(shards.names)) > 1:
            sizes = np.diff(self._ends, prepend=0)
            filled = np.flatnonzero(sizes)
            own = splits_by_name([shards.names[number] for number in filled]) or {}
            in_split = {split: np.isin(np.arange(len(sizes)), filled[numbers]) for split, numbers in own.items()}
            self.splits = {split: np.flatnonzero(np.repeat(mask, sizes)) for split, mask in in_split.items()} or None
        elif in_archives.all() and (in_archives != SPLITS.index("train")).any():
            self.splits = {SPLITS[number]: np.flatnonzero(in_archives == number) for number in np.unique(in_archives)}
        elif shards.note and len(self._shards) > 1:
            self.left_out = [*self.left_out, shards.note]

    def __getstate__(self) -> dict[str, Any]:
        # Spawned processes open their own files. Forked ones share descriptors, which is safe: pread takes an offset.
        return self.__dict__ | {"_open": {}}

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> Record:
        shard, (image, text, meta, label) = self._locate(index)
        name = sample_name(self._member(shard, image).name)[0]
        key = f"{self._labels[shard]}/{printable(name)}"
        lines = text_captions(self._content(shard, text)) if text != MISSING else []
        fields: dict[str, Any] = {}
        if meta != MISSING:
            with suppress(BadSample) if lines else nullcontext():  # captions are read from the text
                fields = json_fields(self._content(shard, meta), key)
        facts = json_facts(fields)
        if label != MISSING:
            facts["cls"] = self._class(self._content(shard, label))
        if folder := posixpath.dirname(name):
            facts["folder"] = printable(folder)
        missing = "no caption file" if meta == MISSING else "no caption in the .json file"
        return make_record(key, raw_captions(lines, fields), json_tags(fields), facts, missing)

    def _class(self, content: bytes) -> str:
        """The class in a .cls file; its name if the file has a number and a file beside the shards lists the names."""
        label = content.decode("utf-8", "backslashreplace").strip()
        number = int(label) if label.isdecimal() else -1
        return self._class_names[number] if 0 <= number < len(self._class_names) else label

    def image(self, index: int) -> bytes:
        shard, (image, *_) = self._locate(index)
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
            if not hasattr(os, "pread"):  # Windows, where threads would share the position of an open file
                with open(self._shards[shard], "rb") as file:
                    file.seek(offset)
                    return file.read(size)
            if shard in self._open:
                return os.pread(self._open[shard], size, offset)
            descriptor = os.open(self._shards[shard], os.O_RDONLY)
            # another thread may have opened it, too
            if len(self._open) < _MAX_OPEN and self._open.setdefault(shard, descriptor) == descriptor:
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
    with ThreadPoolExecutor(min(8, num_cores())) as pool:
        return list(track(pool.map(load, shards), "Indexing shards", len(shards)))


def _class_names(folders: Iterable[str]) -> list[str]:
    """The lines of a list of class names in one of the folders; an empty list if there is none."""
    for folder, name in product(sorted(folders), ("classnames.txt", "class_names.txt", "classes.txt")):
        with suppress(OSError, UnicodeDecodeError):
            return Path(folder, name).read_text("utf-8-sig").splitlines()
    return []


# ---------------------------------------------------------------- finding shards


def open_shards(spec: str) -> ShardSource:
    """Opens shards given by a brace pattern ("cc3m/{00000..00331}.tar"), a glob, one file or a folder.

    A folder contains shards or folders with shards. Patterns, globs and files may also be URLs
    ("s3://bucket/{00000..00331}.tar"). Raises UserError if shards are missing, compressed or without images.
    """
    if is_remote(spec):
        return ShardSource(printable(spec), local_copies(spec, lambda pattern: list(expand_braces(pattern))))
    if os.path.isdir(spec):
        shards = shards_in(scan_folder(spec))
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


def shards_in(scan: FolderScan) -> list[str]:
    """The shards directly in a folder; if there are none, those in its folders."""
    shards = sorted(path for path in scan.archives if path.lower().endswith(".tar"))
    direct = [path for path in shards if os.sep not in path]
    return [os.path.join(scan.root, path) for path in direct or shards]


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
