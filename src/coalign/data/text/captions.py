"""Reading captions and tags from table cells, JSON values and text files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from coalign.errors import BadSample
from coalign.types import Record

MAX_CAPTION_LENGTH = 10_000  # characters; 77 tokens are a few hundred


def raw_bytes(text: str) -> bytes:
    """Returns the bytes that `text` was decoded from, including invalid UTF-8, so that `clean_caption` can reject them."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # an unpaired surrogate from a JSON escape
        return text.encode("utf-8", "surrogatepass")


def caption_values(value: Any) -> list[bytes]:
    """Returns the raw captions in a cell or JSON value: a string, a list of strings, or a string with a JSON list of strings."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return []
    if isinstance(value, (list, tuple)):
        return [caption for item in value for caption in caption_values(item)]
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, str) and (items := _json_strings(value)) is not None:
        return [raw_bytes(item) for item in items]
    return [raw_bytes(str(value))]


def tag_values(value: Any) -> tuple[str, ...]:
    """Returns the tags in a cell or JSON value: a list, a JSON list, or a string separated by commas, semicolons or bars."""
    if isinstance(value, str):
        items = _json_strings(value)
        if items is None:
            items = value.replace(";", ",").replace("|", ",").split(",")
    else:
        items = [raw.decode("utf-8", "backslashreplace") for raw in caption_values(value)]
    return tuple(tag for item in items if (tag := printable(item).strip()))


def printable(text: str) -> str:
    """Escapes the bytes of a file name that are not UTF-8, so that it can be printed or written as JSON."""
    return raw_bytes(text).decode("utf-8", "backslashreplace")


def _json_strings(text: str) -> list[str] | None:
    if not text.lstrip().startswith("["):
        return None
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return items if isinstance(items, list) and all(isinstance(item, str) for item in items) else None


def make_record(
    key: str,
    raws: Iterable[bytes],
    tags: tuple[str, ...] = (),
    facts: Mapping[str, Any] | None = None,
    missing: str = "",
) -> Record:
    """Returns a record with the usable captions of `raws`. `missing` says what is missing if there are none, such as a file.

    If no caption is usable, the record has none if `raws` or its first caption is empty; else raises BadSample with the first one's reason.
    """
    facts = facts or {}
    try:
        return Record(key, clean_captions(raws, missing), tags, facts)
    except BadSample as bad:
        if bad.reason not in ("no caption", "empty caption"):
            raise
        return Record(key, (), tags, facts, no_caption=(bad.reason, bad.detail))


def require_captions(record: Record) -> tuple[str, ...]:
    """Returns the record's captions. Raises BadSample if it has none."""
    if not record.captions:
        raise BadSample(*record.no_caption)
    return record.captions


def clean_captions(raws: Iterable[bytes], missing: str = "") -> tuple[str, ...]:
    """Returns the usable captions, cleaned. If there are none, raises BadSample with the reason of the first, or "no caption"."""
    usable: list[str] = []
    first_error: BadSample | None = None
    for raw in raws:
        try:
            usable.append(clean_caption(raw))
        except BadSample as error:
            first_error = first_error or error
    if not usable:
        raise first_error or BadSample("no caption", missing)
    return tuple(usable)


def text_lines(content: bytes) -> list[bytes]:
    """Splits a text file into captions, one per line. An empty file is one empty caption."""
    return content.splitlines() or [b""]


def clean_caption(raw: bytes | str) -> str:
    """Collapses whitespace. Raises BadSample: "caption is not UTF-8", "caption contains NUL", "empty caption" or "caption too long"."""
    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        text.encode("utf-8")  # a str may contain unpaired surrogates, from undecodable bytes or JSON escapes
    except UnicodeError:
        raise BadSample("caption is not UTF-8", repr(raw[:80])) from None
    if "\0" in text:
        raise BadSample("caption contains NUL", repr(text[:80]))
    text = " ".join(text.removeprefix("\ufeff").split())
    if not any(character.isprintable() and character != " " for character in text):
        raise BadSample("empty caption", repr(text[:80]) if text else "")
    if len(text) > MAX_CAPTION_LENGTH:
        raise BadSample("caption too long", f"{len(text):,} characters, more than {MAX_CAPTION_LENGTH:,}: {text[:80]}…")
    return text
