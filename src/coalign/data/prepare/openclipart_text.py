"""Captions, style and tags of Open Clip Art, from the RDF metadata of its SVG files."""

from __future__ import annotations

import html
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from xml.parsers import expat

from coalign.errors import BadSample

MIN_BOILERPLATE = 3  # files with the same title or description, from which it is not specific to a file


@dataclass(frozen=True)
class Metadata:
    """The metadata in the RDF block of an SVG file, not cleaned."""

    title: str = ""
    description: str = ""
    creator: str = ""
    keywords: tuple[str, ...] = ()


# ---------------------------------------------------------------- reading


class _Finished(Exception):
    """Stops the parser."""


_FIELDS = {("title",): "title", ("description",): "description", ("creator", "Agent", "title"): "creator"}


class _WorkReader:
    """Collects the fields of the first cc:Work element of an SVG file. Ignores references to other files."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.work_depth: int | None = None  # of the Work element
        self.text: list[str] = []
        self.fields: dict[str, str] = {}
        self.keywords: list[str] = []

    def start(self, tag: str, _attributes: object) -> None:
        self.path.append(tag.rpartition(" ")[2])
        self.text.clear()
        if self.work_depth is None and self.path[-1] == "Work":
            self.work_depth = len(self.path)

    def characters(self, text: str) -> None:
        if self.work_depth is not None:
            self.text.append(text)

    def end(self, _tag: str) -> None:
        if self.work_depth is not None:
            inside = tuple(self.path[self.work_depth :])
            text = " ".join("".join(self.text).split())
            if not inside:
                raise _Finished
            if inside[0] == "subject" and inside[-1] == "li":
                self.keywords.append(text)
            elif inside in _FIELDS and text:
                self.fields.setdefault(_FIELDS[inside], text)
        self.path.pop()
        self.text.clear()

    @staticmethod
    def reject_entity(*_entity: object) -> None:
        raise BadSample("SVG declares entities")  # which can expand without bound


def read_metadata(svg: Path) -> Metadata:
    """Reads title, description, creator and keywords of the first RDF Work of an SVG file.

    Raises BadSample: "no SVG", "unreadable SVG", "malformed SVG", "SVG declares entities", "SVG without metadata".
    """
    reader = _WorkReader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.EntityDeclHandler = reader.reject_entity
    try:
        with svg.open("rb") as file:
            parser.ParseFile(file)
    except _Finished:
        return Metadata(**reader.fields, keywords=tuple(reader.keywords))
    except expat.ExpatError as error:
        raise BadSample("malformed SVG", str(error)) from None
    except FileNotFoundError:
        raise BadSample("no SVG") from None
    except (OSError, ValueError, LookupError) as error:  # no permission, or an unknown encoding
        raise BadSample("unreadable SVG", str(error)) from None
    raise BadSample("SVG without metadata")


# ---------------------------------------------------------------- text

_NOISE = re.compile(r"(hash\s*(\(0x[0-9a-f]+\))?|0x[0-9a-f]+|[\W\d_]*)", re.IGNORECASE)
_CONTACT = re.compile(r"@|://|\bwww\.", re.IGNORECASE)
_DATE = re.compile(r"\b\d{1,2}:\d\d(:\d\d)?\b|^\W*\d{1,4}([-/. ])\d{1,2}\2\d{1,4}\W*$")
_CREDIT = re.compile(r"clip ?art by .{1,60}? - ", re.IGNORECASE)
_THEME = re.compile(
    r"(?:part of the )?(\w+)(?: svg)?[\s-]+(?:icons?[\s-]*)?(?:themes?|icons|iconset|collection)\b.*", re.IGNORECASE
)
_SUFFIX = re.compile(r"0\d*[a-z]?|r|")  # added by the archive to make file names unique: 01, 02r


def clean(text: str) -> str:
    """Returns the text on one line, without HTML entities, underscores and control characters, and with doubly encoded UTF-8 fixed."""
    text = html.unescape(html.unescape(text))
    try:
        text = text.encode("latin-1").decode("utf-8")  # succeeds only for UTF-8 that was decoded as Latin-1
    except UnicodeError:
        text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") else c for c in text)
    return " ".join(text.replace("_", " ").split())


def words(text: str) -> list[str]:
    """Returns the words of a text in lower case, without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))


def is_informative(text: str) -> bool:
    """Whether a text is more than a number, an address, a date, or a leaked program value such as "HASH(0x8677e2c)"."""
    return not (_NOISE.fullmatch(text) or _CONTACT.search(text) or _DATE.search(text))


def name_words(stem: str, author: str) -> list[str]:
    """Returns the words of a file name, without the number and the (often truncated) author that the archive appended."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", stem)
    parts = [part for part in re.split(r"[\s_.,;+()\[\]-]+", spaced) if part]
    while len(parts) > 1 and _SUFFIX.fullmatch(parts[-1]):
        parts.pop()
    author_words = words(author)
    for i in range(1, len(parts)):
        tail = words(" ".join(parts[i:]))
        last = len(tail) - 1
        if (
            tail
            and last < len(author_words)
            and tail[:last] == author_words[:last]
            and author_words[last].startswith(tail[last])
        ):
            return parts[:i]
    return parts


def name_caption(file: str, author: str) -> str:
    """Returns a caption made of the file name, preceded by the folder name if the file name has no word."""
    folder, name = os.path.split(file)
    stem = os.path.splitext(name)[0]
    parts = name_words(stem, author)
    if not re.search(r"[^\W\d_]{3}", " ".join(parts)):
        parts = [*name_words(os.path.basename(folder), ""), *parts]
    return clean(" ".join(parts)) or stem


def _matches_file_name(text: str, file: str, author: str) -> bool:
    """Whether all words of a text are in the file name, whose last word may be truncated.

    Such a text describes the file even if many files share it, like "Candy" for candy_10 and candy_31.
    """
    name = words(" ".join(name_words(os.path.splitext(os.path.basename(file))[0], author)))
    return bool(name) and all(word in name or word.startswith(name[-1]) for word in words(text))


# ---------------------------------------------------------------- samples


def captions_of(
    file: str, metadata: Metadata, titles: Counter[str], descriptions: Counter[str]
) -> list[tuple[str, str]]:
    """Returns (origin, caption) pairs, the most informative first. `titles` and `descriptions` count the files that share them."""
    author = clean(metadata.creator)
    title = clean(_CREDIT.sub("", metadata.title, count=1))
    boilerplate = titles[metadata.title] >= MIN_BOILERPLATE and not _matches_file_name(title, file, author)
    if boilerplate or not is_informative(title):
        origin, caption = "file name", name_caption(file, author)
    else:
        origin, caption = "title", title
    description = clean(metadata.description)
    # A shared description is not boilerplate if it contains the caption ("… image of a light bulb").
    is_shared = descriptions[metadata.description] >= MIN_BOILERPLATE
    boilerplate = is_shared and not set(words(caption)) <= set(words(description))
    if boilerplate or not is_informative(description) or words(description) == words(caption):
        return [(origin, caption)]
    return [(origin, caption), ("description", description)]


def style_of(file: str, metadata: Metadata, titles: Counter[str]) -> str:
    """Returns the icon theme or else the author, in lower case, or an empty string if both are unknown."""
    for folder in os.path.dirname(file).split("/"):
        if folder.endswith("-theme"):
            return folder.removesuffix("-theme").casefold()
    theme = _THEME.fullmatch(clean(metadata.title)) if titles[metadata.title] >= MIN_BOILERPLATE else None
    if theme is not None:
        return theme[1].casefold()
    author = re.sub(r"[\[(<].*|\S+@\S+", "", clean(metadata.creator)).strip(" ,;:-")
    return "" if _NOISE.fullmatch(author) else author.casefold()


def tags_of(metadata: Metadata) -> list[str]:
    """Returns the informative keywords in lower case, in order, without the name of the author."""
    excluded = (clean(metadata.creator).casefold(), "unsorted")
    tags = (clean(keyword).casefold() for keyword in metadata.keywords)
    return list(dict.fromkeys(tag for tag in tags if is_informative(tag) and len(tag) > 1 and tag not in excluded))
