"""Tables as text: rows of cells with a separator between them, quoted as in CSV or not at all.

Quotation marks are what tables get wrong most often. A quoted field ends at a quotation mark that a separator or the end of the line
follows; anything else is text. A field may span lines, unless one of them is a row of its own: then the opening mark is text, too.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO

from coalign.config import DataConfig
from coalign.data.sources.tables.columns import Columns, choose_columns, image_name, looks_like_image, num_known
from coalign.data.sources.tables.files import open_text
from coalign.data.text.captions import printable
from coalign.errors import BadSample, UserError

_SEPARATORS = ",\t;|"
_SEPARATOR_NAMES = {"\\t": "\t", "tab": "\t", "space": " "}
_MAX_SPAN = 200  # lines of one row
_ESCAPED = re.compile(r'(?:\\|"(?="))(["\\])')  # in a quoted field with backslashes
_HEAD = 100  # rows from which a table without a header is understood

Cells = list[str]


@dataclass(frozen=True)
class _Layout:
    separator: str
    columns: Columns
    names: Cells
    header: Cells | None  # the cells of the header; None: the first line is a row
    header_line: int  # the rows start after it
    shapes: frozenset[str] = frozenset()  # of image names without an extension, as returned by `_shape`

    @property
    def image(self) -> int:
        return self.names.index(self.columns.image)

    @property
    def ends_with_caption(self) -> bool:
        return self.columns.captions == (self.names[-1],)


def read_csv(path: Path, reading: DataConfig) -> tuple[Columns, Iterator[tuple[str, dict[str, str] | BadSample]]]:
    """Returns the columns of a table, and (where, row) of each row. Raises UserError if there is no image or no caption column."""
    layout = _layout(path, reading)
    return layout.columns, _rows(path, layout)


# ---------------------------------------------------------------- rows


def _rows(path: Path, layout: _Layout) -> Iterator[tuple[str, dict[str, str] | BadSample]]:
    splitter = _Splitter(layout, path.parent)
    with open_text(path) as text:
        lines = (line for line in _lines(text) if line[0] > layout.header_line)
        for number, cells in splitter.records(splitter.split_at_returns(lines)):
            where = f"{printable(path.name)} line {number}"
            if not any(cell.strip() for cell in cells) or (
                layout.header is not None and _trimmed(cells) == layout.header
            ):
                continue
            fitted = splitter.fit(cells)
            if fitted is None:
                yield (
                    where,
                    BadSample("wrong number of columns", f"{where} has {len(cells)}, expected {len(layout.names)}"),
                )
            else:
                yield where, dict(zip(layout.names, map(str.strip, fitted)))


def _lines(text: IO[str]) -> Iterator[tuple[int, str]]:
    """Yields (number, line) without line ends; the first line is 1."""
    for number, line in enumerate(text, start=1):
        yield number, line.rstrip("\r\n")


class _Splitter:
    """Splits the lines of one table into the cells of its rows."""

    def __init__(self, layout: _Layout, folder: Path) -> None:
        self.layout, self.folder = layout, folder

    def split_at_returns(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
        """Splits lines at carriage returns before a row; others are spaces."""
        for number, line in lines:
            joined, *parts = line.split("\r")
            for part in parts:
                if self._is_row(part):
                    yield number, joined
                    joined = part
                else:
                    joined = f"{joined} {part}"
            yield number, joined

    def records(self, lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, Cells]]:
        """Yields (number of the first line, cells) of each row. Blank lines and comments are no rows."""
        ahead: deque[tuple[int, str]] = deque()
        while True:
            number, line = ahead.popleft() if ahead else next(lines, (0, ""))
            if not number:
                return
            separator, expected = self.layout.separator, len(self.layout.names)
            cells, opened = split(line, separator)
            if not line.strip() or (line.startswith("#") and opened is None and not self._is_row(line)):
                continue
            if opened is not None:
                cells = self._join(line, opened, ahead, lines)
            elif 1 < len(cells) != expected == line.count(separator) + 1:  # its quotation marks are text
                cells = line.split(separator)
            elif len(cells) > expected and f"\\{separator}" in line:  # separators with a backslash are text
                parts = re.split(rf"(?<!\\){re.escape(separator)}", line)
                cells = [part.replace(f"\\{separator}", separator) for part in parts]
            yield number, cells

    def _join(self, line: str, opened: int, ahead: deque[tuple[int, str]], lines: Iterator[tuple[int, str]]) -> Cells:
        """Cells of the row that starts with `line`, in which the field at `opened` is open; removes its other lines from `ahead`.

        The quotation mark is text if there is no closing one, or if the field would contain a whole row.
        """
        separator = self.layout.separator
        first_is_row = self._is_row(line)
        joined, still_open = line, True
        for span in range(1, _MAX_SPAN):
            if len(ahead) < span and (fetched := next(lines, None)):
                ahead.append(fetched)
            if len(ahead) < span:
                break
            following, start = ahead[span - 1][1], len(joined) + 1
            joined = f"{joined}\n{following}"
            closes = False
            if _patterns(separator).closing.search(following):
                if not _is_quoted(joined, opened, separator):
                    break
                cells, open_field = split(joined, separator)
                still_open, closes = open_field is not None, open_field is None or open_field > start
            # a line that closes a field may look like a row if the image comes after the field
            if self._is_row(following) and (first_is_row or not closes):
                break
            if not still_open:
                for _ in range(span):
                    ahead.popleft()
                return cells
        return split(line, separator, open_is_text=True)[0]

    def _is_row(self, line: str) -> bool:
        """Whether a line is a row on its own: its cell in the image column is the name of an image or a file, or is like the others."""
        cells = split(line, self.layout.separator, open_is_text=True)[0]
        if len(cells) < min(2, len(self.layout.names)) or len(cells) <= self.layout.image:
            return False
        name = image_name(cells[self.layout.image])
        if looks_like_image(name) or _shape(name) in self.layout.shapes:
            return True
        return bool(name) and os.path.isfile(os.path.join(self.folder, name))

    def fit(self, cells: Cells) -> Cells | None:
        """Fits the cells of a row to the columns; None if that is not possible without guessing.

        Empty cells at the end are dropped; so are missing ones, unless they are the image or the captions. If the captions are in the
        last column, they contain the separators that are too many.
        """
        layout = self.layout
        expected = len(layout.names)
        if len(cells) == 1 < expected:  # the whole row is quoted
            cells = split(cells[0], layout.separator, open_is_text=True)[0]
        while len(cells) > expected and not cells[-1].strip():
            cells = cells[:-1]
        if len(cells) > expected and layout.ends_with_caption:
            cells = [*cells[: expected - 1], layout.separator.join(cells[expected - 1 :])]
        missing = layout.names[len(cells) :]
        captions = layout.columns.captions
        if len(cells) > expected or layout.columns.image in missing or (captions and set(captions) <= {*missing}):
            return None
        return [*cells, *[""] * len(missing)]


@dataclass(frozen=True)
class _Patterns:
    """Regular expressions for the fields of a table with a given separator. Group 2 is the separator, or empty at the end."""

    opening: re.Pattern[str]
    closing: re.Pattern[str]
    quoted: re.Pattern[str]  # a quotation mark in the field is doubled
    escaped: re.Pattern[str]  # or preceded by a backslash
    unclosed: re.Pattern[str]
    plain: re.Pattern[str]


@cache
def _patterns(separator: str) -> _Patterns:
    end = rf"({re.escape(separator)}|\Z)"
    space, doubled = r"[^\S\n\t]*", r'[^"]*+(?:""[^"]*+)*+'
    return _Patterns(
        re.compile(rf'{space}"'),
        re.compile(rf'"{space}{end}'),
        re.compile(rf'({doubled})"{space}{end}'),
        re.compile(rf'((?:[^"\\]|""|\\.)*+)"{space}{end}', re.DOTALL),
        re.compile(rf"{doubled}\Z"),
        re.compile(rf"(.*?){end}", re.DOTALL),
    )


def split(text: str, separator: str, open_is_text: bool = False) -> tuple[Cells, int | None]:
    """Splits a row at its separators. Returns its cells, and where its last field starts if that is quoted and still open, else None.

    If `open_is_text`, such a quotation mark is text.
    """
    if '"' not in text:
        return text.split(separator), None
    patterns = _patterns(separator)
    cells: Cells = []
    position = 0
    while True:
        match = None
        if opening := patterns.opening.match(text, position):
            if match := patterns.quoted.match(text, opening.end()):
                cells.append(match[1].replace('""', '"'))
            elif match := patterns.escaped.match(text, opening.end()):
                cells.append(_ESCAPED.sub(r"\1", match[1]))
            elif patterns.unclosed.match(text, opening.end()) and not open_is_text:
                return cells, position
        if match is None:
            match = patterns.plain.match(text, position)
            assert match is not None
            cells.append(match[1])
        if not match[2]:
            return cells, None
        position = match.end()


def _is_quoted(text: str, position: int, separator: str) -> bool:
    """Whether the field at `position`, which starts with a quotation mark, is quoted, or may be, together with more lines."""
    patterns = _patterns(separator)
    opening = patterns.opening.match(text, position)
    rest = (patterns.quoted, patterns.escaped, patterns.unclosed)
    return opening is not None and any(pattern.match(text, opening.end()) for pattern in rest)


# ---------------------------------------------------------------- layout


def _layout(path: Path, reading: DataConfig) -> _Layout:
    """Detects the separator and the columns from the first lines."""
    given = reading.separator
    if given is not None:
        given = _SEPARATOR_NAMES.get(given.lower(), given)
        if not given or given in '"\n\r':
            raise UserError(f"--separator is {reading.separator!r}, but must be a character such as ';' or '\\t'.")
    lines: list[tuple[int, str]] = []
    with open_text(path) as text:
        for number, line in _lines(text):
            if (match := re.fullmatch(r'"?sep=(.)"?\1*', line)) and not lines:  # written by Excel
                given = given or match[1]
            elif line.strip():
                lines.append((number, line))
            if len(lines) == _HEAD:
                break
    separators = [given] if given else list(_SEPARATORS)
    while len(lines) > 1 and lines[0][1].startswith("#"):  # a comment, unless it is the header
        if max(_score(lines[0][1], each, reading)[0] for each in separators) > 1:
            break
        lines.pop(0)
    head = lines[0][1] if lines else ""
    # The separator with the most known column names or images; ties go to the one with the most columns.
    best = max(separators, key=lambda each: _score(head, each, reading))
    names = _header(head, best)
    if any(map(looks_like_image, names)):
        return _without_header(path, best, names, lines, reading)
    if not given and looks_like_image(head.split(maxsplit=1)[0] if head.split() else ""):
        return _without_header(path, " ", head.split(maxsplit=1), lines, reading)
    if lines and not _score(head, best, reading)[0]:
        first_rows = {separator: _first_row(lines, separator) for separator in separators}
        images = {each: min(map(len, filter(looks_like_image, row)), default=0) for each, row in first_rows.items()}
        if any(images.values()):
            separator = min((each for each in separators if images[each]), key=lambda each: images[each])
            return _without_header(path, separator, first_rows[separator], lines, reading)
    return _with_header(path, best, names, lines, reading)


def _with_header(
    path: Path, separator: str, header: Cells, lines: Sequence[tuple[int, str]], reading: DataConfig
) -> _Layout:
    """The layout of a table whose first line has the names of the columns."""
    names = _unique(header)
    columns = choose_columns(printable(path.name), names, reading)
    image = names.index(columns.image)
    rows = [split(line, separator, open_is_text=True)[0] for _, line in lines[1:]]
    if rows and image == 0 and all(len(row) == len(names) + 1 and looks_like_image(row[1]) for row in rows):
        names, image = _unique(["", *header]), 1  # R writes no name above the names of the rows
    found = (image_name(row[image]) for row in rows if len(row) == len(names))
    shapes = frozenset(_shape(name) for name in found if re.search(r"\d", name) and not re.search(r"\s", name))
    return _Layout(separator, columns, names, header, lines[0][0] if lines else 0, shapes)


def _shape(name: str) -> str:
    return re.sub(r"\d+", "0", name)


def _first_row(lines: Sequence[tuple[int, str]], separator: str) -> Cells:
    """The cells of the first row, which may span lines."""
    joined = lines[0][1]
    cells, opened = split(joined, separator)
    for _, line in lines[1:]:
        if opened is None:
            break
        joined = f"{joined}\n{line}"
        cells, opened = split(joined, separator)
    return cells


def _without_header(
    path: Path, separator: str, first: Cells, lines: Sequence[tuple[int, str]], reading: DataConfig
) -> _Layout:
    """The layout of a table whose first line is a row: the column of image names, and the columns of several words or the wordiest."""
    image = next(column for column, cell in enumerate(first) if looks_like_image(cell))
    names = [f"column {column + 1}" for column in range(max(image + 1, 2))]
    layout = _Layout(separator, Columns(names[image], ()), names, None, 0)
    rows = [cells for _, cells in _Splitter(layout, path.parent).records(iter(lines))]
    rows = [cells for cells in rows if len(cells) > image and looks_like_image(cells[image])]
    if len(lines) == _HEAD and len(rows) > 1:
        rows.pop()  # may go on after the last of these lines
    width, frequency = Counter(map(len, rows)).most_common(1)[0]
    if frequency < 0.9 * len(rows):  # the captions, which are in the last column, contain separators
        width = max(min(map(len, rows)), 2)
    if separator == " ":
        width = 2
    words = {
        column: sum(len(cells[column].split()) for cells in rows if len(cells) > column) / len(rows)
        for column in range(width)
        if column != image
    }
    captions = [column for column in words if words[column] >= 3] or sorted(words, key=lambda each: -words[each])[:1]
    names = [f"column {column + 1}" for column in range(max(width, image + 1))]
    for place, column in enumerate(captions, start=1):
        names[column] = f"caption_{place}" if len(captions) > 1 else "caption"
    names[image] = "image"
    return _Layout(separator, choose_columns(printable(path.name), names, reading), names, None, lines[0][0] - 1)


def _header(line: str, separator: str) -> Cells:
    cells = _trimmed(split(line.lstrip("#"), separator, open_is_text=True)[0])
    if len(cells) == 1 and separator in cells[0]:  # the whole line is quoted
        cells = _trimmed(cells[0].split(separator))
    return cells if any(cells) else []


def _trimmed(cells: Cells) -> Cells:
    """Cells without spaces around them and without empty ones at the end."""
    cells = [cell.strip() for cell in cells]
    while cells and not cells[-1]:
        cells.pop()
    return cells


def _unique(names: Cells) -> Cells:
    """Names the columns without a name, and numbers those of the same name."""
    unique: Cells = []
    for column, name in enumerate(names, start=1):
        name = name or f"column {column}"
        count = 1
        numbered = name
        while numbered in unique:
            count += 1
            numbered = f"{name}_{count}"
        unique.append(numbered)
    return unique


def _score(line: str, separator: str, reading: DataConfig) -> tuple[int, int]:
    names = _header(line, separator)
    return num_known(names, reading) + sum(map(looks_like_image, names)), len(names)
