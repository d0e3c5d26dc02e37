"""One self-contained HTML page: prose, tables, figures and galleries. No scripts, no network, everything escaped."""

from __future__ import annotations

import base64
import html
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from coalign.errors import UserError
from coalign.files import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LONGEST_CAPTION = 300  # characters shown; real data has captions of a megabyte
LARGEST_THUMBNAIL = 320  # pixels
DPI = 160  # of figures, which are displayed at 100 DPI, so that they are sharp on high-resolution screens and in print
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_NUMERIC = re.compile(
    r"[-+−±≈<>~]?\s*[\d.,]+(e[-+]?\d+)?\s*(%|×|MB|GB|[kM]|(s|min|h|d)(\s\d+ (s|min|h))?)?(\s*\(.*\))?"
)


@dataclass(frozen=True)
class GalleryCell:
    """One cell of a gallery. `good` marks it right or wrong; None leaves it unmarked. With `image` None it is text only."""

    image: np.ndarray | None  # uint8 [height, width, 3], or [height, width] for gray
    caption: str
    good: bool | None = None
    note: str = ""  # a short value beside the mark, such as a rank or a similarity


class Page:
    """A report, built from top to bottom and written once."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._parts: list[str] = []
        self._sections: list[str] = []
        self._pngs: dict[str, bytes] = {}

    def section(self, title: str, text: str = "") -> None:
        self._sections.append(title)
        self._parts.append(f'<h2 id="section-{len(self._sections)}">{escape(title)}</h2>')
        if text:
            self.text(text)

    def text(self, paragraph: str) -> None:
        self._parts.append(f"<p>{escape(paragraph)}</p>")

    def verdict(self, sentence: str) -> None:
        """The headline sentence."""
        self._parts.append(f'<p class="verdict">{escape(sentence)}</p>')

    def numbers(self, tiles: Sequence[tuple[str, str, str]]) -> None:
        """Key values side by side: (label, value, small print)."""
        cells = "".join(
            f'<div class="tile"><div class="label">{escape(label)}</div><div class="value">{escape(value)}</div>'
            f'<div class="note">{escape(note)}</div></div>'
            for label, value, note in tiles
        )
        self._parts.append(f'<div class="tiles">{cells}</div>')

    def table(self, header: Sequence[str], rows: Sequence[Sequence[object]], caption: str = "") -> None:
        head = "".join(f"<th>{escape(name)}</th>" for name in header)
        body = "".join("<tr>" + "".join(_table_cell(value) for value in row) + "</tr>" for row in rows)
        if not rows:
            body = f'<tr><td colspan="{max(1, len(header))}" class="quiet">none</td></tr>'
        head = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
        legend = f"<caption>{escape(caption)}</caption>" if caption else ""
        self._parts.append(f'<div class="wide"><table>{legend}{head}<tbody>{body}</tbody></table></div>')

    def figure(self, figure: Figure | bytes, caption: str = "", name: str | None = None) -> None:
        """A matplotlib figure or a PNG's bytes; with a `name`, it is also written beside the page as `name`.png."""
        png = figure if isinstance(figure, bytes) else _png_of_figure(figure)
        if name is not None:
            if not re.fullmatch(r"[\w][\w.-]*", name) or name in self._pngs:
                raise ValueError(f"a figure needs a plain file name that is used once, not {name!r}")
            self._pngs[name] = png
        legend = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        width = round(int.from_bytes(png[16:20], "big") * 100 / DPI)  # a PNG's first chunk begins with its width
        picture = f'<img src="{_data_uri(png, "png")}" width="{width}" alt="{escape(caption or name or "")}">'
        self._parts.append(f"<figure>{picture}{legend}</figure>")

    def gallery(self, cells: Sequence[GalleryCell], columns: int = 6, wide: bool = False) -> None:
        """Images in a grid of at most `columns`, fewer on a narrow screen. wide: they keep their shape, else they are shown as squares."""
        if not cells:
            self._parts.append('<p class="quiet">none</p>')
            return
        shown = "".join(_gallery_cell(cell) for cell in cells)
        kind = "gallery wide-cells" if wide else "gallery"
        self._parts.append(f'<div class="{kind}" style="--columns:{max(1, columns)}">{shown}</div>')

    def ranking(self, query: GalleryCell, answers: Sequence[GalleryCell]) -> None:
        """A query on the left, its results on the right, best first: images side by side, captions as a list."""
        if all(answer.image is None for answer in answers):
            items = "".join(
                f'<li class="{_tone(answer)}"><span class="mark">{_mark(answer)}</span>'
                f'<span class="caption" dir="auto">{_caption(answer.caption)}</span>'
                f'<span class="note">{escape(answer.note)}</span></li>'
                for answer in answers
            )
            right = f"<ol>{items}</ol>"
        else:
            shown = "".join(_gallery_cell(answer) for answer in answers)
            right = f'<div class="gallery" style="--columns:{max(5, len(answers))}">{shown}</div>'
        kind = "words" if query.image is None else "picture"
        self._parts.append(f'<div class="ranking {kind}"><div class="query">{_gallery_cell(query)}</div>{right}</div>')

    def side_by_side(self, query: GalleryCell, results: Mapping[str, tuple[str, Sequence[GalleryCell]]]) -> None:
        """A query, and for each name its results in a row of images, best first, under the name and a remark."""
        sides = "".join(
            f'<div class="side"><div class="name">{escape(name)} <span class="note">{escape(remark)}</span></div>'
            f'<div class="gallery" style="--columns:{max(1, len(cells))}">{"".join(map(_gallery_cell, cells))}</div></div>'
            for name, (remark, cells) in results.items()
        )
        self._parts.append(f'<div class="versus"><div class="query">{_gallery_cell(query)}</div>{sides}</div>')

    def commands(self, lines: Sequence[str]) -> None:
        """Commands for a terminal."""
        self._parts.append(f"<pre>{escape(chr(10).join(lines))}</pre>")

    def html(self) -> str:
        """The whole page."""
        style = files("coalign.report").joinpath("page.css").read_text(encoding="utf-8")
        links = "".join(f'<a href="#section-{i}">{escape(name)}</a>' for i, name in enumerate(self._sections, 1))
        nav = f'<nav aria-label="Sections">{links}</nav>' if len(self._sections) > 2 else ""
        subtitle = f'<p class="subtitle">{escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            '<meta name="color-scheme" content="light dark">'
            f"<title>{escape(self.title)}</title><style>{style}</style></head>\n<body><main>\n"
            f"<header><h1>{escape(self.title)}</h1>{subtitle}{nav}</header>\n"
            + "\n".join(self._parts)
            + "\n</main></body></html>\n"
        )

    def write(self, path: Path) -> None:
        """Writes the page and, beside it, its named figures, each atomically."""
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for name, png in self._pngs.items():
                write_bytes(path.parent / f"{name}.png", png)
            write_text(path, self.html())
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"Cannot write the report to {path}: {reason}; choose another path.") from error


def escape(value: object) -> str:
    """Text for HTML, with control characters and lone surrogates shown as a replacement mark."""
    return html.escape(_UNPRINTABLE.sub("\ufffd", str(value)), quote=True)


def _caption(text: str) -> str:
    text = text if len(text) <= LONGEST_CAPTION else text[:LONGEST_CAPTION].rstrip() + "…"
    return escape(" ".join(text.split()))


def _tone(cell: GalleryCell) -> str:
    return "plain" if cell.good is None else "good" if cell.good else "bad"


def _mark(cell: GalleryCell) -> str:
    """Hits and misses differ in symbol as well as color, for print and for color-blind readers."""
    return "" if cell.good is None else '<span title="right">✓</span>' if cell.good else '<span title="wrong">✗</span>'


def _gallery_cell(cell: GalleryCell) -> str:
    picture = "" if cell.image is None else f'<img src="{_thumbnail(cell.image)}" alt="{_caption(cell.caption)}">'
    note = f'<span class="note">{escape(cell.note)}</span>' if cell.note else ""
    mark = f'<span class="mark">{_mark(cell)}</span>' if cell.good is not None else ""
    line = f'<div class="line">{mark}{note}</div>' if mark or note else ""
    words = f'<div class="caption" dir="auto">{_caption(cell.caption)}</div>'
    return f'<div class="cell {_tone(cell)}">{picture}{line}{words}</div>'


def _table_cell(value: object) -> str:
    if value is None:
        return '<td class="quiet">–</td>'
    if isinstance(value, (bool, np.bool_)):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (int, np.integer)):
        return f'<td class="number">{int(value):,}</td>'
    if isinstance(value, (float, np.floating)):
        return f'<td class="number">{float(value):.4g}</td>'
    number = ' class="number"' if _NUMERIC.fullmatch(str(value)) else ""
    return f'<td{number} dir="auto">{escape(value)}</td>'


def _png_of_figure(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():  # captions may contain glyphs that no installed font has
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()


def _thumbnail(pixels: np.ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(pixels, dtype=np.uint8)).convert("RGB")
    image.thumbnail((LARGEST_THUMBNAIL, LARGEST_THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if max(image.size) <= 96:  # small images are shown enlarged, which makes JPEG artifacts visible
        image.save(buffer, "PNG", optimize=True)
        return _data_uri(buffer.getvalue(), "png")
    image.save(buffer, "JPEG", quality=88, subsampling=0)
    return _data_uri(buffer.getvalue(), "jpeg")


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
