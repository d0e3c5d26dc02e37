"""Tables of image paths and captions: CSV, TSV, JSONL, a JSON list, and Parquet."""

from __future__ import annotations

import csv
import json
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coalign.data.sources.base import PackedStrings, Problem, Source, read_image_file, splits_by_name
from coalign.data.text.captions import caption_values, make_record, printable, tag_values
from coalign.errors import BadSample, NoImage, UserError
from coalign.types import Record

_IMAGE_COLUMNS = (
    "image",
    "image_path",
    "img",
    "img_path",
    "filepath",
    "file_path",
    "filename",
    "file_name",
    "file",
    "path",
)
_CAPTION_COLUMNS = (
    "caption",
    "captions",
    "text",
    "texts",
    "title",
    "sentence",
    "sentences",
    "description",
    "alt_text",
    "raw",
)
_TAG_COLUMNS = ("tags", "tag", "keywords", "keyword", "labels")  # not "label", the class in zero-shot evaluation
_DELIMITERS = ",\t;|"
_LONG_ROW = 50  # lines; a longer row has probably swallowed others after an unclosed quotation mark

Row = dict[str, Any] | BadSample


@dataclass(frozen=True)
class Columns:
    """Names of the columns with a role. All other columns are facts."""

    image: str
    captions: tuple[str, ...]
    tags: str | None = None
    split: str | None = None


class TableSource(Source):
    """One sample per image of the table; rows with the same image add captions to it. Paths are relative to `folder`."""

    def __init__(
        self, name: str, folder: Path, rows: Iterable[tuple[str, Row]], columns: Columns, problems: list[Problem]
    ) -> None:
        self.name = name
        self.problems = problems
        self.folder = folder
        self._rows, split_names = _pack(rows, columns)
        if not len(self._rows):
            raise UserError(f"{name} has no rows.")
        self.splits = splits_by_name(split_names)
        images = self._first_images()
        if not any((folder / image).exists() for image in images):
            candidates = (find_image_folder(folder, image) for image in images)
            self.folder = next((candidate for candidate in candidates if candidate), folder)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        row = self._row(index)
        return make_record(row["key"], caption_values(row["captions"]), tuple(row["tags"]), row["facts"])

    def image_path(self, index: int) -> str | None:
        image = self._row(index)["image"]
        return os.path.join(self.folder, image) if image else None

    def image(self, index: int) -> bytes:
        path = self.image_path(index)
        if path is None:
            raise NoImage("no image path", self._row(index)["key"])
        return read_image_file(path)

    def _row(self, index: int) -> dict[str, Any]:
        row = json.loads(self._rows[index])
        if "bad" in row:
            raise BadSample(*row["bad"])
        return row

    def _first_images(self) -> list[str]:
        rows = [json.loads(self._rows[index]) for index in range(min(10, len(self)))]
        return [row["image"] for row in rows if row.get("image")]


def _pack(rows: Iterable[tuple[str, Row]], columns: Columns) -> tuple[PackedStrings, list[str]]:
    """Packs rows as JSON, one per image, and returns them with the split name of each ("" for none)."""
    packed: list[bytes] = []
    splits: list[str] = []
    seen: dict[str, int] = {}
    for where, row in rows:
        if isinstance(row, BadSample):
            packed.append(json.dumps({"bad": [row.reason, row.detail]}).encode())
            splits.append("")
            continue
        image = row.get(columns.image)
        image = image.strip() if isinstance(image, str) else ""
        captions = [row[name] for name in columns.captions if row.get(name) is not None]
        if not image:  # a caption without an image, which some methods can train on
            packed.append(
                json.dumps(_normalize("", captions, row, columns) | {"key": where}, default=_to_text).encode()
            )
            splits.append("")
            continue
        if (first := seen.setdefault(image, len(packed))) < len(packed):
            merged = json.loads(packed[first])
            merged["captions"] += captions
            packed[first] = json.dumps(merged, default=_to_text).encode()
            continue
        splits.append(str(row.get(columns.split) or "") if columns.split else "")
        packed.append(json.dumps(_normalize(image, captions, row, columns), default=_to_text).encode())
    return PackedStrings(packed), splits


def _normalize(image: str, captions: list[Any], row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    used = {columns.image, columns.tags, columns.split, "facts", *columns.captions}
    facts = {name: value for name, value in row.items() if name not in used}
    if isinstance(row.get("facts"), dict):
        facts |= row["facts"]
    tags = tag_values(row.get(columns.tags)) if columns.tags else ()
    return {"image": image, "key": printable(image), "captions": captions, "tags": tags, "facts": facts}


def _to_text(value: Any) -> str:
    """Converts Parquet values that JSON lacks (dates, decimals, bytes) to text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def open_table(
    path: Path,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    tags_column: str | None = None,
) -> TableSource:
    """Opens the table at `path`, in the format of its extension. Unset columns are detected by name, ignoring case.

    Raises UserError if the file cannot be read, a column is missing, or there are no rows.
    """
    named = (image_column, caption_columns, tags_column)
    problems: list[Problem] = []
    kind = path.suffix.lower()
    if kind == ".parquet":
        names, rows = _read_parquet(path)
    elif kind in (".jsonl", ".ndjson", ".json"):
        names, rows = _read_json(path)
    else:
        names, rows = _read_csv(path, problems, *named)
    return TableSource(printable(str(path)), path.parent, rows, choose_columns(path.name, names, *named), problems)


# ---------------------------------------------------------------- columns


def _base_name(name: str) -> str:
    """Normalizes a column name: lower case, underscores, no trailing number ("Caption_1" -> "caption")."""
    return re.sub(r"_?\d+$", "", re.sub(r"[\s_-]+", "_", name.strip().lower()))


def _detect(names: Sequence[str], known: Sequence[str]) -> list[str]:
    return sorted((name for name in names if _base_name(name) in known), key=lambda name: known.index(_base_name(name)))


def choose_columns(
    table: str,
    names: Sequence[str],
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    tags_column: str | None = None,
) -> Columns:
    """Assigns roles to the columns `names`: those given by the caller, the others by name.

    Raises UserError, listing the columns, if a given column is missing or no image or caption column is detected.
    """
    listed = ", ".join(map(printable, names)) or "none"
    for name in [image_column, tags_column, *(caption_columns or ())]:
        if name is not None and name not in names:
            raise UserError(f"{table} has no column {name!r}; its columns are: {listed}")
    image = image_column or next(iter(_detect(names, _IMAGE_COLUMNS)), None)
    captions = tuple(
        caption_columns or [name for name in names if _base_name(name) in _CAPTION_COLUMNS and name != image]
    )
    tags = tags_column or next(iter(_detect(names, _TAG_COLUMNS)), None)
    if image is None and any(_base_name(name) in ("url", "image_url", "img_url") for name in names):
        raise UserError(
            f"{table} contains image URLs instead of files; download the images first, for example with img2dataset; "
            f"its columns are: {listed}"
        )
    if image is None:
        raise UserError(
            f"Cannot detect the column of {table} with the image paths; rename it to 'image'; its columns are: {listed}"
        )
    if not captions:
        raise UserError(
            f"Cannot detect the column of {table} with the captions; rename it to 'caption'; its columns are: {listed}"
        )
    return Columns(image, captions, tags, next((name for name in names if _base_name(name) == "split"), None))


# ---------------------------------------------------------------- file formats: column names, and (where, row) pairs


def _read_csv(
    path: Path, problems: list[Problem], image: str | None, captions: Sequence[str] | None, tags: str | None
) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the caption rules reject captions that are too long
    with open(path, "rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
    with open(path, encoding=encoding, errors=errors, newline="") as text:
        head = text.readline()
    named = [name for name in (image, *(captions or ()), tags) if name is not None]
    # The delimiter with the most known column names; ties go to the one with the most columns.
    best = max(_DELIMITERS, key=lambda delimiter: _delimiter_score(head, delimiter, named))
    names = _header(head, best)

    def rows() -> Iterator[tuple[str, Row]]:
        with open(path, encoding=encoding, errors=errors, newline="") as text:
            reader = csv.reader(text, delimiter=best)
            next(reader, None)
            last = reader.line_num
            for cells in reader:
                first, last = last + 1, reader.line_num
                where = f"{path.name} line {first}"
                if last - first >= _LONG_ROW:
                    problems.append(
                        (where, f"one row spans {last - first + 1} lines; is a closing quotation mark missing?")
                    )
                if len(cells) == len(names):
                    yield where, dict(zip(names, cells))
                elif cells:
                    yield (
                        where,
                        BadSample("wrong number of columns", f"{where} has {len(cells)}, expected {len(names)}"),
                    )

    return names, rows()


def _header(head: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]


def _delimiter_score(head: str, delimiter: str, named: Sequence[str]) -> tuple[int, int]:
    names = _header(head, delimiter)
    known = sum(_base_name(name) in (*_IMAGE_COLUMNS, *_CAPTION_COLUMNS) or name in named for name in names)
    return known, len(names)


def _read_json(path: Path) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    """Reads JSON lines or, for .json, a list of objects. The columns are all keys of the first thousand objects."""

    def values() -> Iterator[tuple[str, Any]]:
        if path.suffix.lower() == ".json":
            yield from ((f"{path.name} item {number}", item) for number, item in enumerate(load_json(path)))
            return
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, start=1):
                where = f"{path.name} line {number}"
                if line.strip():
                    try:
                        yield where, json.loads(line)
                    except (ValueError, RecursionError):
                        yield where, BadSample("broken JSON", where)

    def rows() -> Iterator[tuple[str, Row]]:
        for where, value in values():
            yield (
                where,
                value
                if isinstance(value, (dict, BadSample))
                else BadSample("broken JSON", f"{where} is not a JSON object"),
            )

    names: dict[str, None] = {}
    for (_, row), _number in zip(rows(), range(1000)):
        names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(names), rows()


def load_json(path: Path) -> Any:
    """Parsed content of a JSON file. Raises UserError if it is not valid JSON."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _read_parquet(path: Path) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f'Reading {path} requires the "hf" extra: pip install "coalign[hf]"') from None
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None

    embedded = [
        field.name
        for field in file.schema_arrow
        if not pyarrow.types.is_string(field.type) and _base_name(field.name) in _IMAGE_COLUMNS
    ]
    if embedded:
        raise UserError(f"{path} embeds its images in the column {embedded[0]!r}; open it as hf:{path}")

    def rows() -> Iterator[tuple[str, Row]]:
        number = 0
        for batch in file.iter_batches(4096):
            for row in batch.to_pylist():
                yield f"{path.name} row {number}", row
                number += 1

    return file.schema_arrow.names, rows()


# ---------------------------------------------------------------- image folder


def find_image_folder(base: Path, first: str) -> Path | None:
    """The folder that contains the file `first`: `base` or a folder up to two levels below it. None if there is none."""
    if not first:
        return None
    for folder in [base, *sorted(base.glob("*/")), *sorted(base.glob("*/*/"))]:
        if (folder / first).is_file():
            return folder
    return None
