"""A folder of images with metadata tables, such as Hugging Face's imagefolder: train/metadata.csv, test/metadata.csv."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import LeftOut, Source, splits_by_name
from coalign.data.sources.folders.scan import (
    TABLE_EXTENSIONS,
    FolderScan,
    PathSplits,
    extension,
    is_document,
    name_files,
    split_folder,
    splits_of_paths,
)
from coalign.data.sources.folders.side_files import match_side_files
from coalign.data.text.captions import printable
from coalign.errors import BadSample, UserError
from coalign.types import Record

_NAMES = ("metadata", "captions")  # of tables that are read before others, by precedence
_MAX_OTHER = 20  # tables of other names that are tried
_NUM_NAMED = 3  # tables in a note


class TablesSource(Source):
    """The samples of tables in the folders of `scan`, one per image. `tables` has the path of each, relative to the root.

    Keys are the images' paths relative to the root. An image in several tables has the captions of all. A sample's split is by its
    table's split column, else by the folder of the image, else by the name of its table, such as train.csv. Images in no table are left
    out.
    """

    def __init__(self, scan: FolderScan, tables: dict[str, Source]) -> None:
        self._root, self.name = scan.root, printable(scan.root)
        self._tables = list(tables.values())
        self.has_columns = any(table.has_columns for table in self._tables)
        self._paths = list(tables)
        self._prefixes = [os.path.dirname(path) for path in tables]
        places = [(number, row) for number, table in enumerate(self._tables) for row in range(len(table))]
        paths = [self._relative_path(number, row) for number, row in places]
        first: dict[str, int] = {}  # image -> its sample
        kept: list[int] = []  # samples' places
        self._more: dict[int, list[int]] = {}  # sample -> further places of its image
        for place, path in enumerate(paths):
            if path and (sample := first.setdefault(path, len(kept))) < len(kept):
                self._more.setdefault(sample, []).append(place)
            else:
                kept.append(place)
        self._places = np.array(places, dtype=np.int64).reshape(-1, 2)
        self._samples = np.array(kept, dtype=np.int64)
        self._set_splits([paths[place] for place in kept])
        self._account(scan, self._paths, first)

    def _relative_path(self, number: int, row: int) -> str:
        """The image's path relative to the root; "" if it is unknown or not a file of its own."""
        try:
            path = self._tables[number].image_path(row)
        except BadSample:
            return ""
        if not path:
            return ""
        path, start = os.path.normpath(path), os.path.join(os.path.normpath(self._root), "")
        return path[len(start) :] if path.startswith(start) else os.path.relpath(path, self._root)

    def _set_splits(self, paths: Sequence[str]) -> None:
        numbers, rows = self._places[self._samples].T
        named = [path or os.path.join(self._prefixes[number], "row") for path, number in zip(paths, numbers)]
        by_path = splits_of_paths(named)
        by_table = splits_of_paths([f"{os.path.splitext(path)[0]}{os.sep}" for path in self._paths]).names
        if by_path.names is None and by_table:
            by_path = PathSplits([by_table[number] for number in numbers])
        names = np.array(by_path.names or [""] * len(paths), dtype=object)
        if by_path.names is None and any(table.splits for table in self._tables):
            folders = (split_folder(os.path.dirname(path).split(os.sep)) for path in named)
            names[:] = [found[0] if found else "" for found in folders]
        for number, table in enumerate(self._tables):
            own = slice(*np.searchsorted(numbers, [number, number + 1]))  # ascending
            for split, indices in (table.splits or {}).items():
                names[own][np.isin(rows[own], indices)] = split
        self.splits = splits_by_name(names.tolist())
        self._notes = [by_path.note] if by_path.note and self.splits is None else []

    def _account(self, scan: FolderScan, used: Sequence[str], named: dict[str, int]) -> None:
        self.left_out = [
            each
            if each.where.startswith(os.path.join(self.name, ""))
            else replace(each, where=printable(os.path.join(prefix, each.where)))
            for prefix, table in zip(self._prefixes, self._tables)
            for each in table.left_out
        ]
        unnamed = [path for path in scan.images if path not in named]
        if unnamed:
            tables = printable(used[0]) if len(used) == 1 else f"any of {len(used)} tables"
            self.left_out.append(LeftOut(printable(unnamed[0]), f"image that is not in {tables}", len(unnamed)))
        self.left_out += [*scan.left_out(except_for=named), *self._notes]
        self.unread = scan.unread(used)
        texts = [path for path in scan.texts if path not in used and not is_document(path)]
        if texts:
            self.unread += name_files(texts, f"captions are read from {printable(used[0])}")

    def __len__(self) -> int:
        return len(self._samples)

    def record(self, index: int) -> Record:
        records = [self._record(place) for place in (int(self._samples[index]), *self._more.get(index, ()))]
        first = records[0]
        captions = tuple(dict.fromkeys(caption for record in records for caption in record.captions))
        tags = tuple(dict.fromkeys(tag for record in records for tag in record.tags))
        return first if len(records) == 1 else replace(first, captions=captions, tags=tags)

    def _record(self, place: int) -> Record:
        number, row = map(int, self._places[place])
        record = self._tables[number].record(row)
        path = self._relative_path(number, row) or os.path.join(self._prefixes[number], record.key)
        return replace(record, key=printable(path.replace(os.sep, "/")))

    def image(self, index: int) -> bytes | np.ndarray:
        number, row = map(int, self._places[self._samples[index]])
        return self._tables[number].image(row)

    def image_path(self, index: int) -> str | None:
        number, row = map(int, self._places[self._samples[index]])
        return self._tables[number].image_path(row)


OpenTable = Callable[[Path, DataConfig], Source]


def open_tables(scan: FolderScan, reading: DataConfig, open_one: OpenTable) -> TablesSource | None:
    """Opens the first readable metadata table of each folder with `open_one`; returns None if there are none.

    Raises UserError if a folder has none that is readable, unless columns are detected and captions can be read from elsewhere: from files
    beside the images, if no table is readable. Files of type .json and .txt may also be something else.
    """
    tables: dict[str, Source] = {}
    error: UserError | None = None
    for candidates in metadata_tables(scan):
        failed: UserError | None = None
        for path in candidates:
            try:
                tables[path] = open_one(Path(scan.root, path), reading)
                break
            except UserError as raised:
                if extension(path) not in ("json", "txt"):
                    failed = failed or raised
        else:
            error = error or failed
    if error and (tables or reading != DETECT or not match_side_files(scan).has_captions):
        raise error
    return TablesSource(scan, tables) if tables else None


def metadata_tables(scan: FolderScan) -> list[list[str]]:
    """The metadata tables by folder, each folder's by precedence: metadata.jsonl, metadata.csv, …, then captions.jsonl, …"""
    by_folder: dict[str, list[tuple[int, int, str]]] = {}
    for path in _possible_tables(scan):
        folder, name = os.path.split(path)
        stem = os.path.splitext(name)[0].lower()
        if stem in _NAMES:
            rank = (_NAMES.index(stem), TABLE_EXTENSIONS.index(extension(name)), path)
            by_folder.setdefault(folder, []).append(rank)
    folders = sorted(by_folder, key=lambda folder: folder.split(os.sep) if folder else [])
    return [[path for _, _, path in sorted(by_folder[folder])] for folder in folders]


def open_other_tables(scan: FolderScan, reading: DataConfig, open_one: OpenTable) -> TablesSource | None:
    """Opens the tables of any name, such as train.csv, that name images which are there.

    Returns None if there are none, or if captions can be read from files beside the images and no column of a table is named. Of many files
    that may be tables, only the outermost are tried. Raises UserError if the columns of images or captions are named, and none can be read.
    """
    paths = [path for path in _possible_tables(scan) if not is_document(path)]
    named = reading.image_column or reading.caption_column or reading.captions_from
    if not paths or (not named and match_side_files(scan).has_captions):
        return None
    paths = sorted(paths, key=lambda path: path.count(os.sep))[:_MAX_OTHER]
    tables: dict[str, Source] = {}
    errors: list[tuple[bool, UserError]] = []  # those of files that may be no table last
    for path in paths:
        try:
            table = open_one(Path(scan.root, path), reading)
            if _finds_images(table):
                tables[path] = table
        except UserError as raised:
            may_be_other = extension(path) in ("json", "txt")
            if not may_be_other or os.path.splitext(os.path.basename(path))[0].lower() in _NAMES:
                errors.append((may_be_other, raised))
    if errors and not tables and (reading.image_column or reading.caption_column):
        raise min(errors, key=lambda error: error[0])[1]
    if not tables:
        return None
    source = TablesSource(scan, tables)
    read = printable(", ".join(list(tables)[:_NUM_NAMED])) + (", …" if len(tables) > _NUM_NAMED else "")
    source.left_out = [*source.left_out, LeftOut("", f"captions are read from {read}", 0)]
    return source


def _possible_tables(scan: FolderScan) -> list[str]:
    """The files that may be tables by their type, without those named as an image."""
    images = {os.path.splitext(path)[0] for path in scan.images}
    files = (*scan.tables, *scan.jsons, *scan.texts)
    return [path for path in files if extension(path) in TABLE_EXTENSIONS and os.path.splitext(path)[0] not in images]


def _finds_images(table: Source) -> bool:
    for index in range(len(table)):
        with suppress(BadSample):
            if (path := table.image_path(index)) and os.path.isfile(path):
                return True
    return False
