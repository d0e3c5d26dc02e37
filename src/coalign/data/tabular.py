"""Tables that name image files and their captions: CSV, TSV, JSONL, a JSON list, and Parquet."""

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

from coalign.data.common import (
    PackedStrings,
    Problems,
    Splits,
    caption_values,
    captioned,
    printable,
    read_image_file,
    splits_by_name,
    tag_values,
)
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
_TAG_COLUMNS = ("tags", "tag", "keywords", "keyword", "labels")  # "label" is a class: zero-shot evaluation looks for it
_DELIMITERS = ",\t;|"
_LONG_ROW = 50  # lines; a row that spans more has probably swallowed others after an opening quote

Row = dict[str, Any] | BadSample


@dataclass(frozen=True)
class Columns:
    """Which columns hold what. The others are facts."""

    image: str
    captions: tuple[str, ...]
    tags: str | None = None
    split: str | None = None


class TableSource:
    """One sample for each image that the table names; rows that repeat an image add their captions to it. Paths are
    relative to `folder`."""

    def __init__(
        self, name: str, folder: Path, rows: Iterable[tuple[str, Row]], columns: Columns, problems: Problems
    ) -> None:
        self.name = name
        self.problems = problems
        self.folder = folder
        self._rows, split_names = _pack(rows, columns)
        if not len(self._rows):
            raise UserError(f"no rows in {name}: there is nothing to train on")
        self.splits: Splits | None = splits_by_name(split_names)
        images = self._some_images()
        if not any((folder / image).exists() for image in images):
            self.folder = next((found for image in images if (found := find_image_folder(folder, image))), folder)

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        row = self._row(index)
        return captioned(row["key"], caption_values(row["captions"]), row["key"], tuple(row["tags"]), row["facts"])

    def image_path(self, index: int) -> str:
        row = self._row(index)
        if not row["image"]:
            raise NoImage("no image path", row["key"])
        return os.path.join(self.folder, row["image"])

    def image(self, index: int) -> bytes:
        return read_image_file(self.image_path(index))

    def _row(self, index: int) -> dict[str, Any]:
        row = json.loads(self._rows[index])
        if "bad" in row:
            raise BadSample(*row["bad"])
        return row

    def _some_images(self) -> list[str]:
        rows = [json.loads(self._rows[index]) for index in range(min(10, len(self)))]
        return [row["image"] for row in rows if row.get("image")]


def _pack(rows: Iterable[tuple[str, Row]], columns: Columns) -> tuple[PackedStrings, list[str]]:
    """Rows as JSON, one an image, and the name of each one's split ("" where there is none)."""
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
        if not image:  # words alone, which some methods take
            packed.append(json.dumps(_normalised("", captions, row, columns) | {"key": where}, default=_plain).encode())
            splits.append("")
            continue
        if (first := seen.setdefault(image, len(packed))) < len(packed):
            merged = json.loads(packed[first])
            merged["captions"] += captions
            packed[first] = json.dumps(merged, default=_plain).encode()
            continue
        splits.append(str(row.get(columns.split) or "") if columns.split else "")
        packed.append(json.dumps(_normalised(image, captions, row, columns), default=_plain).encode())
    return PackedStrings(packed), splits


def _normalised(image: str, captions: list[Any], row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    used = {columns.image, columns.tags, columns.split, "facts", *columns.captions}
    facts = {name: value for name, value in row.items() if name not in used}
    if isinstance(row.get("facts"), dict):
        facts |= row["facts"]
    tags = tag_values(row.get(columns.tags)) if columns.tags else ()
    return {"image": image, "key": printable(image), "captions": captions, "tags": tags, "facts": facts}


def _plain(value: Any) -> str:
    """A Parquet file's dates, decimals and bytes, as text."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)


def open_table(
    path: Path,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    tags_column: str | None = None,
) -> TableSource:
    """The table in `path`, by its extension. Columns that are not named are recognised by their names, in any case.
    Raises UserError."""
    named = (image_column, caption_columns, tags_column)
    problems: Problems = []
    kind = path.suffix.lower()
    if kind == ".parquet":
        names, rows = _read_parquet(path)
    elif kind in (".jsonl", ".ndjson", ".json"):
        names, rows = _read_json(path)
    else:
        names, rows = _read_csv(path, problems, *named)
    return TableSource(printable(str(path)), path.parent, rows, choose_columns(path.name, names, *named), problems)


# ---------------------------------------------------------------- columns


def _bare(name: str) -> str:
    """A column's name without case, separators and the number of several alike: "Caption_1" -> "caption"."""
    return re.sub(r"_?\d+$", "", re.sub(r"[\s_-]+", "_", name.strip().lower()))


def _guess(names: Sequence[str], known: Sequence[str]) -> list[str]:
    return sorted((name for name in names if _bare(name) in known), key=lambda name: known.index(_bare(name)))


def choose_columns(
    table: str,
    names: Sequence[str],
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    tags_column: str | None = None,
) -> Columns:
    """The columns' roles, by what the caller named and by their own names. Raises UserError with the columns there
    are."""
    listed = ", ".join(map(printable, names)) or "none"
    for wanted in [image_column, tags_column, *(caption_columns or ())]:
        if wanted is not None and wanted not in names:
            raise UserError(f"{table} has no column {wanted!r}; its columns are: {listed}")
    image = image_column or next(iter(_guess(names, _IMAGE_COLUMNS)), None)
    captions = tuple(caption_columns or [name for name in names if _bare(name) in _CAPTION_COLUMNS and name != image])
    tags = tags_column or next(iter(_guess(names, _TAG_COLUMNS)), None)
    if image is None and any(_bare(name) in ("url", "image_url", "img_url") for name in names):
        raise UserError(
            f"{table} gives its images by URL; download them first, for instance with img2dataset; "
            f"its columns are: {listed}"
        )
    if image is None:
        raise UserError(
            f"cannot tell which column of {table} holds the image paths; call it 'image'; its columns are: {listed}"
        )
    if not captions:
        raise UserError(
            f"cannot tell which column of {table} holds the captions; call it 'caption'; its columns are: {listed}"
        )
    return Columns(image, captions, tags, next((name for name in names if _bare(name) == "split"), None))


# ---------------------------------------------------------------- file formats: column names, and (where, row) pairs


def _read_csv(
    path: Path, problems: Problems, image: str | None, captions: Sequence[str] | None, tags: str | None
) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a huge caption is the caption rules' business, not the reader's
    with open(path, "rb") as file:
        utf16 = file.read(2) in (b"\xff\xfe", b"\xfe\xff")
    encoding, errors = ("utf-16", "replace") if utf16 else ("utf-8-sig", "surrogateescape")
    with open(path, encoding=encoding, errors=errors, newline="") as text:
        head = text.readline()
    named = [name for name in (image, *(captions or ()), tags) if name is not None]
    # The separator that makes columns with known names, else the one that makes most columns.
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
                    problems.append((where, f"one row spans {last - first + 1} lines; is a quotation mark left open?"))
                if len(cells) == len(names):
                    yield where, dict(zip(names, cells))
                elif cells:
                    yield (
                        where,
                        BadSample("wrong number of columns", f"{where} has {len(cells)} instead of {len(names)}"),
                    )

    return names, rows()


def _header(head: str, delimiter: str) -> list[str]:
    return [name.strip() for name in next(csv.reader([head], delimiter=delimiter), [])]


def _delimiter_score(head: str, delimiter: str, named: Sequence[str]) -> tuple[int, int]:
    names = _header(head, delimiter)
    known = sum(_bare(name) in (*_IMAGE_COLUMNS, *_CAPTION_COLUMNS) or name in named for name in names)
    return known, len(names)


def _read_json(path: Path) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    """JSON lines, or (.json) one list of objects. Columns are the keys of all objects among the first thousand."""

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
                value if isinstance(value, (dict, BadSample)) else BadSample("broken JSON", f"{where} is no object"),
            )

    names: dict[str, None] = {}
    for (_, row), _number in zip(rows(), range(1000)):
        names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return list(names), rows()


def load_json(path: Path) -> Any:
    """A JSON file's content. Raises UserError where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _read_parquet(path: Path) -> tuple[list[str], Iterator[tuple[str, Row]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f'{path} needs the extra "hf": pip install "coalign[hf]"') from None
    try:
        file = parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None

    stored = [
        field.name
        for field in file.schema_arrow
        if not pyarrow.types.is_string(field.type) and _bare(field.name) in _IMAGE_COLUMNS
    ]
    if stored:
        raise UserError(f"{path} holds the images themselves in its column {stored[0]!r}; open it as hf:{path}")

    def rows() -> Iterator[tuple[str, Row]]:
        number = 0
        for batch in file.iter_batches(4096):
            for row in batch.to_pylist():
                yield f"{path.name} row {number}", row
                number += 1

    return file.schema_arrow.names, rows()


# ---------------------------------------------------------------- where the images are


def find_image_folder(base: Path, first: str) -> Path | None:
    """The folder in which the file `first` is: `base` itself or a folder up to two levels below."""
    if not first:
        return None
    for folder in [base, *sorted(base.glob("*/")), *sorted(base.glob("*/*/"))]:
        if (folder / first).is_file():
            return folder
    return None
