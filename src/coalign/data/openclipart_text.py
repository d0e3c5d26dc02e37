"""What Open Clip Art's drawings say of themselves: the RDF of an SVG, and the captions, style and tags made of it."""

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

SHARED = 3  # a title or description of this many files is boilerplate, except for the files whose names say the same


@dataclass(frozen=True)
class Metadata:
    """What the RDF block of an SVG says, as written."""

    title: str = ""
    description: str = ""
    creator: str = ""
    keywords: tuple[str, ...] = ()


# ---------------------------------------------------------------- reading


class _Finished(Exception):
    pass


_FIELDS = {("title",): "title", ("description",): "description", ("creator", "Agent", "title"): "creator"}


class _WorkReader:
    """Collects the first cc:Work element of an SVG. Looks at tags and text only, so reads no other file."""

    def __init__(self) -> None:
        self.path: list[str] = []
        self.work: int | None = None  # depth of the Work element
        self.text: list[str] = []
        self.found: dict[str, str] = {}
        self.keywords: list[str] = []

    def start(self, tag: str, _attributes: object) -> None:
        self.path.append(tag.rpartition(" ")[2])
        self.text.clear()
        if self.work is None and self.path[-1] == "Work":
            self.work = len(self.path)

    def characters(self, text: str) -> None:
        if self.work is not None:
            self.text.append(text)

    def end(self, _tag: str) -> None:
        if self.work is not None:
            inside = tuple(self.path[self.work :])
            text = " ".join("".join(self.text).split())
            if not inside:
                raise _Finished
            if inside[0] == "subject" and inside[-1] == "li":
                self.keywords.append(text)
            elif inside in _FIELDS and text:
                self.found.setdefault(_FIELDS[inside], text)
        self.path.pop()
        self.text.clear()

    @staticmethod
    def refuse(*_entity: object) -> None:
        raise BadSample("SVG declares entities")  # they can expand without end, and no caption needs them


def read_metadata(svg: Path) -> Metadata:
    """Title, description, creator and keywords of an SVG's first RDF Work.

    Raises BadSample: "no SVG", "unreadable SVG", "malformed SVG", "SVG declares entities", "SVG without metadata".
    """
    reader = _WorkReader()
    parser = expat.ParserCreate(namespace_separator=" ")
    parser.buffer_text = True
    parser.StartElementHandler = reader.start
    parser.EndElementHandler = reader.end
    parser.CharacterDataHandler = reader.characters
    parser.EntityDeclHandler = reader.refuse
    try:
        with svg.open("rb") as file:
            parser.ParseFile(file)
    except _Finished:
        return Metadata(**reader.found, keywords=tuple(reader.keywords))
    except expat.ExpatError as error:
        raise BadSample("malformed SVG", str(error)) from None
    except FileNotFoundError:
        raise BadSample("no SVG") from None
    except (OSError, ValueError, LookupError) as error:  # no permission, or an encoding that nobody knows
        raise BadSample("unreadable SVG", str(error)) from None
    raise BadSample("SVG without metadata")


# ---------------------------------------------------------------- words

_NOISE = re.compile(r"(hash\s*(\(0x[0-9a-f]+\))?|0x[0-9a-f]+|[\W\d_]*)", re.IGNORECASE)
_CONTACT = re.compile(r"@|://|\bwww\.", re.IGNORECASE)
_DATE = re.compile(r"\b\d{1,2}:\d\d(:\d\d)?\b|^\W*\d{1,4}([-/. ])\d{1,2}\2\d{1,4}\W*$")
_CREDIT = re.compile(r"clip ?art by .{1,60}? - ", re.IGNORECASE)
_THEME = re.compile(
    r"(?:part of the )?(\w+)(?: svg)?[\s-]+(?:icons?[\s-]*)?(?:themes?|icons|iconset|collection)\b.*", re.IGNORECASE
)
_NUMBER = re.compile(r"0\d*[a-z]?|r|")  # what the archive added to tell files apart: 01, 02r


def clean(text: str) -> str:
    """One line without entities, underscores, control characters and twice-encoded UTF-8."""
    text = html.unescape(html.unescape(text))
    try:
        text = text.encode("latin-1").decode("utf-8")  # only UTF-8 that was read as Latin-1 survives this
    except UnicodeError:
        text = text.encode("utf-8", "replace").decode("utf-8")
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Cf", "Co", "Cn") else c for c in text)
    return " ".join(text.replace("_", " ").split())


def words(text: str) -> list[str]:
    """Lower-case words without accents."""
    plain = unicodedata.normalize("NFKD", text.casefold())
    return re.findall(r"[^\W_]+", "".join(c for c in plain if not unicodedata.combining(c)))


def says_something(text: str) -> bool:
    """False for the empty, for leaked program values ("HASH(0x8677e2c)"), numbers, addresses and date lines."""
    return not (_NOISE.fullmatch(text) or _CONTACT.search(text) or _DATE.search(text))


def name_words(stem: str, author: str) -> list[str]:
    """A file name's words, without the number and the (often cut) author that the archive put at its end."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", stem)
    parts = [part for part in re.split(r"[\s_.,;+()\[\]-]+", spaced) if part]
    while len(parts) > 1 and _NUMBER.fullmatch(parts[-1]):
        parts.pop()
    by = words(author)
    for i in range(1, len(parts)):
        tail = words(" ".join(parts[i:]))
        last = len(tail) - 1
        if tail and last < len(by) and tail[:last] == by[:last] and by[last].startswith(tail[last]):
            return parts[:i]
    return parts


def name_caption(file: str, author: str) -> str:
    """A caption from the path of a file: its name; with its folder before it when the name has no word."""
    folder, name = os.path.split(file)
    stem = os.path.splitext(name)[0]
    parts = name_words(stem, author)
    if not re.search(r"[^\W\d_]{3}", " ".join(parts)):
        parts = [*name_words(os.path.basename(folder), ""), *parts]
    return clean(" ".join(parts)) or stem


def _named_after(text: str, file: str, author: str) -> bool:
    """Whether all words of a text are in the file's name, whose last word may be cut.

    Then the text describes this file, however many share it: "Candy" is a caption of candy_10 and of candy_31.
    """
    name = words(" ".join(name_words(os.path.splitext(os.path.basename(file))[0], author)))
    return bool(name) and all(word in name or word.startswith(name[-1]) for word in words(text))


# ---------------------------------------------------------------- what a sample gets


def captions_of(
    file: str, metadata: Metadata, titles: Counter[str], descriptions: Counter[str]
) -> list[tuple[str, str]]:
    """(where from, caption), the most telling first. The counters: how many files share a title, a description."""
    author = clean(metadata.creator)
    title = clean(_CREDIT.sub("", metadata.title, count=1))
    shared = titles[metadata.title] >= SHARED and not _named_after(title, file, author)
    if shared or not says_something(title):
        first = ("file name", name_caption(file, author))
    else:
        first = ("title", title)
    description = clean(metadata.description)
    # A shared description belongs to the file when it speaks of what the caption names ("… image of a light bulb").
    shared = descriptions[metadata.description] >= SHARED and not set(words(first[1])) <= set(words(description))
    if shared or not says_something(description) or words(description) == words(first[1]):
        return [first]
    return [first, ("description", description)]


def style_of(file: str, metadata: Metadata, titles: Counter[str]) -> str:
    """The icon theme, else the author, in lower case; empty when neither is known."""
    for folder in os.path.dirname(file).split("/"):
        if folder.endswith("-theme"):
            return folder.removesuffix("-theme").casefold()
    theme = _THEME.fullmatch(clean(metadata.title)) if titles[metadata.title] >= SHARED else None
    if theme is not None:
        return theme[1].casefold()
    author = re.sub(r"[\[(<].*|\S+@\S+", "", clean(metadata.creator)).strip(" ,;:-")
    return "" if _NOISE.fullmatch(author) else author.casefold()


def tags_of(metadata: Metadata) -> list[str]:
    """The keywords in lower case and in their order, without noise, addresses and the author's name."""
    dropped = (clean(metadata.creator).casefold(), "unsorted")
    tags = (clean(keyword).casefold() for keyword in metadata.keywords)
    return list(dict.fromkeys(tag for tag in tags if says_something(tag) and len(tag) > 1 and tag not in dropped))
