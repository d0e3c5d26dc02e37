"""Names and content of caption files, beside images and in shards: text with one caption per line, and JSON with tags and facts, too."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from coalign.data.text.captions import CAPTION_FIELDS, caption_values, tag_values, text_encoding, text_lines
from coalign.errors import BadSample

_CAPTION_FIELDS = tuple(name for name in CAPTION_FIELDS if name != "value")
_TAG_FIELDS = ("tags", "keywords")
_NO_FACTS = ("captions", "caption", "text", *_TAG_FIELDS)
_WORD = re.compile(r"\.[^\W\d]+$")  # "0001.caption"


def text_captions(content: bytes) -> list[bytes]:
    """Raw captions of a text file in UTF-8 or UTF-16."""
    if (encoding := text_encoding(content)) != "utf-8-sig":
        with suppress(UnicodeDecodeError):
            content = content.decode(encoding).encode()
    return text_lines(content)


def raw_captions(lines: list[bytes], fields: Mapping[str, Any]) -> list[bytes]:
    """Raw captions of a sample: the lines of its text file, else (if they are blank) those in the fields of its .json file."""
    return lines if any(map(bytes.strip, lines)) else json_captions(fields) or lines


def json_fields(content: bytes, where: str) -> dict[str, Any]:
    """The fields of a .json file; a string or a list of strings are captions. Raises BadSample if it is anything else."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, str) or (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
        value = {"captions": value}
    if not isinstance(value, dict):
        raise BadSample("broken JSON", where)
    return value


def json_captions(fields: Mapping[str, Any]) -> list[bytes]:
    """Raw captions from the first field with text that is named as one of captions; else from the first that is set."""
    lower = {name.lower(): value for name, value in fields.items()}
    found = [caption_values(lower[name]) for name in _CAPTION_FIELDS if lower.get(name) is not None]
    return next((raws for raws in found if any(map(bytes.strip, raws))), found[0] if found else [])


def json_tags(fields: Mapping[str, Any]) -> tuple[str, ...]:
    return next((tag_values(fields[name]) for name in _TAG_FIELDS if fields.get(name) is not None), ())


def json_facts(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The other fields that have a single value."""
    return {
        name: value for name, value in fields.items() if isinstance(value, (str, int, float)) and name not in _NO_FACTS
    }


# ---------------------------------------------------------------- names


def folded(path: str) -> str:
    """A form of the path that ignores case and Unicode normalization, as some file systems do."""
    return unicodedata.normalize("NFC", path).casefold()


def without_words(stem: str) -> str:
    """The path without words after dots: "a/0001.caption" -> "a/0001", but "a/IMG.2020.01" stays."""
    while match := _WORD.search(stem):
        stem = stem[: match.start()]
    return stem
