"""Reading captions and tags from table cells, JSON values and text files."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from coalign.errors import BadSample
from coalign.types import Record

MAX_CAPTION_LENGTH = 10_000  # characters; 77 tokens are a few hundred
MAX_COLLECTION_LENGTH = 200_000  # characters of a list of captions in a cell
_FIELD_NAMES = (
    "caption captions text texts raw sentence sentences description alt_text prompt comment value content title"
)
CAPTION_FIELDS = tuple(_FIELD_NAMES.split())  # fields of an object that hold its caption, the first that is there
_PROMPTING = ("human", "user", "system")  # who does not write captions, in conversations such as LLaVA's
# how tables write that a cell is empty: the defaults of pandas, SQL and R
_MISSING = frozenset({"nan", "NaN", "None", "NULL", "null", "<NA>", "NA", "N/A", "n/a", "#N/A", "\\N"})
_TAG_FIELDS = ("tags", "tag", "name", "label", "text", "value")


def raw_bytes(text: str) -> bytes:
    """Returns the bytes that `text` was decoded from, including invalid UTF-8, so that `clean_caption` can reject them."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # an unpaired surrogate from a JSON escape
        return text.encode("utf-8", "surrogatepass")


def is_missing(value: Any) -> bool:
    """Whether a cell or JSON value stands for none: None, NaN, or how these are written, such as "nan" or "NULL"."""
    return (
        value is None
        or (isinstance(value, float) and math.isnan(value))
        or (isinstance(value, str) and value.strip() in _MISSING)
    )


def caption_values(value: Any) -> list[bytes]:
    """Returns the raw captions in a cell or JSON value: a string, a (nested) list, an object, or a string with a list or object.

    Of an object, only the field with the caption is read ("caption", "text", "raw", …), or all values but numbers if it has no such
    field. Of a conversation, the captions are what the model says. See `parse_collection` for lists in strings. Raises BadSample if
    lists are nested too deeply.
    """
    if is_missing(value):
        return []
    if isinstance(value, str) and (collection := parse_collection(value)) is not None:
        value = collection
    if isinstance(value, Mapping):
        if value.get("from", value.get("role")) in _PROMPTING:
            return []
        value = _fields(value, CAPTION_FIELDS) or [
            each for each in value.values() if not isinstance(each, (int, float))
        ]
    if isinstance(value, (list, tuple)):
        try:
            return [caption for item in value for caption in caption_values(item)]
        except RecursionError:
            raise BadSample("captions are nested too deeply") from None
    if isinstance(value, bytes):
        return [value]
    return [raw_bytes(str(value))]


def tag_values(value: Any) -> tuple[str, ...]:
    """Returns the tags in a cell or JSON value: as captions are read, or a string separated by commas, semicolons or bars.

    Of an object, the tags are the field "tag", "name", "label" or "text", else its names: {"red": 0.9}.
    """
    if isinstance(value, str):
        collection = parse_collection(value)
        value = _split_tags(value) if collection is None else collection
    if isinstance(value, Mapping):
        value = _fields(value, _TAG_FIELDS) or list(value)
    if isinstance(value, (list, tuple)):
        items = [item for each in value for item in ((each,) if isinstance(each, str) else tag_values(each))]
    else:
        items = [raw.decode("utf-8", "backslashreplace") for raw in caption_values(value)]
    return tuple(tag for item in items if (tag := printable(item).strip()))


def _split_tags(text: str) -> list[str]:
    text = text.strip()
    if text[:1] + text[-1:] == "[]":  # a list without quotes
        text = text[1:-1]
    return text.replace(";", ",").replace("|", ",").split(",")


def _fields(value: Mapping[str, Any], known: Sequence[str]) -> list[Any]:
    """Returns the value of the first field of `known`, in a list; an empty list if there is none."""
    lower = {str(name).lower(): name for name in value}
    return next(([value[lower[name]]] for name in known if name in lower), [])


def text_encoding(head: bytes) -> str:
    """Returns the encoding of a text that starts with `head`: UTF-8, or UTF-16 by its byte order mark or by zero bytes."""
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    if 4 * head[1::2].count(0) > len(head):
        return "utf-16-le"
    return "utf-16-be" if 4 * head[::2].count(0) > len(head) else "utf-8-sig"


def printable(text: str) -> str:
    """Escapes the bytes of a file name that are not UTF-8, so that it can be printed or written as JSON."""
    return raw_bytes(text).decode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- lists in strings

_STRING = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
# what NumPy and Python print that is no literal: "array(", "np.str_(", "deque(", ", dtype=object)", "nan", "...", and strings and lists
# without commas between them
_CALL = r"(?:(?:np|numpy)\.)?(?:array|str_|list|tuple|set|frozenset|deque)\("
_PRINTED = re.compile(
    rf"(?P<item>{_STRING}|\])(?P<gap>\s+(?:\.\.\.\s+)?(?=['\"\[(]))?|(?P<call>\b{_CALL})|(?P<dtype>,\s*dtype=[^()\[\]]*\))|(?P<nan>\bnan\b)",
    re.DOTALL,
)
_OPENING = re.compile(rf"(?:{_CALL})?[\[({{]")
_QUOTATION_MARKS = (
    ('""', '""'),
    ('\\"', '\\"'),
    ("\\'", "\\'"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
    ("‘", "’"),
    ("„", "“"),
    ("«", "»"),
)


def parse_collection(text: str) -> list[Any] | dict[Any, Any] | None:
    """Parses a string that is a list or an object of strings, as printed by JSON, Python or NumPy; None if it is neither.

    '["a", "b"]', "['a', 'b']", "('a', 'b')", "{'a', 'b'}", "['a' 'b']", "array(['a', 'b'], dtype=object)", '[{"caption": "a"}]',
    "['it's', 'b']". A caption that merely starts with a bracket is none of these. Nothing is evaluated but literals.
    """
    text = text.strip()
    if text.startswith('"') and text.endswith('"') and len(text) > 1:  # quoted once more
        text = text[1:-1].strip()
    if len(text) > MAX_COLLECTION_LENGTH or not _OPENING.match(text) or text[-1] not in "])}":
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _parse_literal(text)
        if value is None:
            value = _split_quoted(text)
    if isinstance(value, (set, frozenset)):
        value = sorted(value, key=lambda item: text.find(repr(item)))
    if isinstance(value, tuple):
        value = list(value)
    try:
        return value if isinstance(value, (list, dict)) and _holds_strings(value) else None
    except RecursionError:
        return None


def _parse_literal(text: str) -> Any:
    """Parses literals of Python, also as NumPy prints them; None if `text` is anything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" is not an escape sequence
            return ast.literal_eval(_PRINTED.sub(_to_python, text))
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


def _to_python(match: re.Match[str]) -> str:
    replacements = {"call": "(", "dtype": ")", "nan": "None"}
    return replacements.get(match.lastgroup or "") or match["item"] + (", " if match["gap"] else "")


def _split_quoted(text: str) -> list[str] | None:
    """Splits a list of several quoted strings whose quotation marks inside are not escaped, or are typographic; None if it is none."""
    inner = text[1:-1].strip().rstrip(",").rstrip()
    for opening, closing in _QUOTATION_MARKS:
        if inner.startswith(opening) and inner.endswith(closing) and len(inner) > len(opening):
            items = re.split(
                rf"{re.escape(closing)}\s*[,;]\s*{re.escape(opening)}", inner[len(opening) : -len(closing)]
            )
            return items if len(items) > 1 and all(items) else None
    return None


def _holds_strings(value: Any) -> bool:
    """Whether a list is empty or holds strings, possibly besides missing values, or lists or objects that do."""
    if isinstance(value, dict):
        return bool(value) and all(isinstance(name, (str, int)) for name in value)
    items = [item for item in value if not (item is None or (isinstance(item, float) and math.isnan(item)))]
    return bool(items or not value) and all(
        isinstance(item, (str, bytes)) or (isinstance(item, (list, tuple, dict)) and _holds_strings(item))
        for item in items
    )


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
    usable, errors = _cleaned(raws)
    if usable:
        unusable = tuple(error.reason for error in errors if error.reason != "empty caption")
        return Record(key, usable, tags, facts, unusable=unusable)
    bad = errors[0] if errors else BadSample("no caption", missing)
    if bad.reason not in ("no caption", "empty caption"):
        raise bad
    return Record(key, (), tags, facts, no_caption=(bad.reason, bad.detail))


def require_captions(record: Record) -> tuple[str, ...]:
    """Returns the record's captions. Raises BadSample if it has none."""
    if not record.captions:
        raise BadSample(*record.no_caption)
    return record.captions


def clean_captions(raws: Iterable[bytes]) -> tuple[str, ...]:
    """Returns the usable captions, cleaned. If there are none, raises BadSample with the reason of the first, or "no caption"."""
    usable, errors = _cleaned(raws)
    if not usable:
        raise errors[0] if errors else BadSample("no caption")
    return usable


def _cleaned(raws: Iterable[bytes]) -> tuple[tuple[str, ...], list[BadSample]]:
    """Returns the usable captions, cleaned, and why the others are not usable."""
    usable: list[str] = []
    errors: list[BadSample] = []
    for raw in raws:
        try:
            usable.append(clean_caption(raw))
        except BadSample as error:
            errors.append(error)
    return tuple(usable), errors


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
