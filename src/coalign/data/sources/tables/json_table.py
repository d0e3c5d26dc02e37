"""Tables as JSON: lines of objects, a list of objects, an object of columns, or an object of captions by image."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import canonical_split
from coalign.data.sources.tables.columns import Columns, choose_columns, looks_like_image, num_known
from coalign.data.sources.tables.files import open_bytes, open_text, table_kind
from coalign.data.sources.tables.image_paths import ImagePaths
from coalign.data.text.captions import printable
from coalign.errors import BadSample, UserError

_NUM_HEAD = 1000  # objects whose keys are the columns
_NUM_PROBED = 10  # names that may be images
_SPACE = re.compile(r"\s*")


def load_json(path: Path) -> Any:
    """Parsed content of a JSON file; if it has several values, as JSON lines, their list. Raises UserError if it is not valid JSON."""
    with open_bytes(path) as file:
        content = file.read()
    try:
        try:
            return json.loads(content)
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Extra data"):
                raise
            return list(_values(error.doc))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None


def _values(text: str) -> Iterator[Any]:
    position = 0
    while (position := _SPACE.match(text, position).end()) < len(text):  # type: ignore[union-attr]
        value, position = json.JSONDecoder().raw_decode(text, position)
        yield value


def read_json(path: Path, reading: DataConfig) -> tuple[Columns, Iterator[tuple[str, dict[str, Any] | BadSample]]]:
    """Returns the columns of a table, and (where, row) of each row. The columns are all keys of the first thousand objects.

    Raises UserError if the file is not JSON, or if there is no image or no caption column.
    """
    content = load_json(path) if table_kind(path) == ".json" else _other_than_lines(path)

    def rows() -> Iterator[tuple[str, dict[str, Any] | BadSample]]:
        for where, value in _lines(path) if content is None else _items(path, content):
            for row in _rows(value):
                if isinstance(row, (dict, BadSample)):
                    yield where, row
                else:
                    yield where, BadSample("broken JSON", f"{where} is not a JSON object")

    names: dict[str, None] = {}
    for _, row in islice(rows(), _NUM_HEAD):
        names |= dict.fromkeys(row if isinstance(row, dict) else ())
    return choose_columns(printable(path.name), list(names), reading), rows()


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{printable(path.name)} line {number}"
            if line.strip():
                try:
                    yield where, json.loads(line.rstrip().rstrip(","))
                except (ValueError, RecursionError):
                    yield where, BadSample("broken JSON", where)


def _other_than_lines(path: Path) -> list[Any] | None:
    """The content of a file for JSON lines if it is a list, or objects of several lines, instead; None if it is not."""
    with open_text(path) as file:
        first = next((line for line in file if line.strip()), "")
    try:
        if isinstance(json.loads(first), dict):
            return None
    except (ValueError, RecursionError):
        pass
    try:
        content = load_json(path)
    except UserError:
        return None
    return content if isinstance(content, list) else None


def _items(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    for number, item in enumerate(_objects(content, path.parent)):
        yield f"{printable(path.name)} item {number}", item


def _rows(value: Any) -> list[Any]:
    """The rows in an item or a line: an object, an object of captions by image, or a list of an image and its captions."""
    if isinstance(value, dict) and _mostly_images(list(value)):
        return _by_image(value)
    if isinstance(value, list) and all(isinstance(each, (str, list)) for each in value):
        images = [each for each in value if isinstance(each, str) and looks_like_image(each)]
        if len(value) > 1 and len(images) == 1:
            return [{"image": images[0], "caption": [each for each in value if each is not images[0]]}]
    return [value]


def _objects(content: Any, folder: Path) -> list[Any]:
    """The rows in the content of a JSON file in a folder."""
    if not isinstance(content, Mapping):
        return content if isinstance(content, list) else [content]
    names, values = list(content), list(content.values())
    if _mostly_images(names):
        return _by_image(content)
    if values and all(isinstance(value, dict) and num_known(list(value), DETECT) for value in values):  # rows by number
        return values
    if values and all(map(canonical_split, names)) and all(isinstance(value, (list, dict)) for value in values):
        parts = (
            (name, row) for name, value in content.items() for item in _objects(value, folder) for row in _rows(item)
        )
        return [{"split": name, **row} if isinstance(row, dict) else row for name, row in parts]
    if isinstance(content.get("columns"), list) and isinstance(content.get("data"), list):  # pandas, orient="split"
        return [dict(zip(content["columns"], row)) if isinstance(row, list) else row for row in content["data"]]
    lists = [value for value in values if isinstance(value, list) and all(isinstance(item, dict) for item in value)]
    if len(lists) > 1:
        lists = [value for value in lists if value and num_known(list(value[0]), DETECT) > 1]
    if len(lists) == 1 and lists[0]:  # rows besides metadata
        return lists[0]
    are_captions = num_known(names, DETECT) < 2 and all(isinstance(value, (str, list)) for value in values)
    if are_captions and ImagePaths(folder, names[:_NUM_PROBED]).found:  # by image, without the extensions
        return _by_image(content)
    columns = [list(value.values()) if isinstance(value, dict) else value for value in values]  # as pandas writes them
    if len(columns) > 1 and all(isinstance(each, list) and len(each) == len(columns[0]) for each in columns):
        return [dict(zip(content, row)) for row in zip(*columns)]
    nested = [value for value in values if isinstance(value, dict)]
    return _objects(nested[0], folder) if len(nested) == 1 else [content]


def _mostly_images(names: list[str]) -> bool:
    return 2 * sum(map(looks_like_image, names)) > len(names)


def _by_image(captions: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {"image": name, **(value if isinstance(value, dict) else {"caption": value})}
        for name, value in captions.items()
    ]
