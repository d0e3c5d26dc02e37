"""Parquet files with image paths, or with the images themselves: one file, or a folder of them. Requires the `hf` extra."""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import (
    LeftOut,
    LeftOutPlaces,
    PackedStrings,
    Source,
    canonical_split,
    hash64,
    read_image_file,
    splits_by_name,
)
from coalign.data.sources.tables.columns import Columns, choose_columns
from coalign.data.sources.tables.row_groups import RowGroups, open_parquet_file
from coalign.data.sources.tables.table_source import TableSource, no_rows, pack, split_name, unpack
from coalign.data.text.captions import printable
from coalign.errors import BadSample, NoImage, UserError
from coalign.types import Record

_SHARD = re.compile(r"(?:[-_.]?\d+)?(?:-of-\d+)?$")  # "train-00000-of-00002" -> "train"
_BATCH = 4096  # rows


class ParquetSource(Source):
    """One sample per row. Images stay in the files, and are read by their row groups (see `RowGroups`)."""

    has_columns = True

    def __init__(self, name: str, folder: Path, files: Sequence[Path], columns: Columns) -> None:
        self.name, self.folder, self.files, self.columns = name, folder, list(files), columns
        unreadable = LeftOutPlaces()
        texts: list[bytes] = []
        splits: list[str] = []
        places = array("i")  # file, row group, and row in it, of each sample
        for number, path in enumerate(self.files):
            for group, row_number, where, row in _text_rows(path, folder, columns):
                if (reason := _failure(row)) is not None:
                    unreadable.add(where, reason)
                    continue
                texts.append(pack("", where, row, columns))
                splits.append(split_name(row, columns) or file_split(path))
                places.extend((number, group, row_number))
        self.left_out = unreadable.entries()
        if not texts:
            raise no_rows(name, self.left_out)
        self._texts, self._places = PackedStrings(texts), np.array(places).reshape(-1, 3)
        self.splits = splits_by_name(splits)
        self._groups = RowGroups(self.files, columns.image, self.stamp())
        if self._groups.unpacks:
            size = self._groups.largest / 1e6
            reason = f"large row groups (up to {size:,.0f} MB) are unpacked to {self._groups.folder} in training"
            self.left_out.append(LeftOut(str(self.files[0]), reason, 0))

    def __len__(self) -> int:
        return len(self._texts)

    def record(self, index: int) -> Record:
        return unpack(self._texts[index])

    def image(self, index: int) -> bytes:
        value = self._groups.image(*self._places[index].tolist())
        if isinstance(value, str):
            return read_image_file(self.folder / value)
        if not value:
            raise NoImage("no image", unpack(self._texts[index]).key)
        return value

    def stamp(self) -> int:
        status = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in self.files]
        return hash64(repr((status, self.columns)).encode())


def open_parquet(path: Path, reading: DataConfig = DETECT) -> Source:
    """Opens a Parquet file, or all those in a folder, whose names may give their splits: data/train-00000-of-00002.parquet.

    Raises UserError if a file cannot be read, a column is missing, or there are no rows.
    """
    files = parquet_files(path)
    folder = path if path.is_dir() else path.parent
    columns, embeds = _columns(files[0], reading)
    for other in files[1:]:
        if _columns(other, reading) != (columns, embeds):
            raise UserError(f"{other} has other columns than {files[0]}; open them one by one, as in 'A + B'.")
    name = printable(str(path))
    if embeds:
        return ParquetSource(name, folder, files, columns)

    def rows() -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
        for file in files:
            for _, _, where, row in _text_rows(file, folder, columns):
                if (reason := _failure(row)) is not None:
                    yield where, BadSample(reason)
                    continue
                if columns.split is None and file_split(file):
                    row |= {"split": file_split(file)}
                yield where, row

    by_file = columns.split is None and any(map(file_split, files))
    named = Columns(columns.image, columns.captions, columns.tags, "split") if by_file else columns
    return TableSource(name, folder, rows(), named)


def parquet_files(path: Path) -> list[Path]:
    """The Parquet files at `path`: itself, or those in a folder and its subfolders that are not hidden, in path order."""
    if not path.is_dir():
        return [path]
    found = (file for file in path.rglob("*") if file.suffix.lower() == ".parquet" and file.is_file())
    return sorted(
        file for file in found if not any(part.startswith((".", "_")) for part in file.relative_to(path).parts)
    )


def holds_samples(path: Path, reading: DataConfig = DETECT) -> bool:
    """Whether a Parquet file has a column of images or image paths, and one of captions."""
    try:
        _columns(path, reading)
    except UserError:
        return False
    return True


def file_split(path: Path) -> str:
    """The split that a file's name, or else its folder's, stands for; "" if there is none."""
    for name in (_SHARD.sub("", path.stem), path.parent.name):
        if split := canonical_split(name):
            return split
    return ""


def is_img2dataset(names: Collection[str]) -> bool:
    """Whether a table with these columns was written by img2dataset. It has a row for each URL, also for those that failed."""
    return {"key", "status", "url"} <= set(names)


def download_failure(status: Any) -> str | None:
    """Why img2dataset wrote no image for a row with this status; None if it did."""
    return None if status == "success" else f"img2dataset: {str(status).replace('_', ' ')}"


def _failure(row: dict[str, Any]) -> str | None:
    return download_failure(row["status"]) if is_img2dataset(row) else None


def _columns(path: Path, reading: DataConfig) -> tuple[Columns, bool]:
    """The columns of a file, and whether the image column holds the images themselves."""
    schema = open_parquet_file(path).schema_arrow
    embedded = [field.name for field in schema if _holds_bytes(field.type)]
    columns = choose_columns(printable(path.name), schema.names, reading, embedded)
    return columns, columns.image in embedded


def _holds_bytes(kind: Any) -> bool:
    """Whether a type may hold encoded images: bytes, structs and lists of them, or the structs that Hugging Face datasets write."""
    import pyarrow

    types = pyarrow.types
    if types.is_struct(kind):
        names = {field.name for field in kind}
        return any(_holds_bytes(field.type) for field in kind) or {"bytes", "path"} <= names
    if types.is_list(kind) or types.is_large_list(kind):
        return types.is_int8(kind.value_type) or types.is_uint8(kind.value_type) or _holds_bytes(kind.value_type)
    if types.is_dictionary(kind):
        return _holds_bytes(kind.value_type)
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_vector(kind: Any) -> bool:
    """Whether a type is lists of floats, such as embeddings, which would take most of the memory."""
    import pyarrow

    types = pyarrow.types
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return is_list and types.is_floating(kind.value_type)


def _text_rows(path: Path, folder: Path, columns: Columns) -> Iterator[tuple[int, int, str, dict[str, Any]]]:
    """Yields (row group, row in it, where, row) without images and without other columns of bytes or of embeddings."""
    import pyarrow

    file = open_parquet_file(path)
    roles = {*columns.captions, columns.tags, columns.split}
    fields = file.schema_arrow
    names = [
        each.name for each in fields if each.name in roles or not (_holds_bytes(each.type) or _is_vector(each.type))
    ]
    shown = printable(str(path.relative_to(folder)))
    labels = {name: classes for name, classes in _class_names(file.schema_arrow).items() if name in names}
    number = 0
    try:
        for group in range(file.metadata.num_row_groups):
            in_group = 0
            for batch in file.iter_batches(_BATCH, row_groups=[group], columns=names, use_threads=False):
                for row in batch.to_pylist():
                    for name, classes in labels.items():  # -1: unlabeled
                        row[name] = classes[row[name]] if row[name] in range(len(classes)) else None
                    yield group, in_group, f"{shown} row {number}", row
                    in_group, number = in_group + 1, number + 1
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def _class_names(schema: Any) -> dict[str, list[str]]:
    """The names of the classes in columns with class numbers, as Hugging Face datasets write them to the metadata."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: each["names"] for name, each in features.items() if each.get("_type") == "ClassLabel"}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}
