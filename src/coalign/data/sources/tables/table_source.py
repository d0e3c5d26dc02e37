"""`TableSource`: samples from the rows of a table with image paths."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.sources.base import LeftOut, LeftOutPlaces, PackedStrings, Source, read_image_file, splits_by_name
from coalign.data.sources.tables.columns import (
    URL,
    Columns,
    image_name,
    looks_like_image,
    numbered_alike,
    url_error,
)
from coalign.data.sources.tables.image_paths import ImagePaths
from coalign.data.text.captions import caption_values, is_missing, make_record, parse_collection, printable, tag_values
from coalign.errors import BadSample, NoImage, UserError
from coalign.types import Record

Row = dict[str, Any] | BadSample
_MANY_ROWS = 10_000  # bytes of the packed rows of an image
_MAX_PATH = 1000  # characters; longer is text of an encoded image
_BETWEEN_PATHS = re.compile(r"[|;,\n]")


class TableSource(Source):
    """One sample per image of the table. Paths are relative to `folder`.

    Rows with the same image add captions and tags to it; a row with several images adds them to each. A row without an image is a sample
    of its own. Rows that cannot be read are left out.
    """

    has_columns = True

    def __init__(
        self,
        name: str,
        folder: Path,
        rows: Iterable[tuple[str, Row]],
        columns: Columns,
        left_out: Iterable[LeftOut] = (),
    ) -> None:
        self.name = name
        self._rows, split_names, found = _pack(rows, columns)
        self.left_out = [*left_out, *found]
        if not len(self._rows):
            raise no_rows(name, self.left_out)
        self.splits = splits_by_name(split_names)
        self._paths = locate_images(name, columns, folder, self._some_images(), self.left_out)
        self.image_folder = self._paths.folder if self._paths.found else None  # None: it has none of some of the images

    def __len__(self) -> int:
        return len(self._rows)

    def record(self, index: int) -> Record:
        return unpack(self._rows[index])

    def image_path(self, index: int) -> str | None:
        image = json.loads(self._rows[index])["image"]
        return self._paths.path(image) if image else None

    def image(self, index: int) -> bytes:
        path = self.image_path(index)
        if path is None:
            raise NoImage("no image path", json.loads(self._rows[index])["key"])
        return read_image_file(path)

    def _some_images(self) -> list[str]:
        return [image for index in probed(len(self)) if (image := json.loads(self._rows[index])["image"])]


def probed(count: int) -> list[int]:
    """About ten indices, evenly spaced, below `count`."""
    return np.linspace(0, count - 1, min(10, count), dtype=int).tolist()


def locate_images(
    name: str, columns: Columns, folder: Path, images: Sequence[str], left_out: list[LeftOut]
) -> ImagePaths:
    """Finds the files of some of a table's image paths. Appends a note to `left_out` if they are not where the paths say.

    Raises UserError if the images are on the web, or encoded as text.
    """
    if images and all(image.startswith(URL) for image in images):
        raise url_error(name)
    if images and all(len(image) > _MAX_PATH for image in images):
        raise UserError(
            f"{name} contains images as text in the column {columns.image!r}; write them to files, or as bytes to a Parquet table."
        )
    paths = ImagePaths(folder, images, Path(name).stem)
    if paths.prefix:
        reason = f"images are read from {printable(str(paths.folder))} without {printable(paths.prefix)} in their paths"
        left_out.append(LeftOut(printable(images[0]), reason, 0))
    return paths


def no_rows(name: str, left_out: Iterable[LeftOut]) -> UserError:
    """The error for a table of which no row can be read."""
    reasons: Counter[str] = Counter()
    for each in left_out:
        reasons[each.reason] += each.count
    why = f" that can be read: {', '.join(f'{reason} ({count:,})' for reason, count in reasons.most_common(3))}"
    return UserError(f"{name} has no rows{why if reasons else ''}.")


def _pack(rows: Iterable[tuple[str, Row]], columns: Columns) -> tuple[PackedStrings, list[str], list[LeftOut]]:
    """Packs rows, one per image, and returns them with the split name of each ("" for none), and what cannot be read."""
    unreadable, repeated = LeftOutPlaces(), LeftOutPlaces()
    packed: list[bytes] = []
    splits: list[str] = []
    seen: dict[str, int] = {}
    pending: dict[
        int, list[Mapping[str, Any]]
    ] = {}  # rows of images with many of them, which are packed again only once
    notes: list[LeftOut] = []
    for where, row in _noting_unused(rows, columns, notes):
        if isinstance(row, BadSample):
            unreadable.add(where, row.reason)
            continue
        for image in _image_paths(row.get(columns.image)) or [""]:
            if image and (first := seen.setdefault(image, len(packed))) < len(packed):
                addition = {"where": where, "captions": _captions(row, columns), "tags": _tags(row, columns)}
                if len(packed[first]) > _MANY_ROWS:
                    pending.setdefault(first, []).append(addition)
                else:
                    packed[first] = _merge(packed[first], [addition], repeated)
                continue
            packed.append(pack(image, printable(image) or where, row, columns))
            splits.append(split_name(row, columns))
    for first, additions in pending.items():
        packed[first] = _merge(packed[first], additions, repeated)
    left_out = [*unreadable.entries(), *notes]
    if repeats := repeated.entries():
        reason = (
            f"captions that other rows of their image repeat are used once ({sum(each.count for each in repeats):,})"
        )
        left_out.append(LeftOut(repeats[0].where, reason, 0))
    return PackedStrings(packed), splits, left_out


def _noting_unused(
    rows: Iterable[tuple[str, Row]], columns: Columns, notes: list[LeftOut]
) -> Iterator[tuple[str, Row]]:
    """Yields the rows, then appends a note on columns of images that are not used."""
    more_images: dict[str, list[str]] = {}  # their names -> the first row
    for where, row in rows:
        if isinstance(row, dict) and not more_images and (names := numbered_alike(columns.image, row)):
            more_images[where] = names
        yield where, row
    for where, names in more_images.items():
        reason = f"images are read from {columns.image!r}, not from {', '.join(map(repr, names))}; to use those, write a row for each image"
        notes.append(LeftOut(where, reason, 0))


def _image_paths(value: Any) -> list[str]:
    """The image paths in a cell or JSON value: a string, an object with a path, or several, as a list or with separators between them."""
    if isinstance(value, int):
        value = str(value)  # 1000092795, for 1000092795.jpg
    if isinstance(value, str):
        images = parse_collection(value) if value.lstrip()[:1] == "[" else None
        if images is None and len(paths := list(filter(str.strip, _BETWEEN_PATHS.split(value)))) > 1:
            images = paths if all(map(looks_like_image, paths)) else None
        if images is None:
            return [] if is_missing(value) else list(filter(None, [image_name(value)]))
        value = images
    if isinstance(value, Mapping):
        known = [value[name] for name in ("path", "file_name", "filename") if isinstance(value.get(name), str)]
        value = known[:1] or [each for each in value.values() if isinstance(each, str) and looks_like_image(each)]
    if isinstance(value, (list, tuple)):
        return list(dict.fromkeys(image for each in value for image in _image_paths(each)))
    return []


def split_name(row: Mapping[str, Any], columns: Columns) -> str:
    """The row's value in the split column; "" if there is none."""
    value = row.get(columns.split) if columns.split else None
    return "" if is_missing(value) else str(value)


def pack(image: str, key: str, row: Mapping[str, Any], columns: Columns) -> bytes:
    """Packs what `unpack` needs as JSON, and the image path."""
    used = {columns.image, columns.tags, columns.split, "facts", *columns.captions}
    facts = {name: value for name, value in row.items() if name not in used}
    if isinstance(row.get("facts"), dict):
        facts |= row["facts"]
    values = {
        "image": image,
        "key": key,
        "captions": _captions(row, columns),
        "tags": _tags(row, columns),
        "facts": facts,
    }
    return json.dumps(values, default=_to_text).encode()


def unpack(packed: bytes) -> Record:
    """The record of a packed row. Raises BadSample if none of its captions is usable."""
    row = json.loads(packed)
    return make_record(row["key"], caption_values(row["captions"]), tuple(row["tags"]), row["facts"])


def _merge(packed: bytes, additions: Iterable[Mapping[str, Any]], repeated: LeftOutPlaces) -> bytes:
    """Adds the captions and tags of further rows to a packed one. Adds the rows of which no caption is new to `repeated`."""
    merged = json.loads(packed)
    tags = dict.fromkeys(merged["tags"])
    known = set(map(json.dumps, merged["captions"]))
    for row in additions:
        written = [json.dumps(caption, default=_to_text) for caption in row["captions"]]
        new = [caption for caption in written if caption not in known]
        if written and not new:
            repeated.add(row["where"], "")
        known.update(new)
        merged["captions"] += map(json.loads, new)
        tags |= dict.fromkeys(row["tags"])
    merged["tags"] = list(tags)
    return json.dumps(merged).encode()


def _captions(row: Mapping[str, Any], columns: Columns) -> list[Any]:
    return [row[name] for name in columns.captions if row.get(name) is not None]


def _tags(row: Mapping[str, Any], columns: Columns) -> tuple[str, ...]:
    return tag_values(row.get(columns.tags)) if columns.tags else ()


def _to_text(value: Any) -> Any:
    """Converts Parquet values that JSON lacks: bytes, arrays, dates and decimals."""
    if isinstance(value, (np.ndarray, np.generic)):
        return value.tolist()
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
