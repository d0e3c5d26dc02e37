"""Drawing vocabulary of the pictures of the methods: images and captions, encoders, heads, embeddings and losses, as SVG text.

Used by render_method_diagrams.py, whose docstring explains colors and columns.
"""

from __future__ import annotations

from html import escape

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
WIDTH, SIZE, SMALL = 720, 18, 16  # of the picture, of text and of secondary text
CHARACTER = 0.6  # conservative width of a character, as a fraction of the text size

INK, MUTED, MASK, PAPER = "#1f2933", "#52606d", "#c9ced6", "#ffffff"
CLIP, NEW, EMA = "clip", "new", "ema"  # what CLIP has, what the method adds, and an EMA copy
STROKE = {CLIP: "#8792a2", NEW: "#d9480f", EMA: "#d9480f"}
FILL = {CLIP: "#f1f3f5", NEW: "#fff0e6", EMA: "#ffffff"}
ACCENT = STROKE[NEW]
PALE = {CLIP: "#e4e7eb", NEW: "#fbe3d4"}
PILL = {CLIP: "#52606d", NEW: "#c2410c"}
TINT = {"image": "#e4eef9", "text": "#e1f3e8", "joint": "#eee6f7"}
CELLS = {
    "image": ("#3f7fcb", "#8db8e8", "#5f9adb", "#bcd6f2"),
    "text": ("#2f9462", "#8ccbab", "#57b085", "#bfe4d0"),
    "joint": ("#7d55b5", "#b79bdc", "#9674c9", "#d6c5ec"),
}
VIEW, ENCODER, HEAD, EMBED = 64, 186, 294, 380  # centers of the columns; losses are further right
# left and right edges of boxes in the columns, where connections end and start
IMAGE_OUT, TEXT_OUT = VIEW + 40, VIEW + 52
ENCODER_IN, ENCODER_OUT = ENCODER - 46, ENCODER + 46
HEAD_IN, HEAD_OUT = HEAD - 38, HEAD + 38
EMBED_IN, EMBED_OUT = EMBED - 30, EMBED + 30
NATURAL = ("#cfe6fa", "#f7c948", "#7cb86b", "#f3e3c3", "#c0392b", "#6b4f3a")  # sky, sun, hill, wall, roof, door
SHIFTED = ("#f3d9ee", "#f4a8c0", "#4fa7a0", "#dfe3f7", "#6a4fb0", "#3d4a6b")
GRAYED = ("#dcdcdc", "#bdbdbd", "#979797", "#e6e6e6", "#6e6e6e", "#565656")
WEAK, STRONG_1, STRONG_2 = ((0, 0, 96, 72), NATURAL), ((30, 22, 56, 42), SHIFTED), ((8, 14, 64, 48), GRAYED)

CAPTION, MASKED, EDITED = "a house\non a hill", "a house\non a _", "a *home\non a hill"

Point = tuple[float, float]
View = tuple[tuple[int, int, int, int], tuple[str, ...]]  # crop and colors


class Picture:
    """An SVG under construction: connections lie below boxes, whatever the order of the calls."""

    def __init__(self, title: str, description: str, height: int, columns: bool = True) -> None:
        self.title, self.description, self.height = title, description, height
        self.below: list[str] = []
        self.above: list[str] = []
        if columns:
            names = {VIEW: "views", ENCODER: "encoders", HEAD: "heads", EMBED: "embeddings", 570: "losses"}
            for x, name in names.items():
                self.note(x, 26, name)

    def svg(self) -> str:
        body = "\n".join([*self.below, *self.above])
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height}" width="{WIDTH}" '
            f'height="{self.height}" role="img" font-family="{escape(FONT)}">\n'
            f"<title>{escape(self.title)}</title>\n<desc>{escape(self.description)}</desc>\n"
            f'<rect width="{WIDTH}" height="{self.height}" rx="12" fill="{PAPER}"/>\n{body}\n</svg>\n'
        )

    # ---------------------------------------------------------------- basic shapes

    def text(
        self, x: float, y: float, label: str, size: int = SIZE, color: str = INK, anchor: str = "middle", bold=False
    ) -> None:
        """Draws lines of text, centered at height y."""
        lines = label.split("\n") if label else []
        weight = ' font-weight="600"' if bold else ""
        for number, line in enumerate(lines):
            width = len(line) * CHARACTER * size
            left = x - {"start": 0, "middle": width / 2, "end": width}[anchor]
            assert 0 <= left <= WIDTH - width, f"{line!r} leaves the picture {self.title!r}"
            baseline = y + size * 0.35 + (number - (len(lines) - 1) / 2) * size * 1.2
            self.above.append(
                f'<text x="{x:g}" y="{baseline:g}" font-size="{size}" text-anchor="{anchor}" fill="{color}"{weight}>'
                f"{escape(line)}</text>"
            )

    def note(self, x: float, y: float, label: str, anchor: str = "middle") -> None:
        self.text(x, y, label, SMALL, MUTED, anchor)

    def rect(self, x: float, y: float, w: float, h: float, fill: str, stroke: str = "none", rx=0, dashed=False) -> None:
        """Draws a rectangle centered at (x, y)."""
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.above.append(
            f'<rect x="{x - w / 2:g}" y="{y - h / 2:g}" width="{w:g}" height="{h:g}" rx="{rx:g}" fill="{fill}" '
            f'stroke="{stroke}" stroke-width="2"{dash}/>'
        )

    def box(self, x: float, y: float, w: float, h: float, label: str, kind: str = CLIP, space: str = "") -> None:
        """Draws a network with its label, in the color of a modality if it encodes one."""
        size = SIZE if _fits(label, w - 8, SIZE) else SMALL
        assert _fits(label, w - 4, size), f"{label!r} is wider than its box"
        fill = TINT.get(space, FILL[kind]) if kind != EMA else FILL[EMA]
        self.rect(x, y, w, h, fill, STROKE[kind], rx=8, dashed=kind == EMA)
        self.text(x, y, label, size)

    def cell(self, x: float, y: float, kind: str = NEW, filled: bool = False) -> None:
        """Draws an entry of a matrix of similarities."""
        self.rect(x, y, 20, 20, PILL[kind] if filled else PALE[kind], rx=2)

    def wire(self, *points: Point, kind: str = CLIP, arrow=True, dashed=False) -> None:
        """Draws a line through points, with an arrow at its end."""
        path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        self.below.append(f'<path d="{path}" fill="none" stroke="{STROKE[kind]}" stroke-width="2"{dash}/>')
        if arrow:
            (x0, y0), (x, y) = points[-2:]
            dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)  # of the last segment, along an axis
            corners = [(x, y), (x - 9 * dx - 5 * dy, y - 9 * dy - 5 * dx), (x - 9 * dx + 5 * dy, y - 9 * dy + 5 * dx)]
            shape = " ".join(f"{a:g},{b:g}" for a, b in corners)
            self.below.append(f'<polygon points="{shape}" fill="{STROKE[kind]}"/>')

    def arc(self, top: float, bottom: float, kind: str = NEW) -> None:
        """Connects two embeddings of the column with a curve."""
        reach = EMBED_OUT + 30 + 0.55 * (bottom - top)
        path = f"M{EMBED_OUT} {top:g} C{reach:g} {top:g} {reach:g} {bottom:g} {EMBED_OUT} {bottom:g}"
        self.below.append(f'<path d="{path}" fill="none" stroke="{STROKE[kind]}" stroke-width="2"/>')

    def dot(self, x: float, y: float, kind: str = NEW, radius: float = 8) -> None:
        self.above.append(f'<circle cx="{x:g}" cy="{y:g}" r="{radius:g}" fill="{PILL[kind]}"/>')

    def ring(self, x: float, y: float) -> None:
        self.above.append(f'<circle cx="{x:g}" cy="{y:g}" r="8" fill="none" stroke="{INK}" stroke-width="2"/>')

    def stop(self, x: float, y: float) -> None:
        """Marks a horizontal or vertical line as a path without gradient: //."""
        for dx in (-3, 3):
            line = f"M{x + dx - 4:g} {y + 8:g} L{x + dx + 4:g} {y - 8:g}"
            self.above.append(f'<path d="{line}" stroke="{INK}" stroke-width="2.5"/>')

    # ---------------------------------------------------------------- parts of methods

    def image(
        self, y: float, view: View, label: str, kind: str = CLIP, masked=False, x: float = VIEW, w: float = 80
    ) -> None:
        """Draws a view of the image: a crop of a house on a hill, in its colors."""
        (left, top, width, height), (sky, sun, hill, wall, roof, door) = view
        h = w * 0.75
        self.above.append(
            f'<svg x="{x - w / 2:g}" y="{y - h / 2:g}" width="{w:g}" height="{h:g}" '
            f'viewBox="{left} {top} {width} {height}"><rect width="96" height="72" fill="{sky}"/>'
            f'<circle cx="18" cy="16" r="8" fill="{sun}"/><path d="M0 60 Q48 36 96 56 V72 H0 Z" fill="{hill}"/>'
            f'<rect x="40" y="34" width="28" height="22" fill="{wall}"/><path d="M36 35 L54 19 L72 35 Z" fill="{roof}"/>'
            f'<rect x="58" y="44" width="7" height="12" fill="{door}"/></svg>'
        )
        for column, row in ((-1.5, -1), (0.5, 0), (1.5, 1)) if masked else ():
            self.rect(x + w / 4 * column, y + w / 4 * row, w / 4 - 1, w / 4 - 1, MASK)
        self.rect(x, y, w, h, "none", STROKE[kind], rx=3)
        self.note(x, y + h / 2 + 14, label)

    def caption(self, y: float, words: str, label: str, kind: str = CLIP) -> None:
        """Draws a text view. A word _ at the end of a line is masked; words that start with * differ from the caption."""
        self.rect(VIEW, y, 104, 56, PAPER, STROKE[kind], rx=6)
        for number, line in enumerate(words.split("\n")):
            assert _fits(line.replace("*", ""), 96, SMALL), f"{line!r} is wider than its card"
            height = y - 10 + 20 * number
            shown = line.removesuffix(" _")
            if shown != line:
                self.rect(VIEW + 22, height, 40, 14, MASK, rx=2)
            spans = (
                f'<tspan fill="{STROKE[NEW]}">{word[1:]}</tspan>' if word[0] == "*" else word for word in shown.split()
            )
            self.above.append(
                f'<text x="{VIEW - 46}" y="{height + 5.6:g}" font-size="{SMALL}" fill="{INK}">{" ".join(spans)}</text>'
            )
        self.note(VIEW, y + 42, label)

    def embed(self, y: float, space: str, kind: str = CLIP, x: float = EMBED, vertical=False) -> None:
        """Draws an embedding: four cells in the color of its modality."""
        for number, color in enumerate(CELLS[space]):
            offset = -21 + 14 * number
            self.rect(*((x, y + offset) if vertical else (x + offset, y)), 14, 14, color)
        self.rect(x, y, *((18, 60) if vertical else (60, 18)), "none", STROKE[kind], rx=2, dashed=kind == EMA)

    def queue(self, x: float, y: float, space: str) -> None:
        """Draws a queue of embeddings."""
        for offset in (-11, 0, 11):
            for number, color in enumerate(CELLS[space]):
                self.rect(x - 18 + 12 * number, y + offset, 12, 8, color)
        self.rect(x, y, 56, 38, "none", STROKE[NEW], rx=4)

    def loss(self, x: float, y: float, label: str, kind: str = NEW) -> None:
        width = len(label) * 0.66 * SIZE + 20
        self.rect(x, y, width, 30, PILL[kind], rx=15)
        self.text(x, y, label, color=PAPER, bold=True)

    def bracket(self, top: float, bottom: float, label: str, x: float = 480, kind: str = NEW) -> None:
        """Connects two embeddings of the column with a loss."""
        self.wire((EMBED_OUT, top), (x, top), (x, bottom), (EMBED_OUT, bottom), kind=kind, arrow=False)
        self.loss(x, (top + bottom) / 2, label, kind)

    def tower(self, top: float, bottom: float, space: str, head: str = "linear", kind: str = CLIP) -> None:
        """Draws an encoder and its head, from height top to bottom."""
        y, h = (top + bottom) / 2, bottom - top
        self.box(ENCODER, y, 92, h, f"{space}\nencoder", kind, space)
        if head:
            self.box(HEAD, y, 76, h, head, kind)

    def row(self, y: float, space: str, kind: str = CLIP) -> None:
        """Draws the path from a view through encoder and head to its embedding."""
        start = IMAGE_OUT if space == "image" else TEXT_OUT
        for left, right in ((start, ENCODER_IN), (ENCODER_OUT, HEAD_IN), (HEAD_OUT, EMBED_IN)):
            self.wire((left, y), (right, y), kind=kind)
        self.embed(y, space, kind)

    def masked_words(
        self, top: float, y: float, x: float = ENCODER, label: str = "MLM", note: str = "predict masked words"
    ):
        """Draws masked modeling below an encoder that ends at height top."""
        self.wire((x, top), (x, y - 15), kind=NEW)
        self.loss(x, y, label)
        self.note(x + 36, y, note, "start")

    def text_icon(self, x: float, y: float, change: str, kind: str) -> None:
        """Draws a small text view, of which one word may be "masked" or "edited"."""
        self.rect(x, y, 44, 33, PAPER, STROKE[kind], rx=3)
        for left, top, width in ((0, -6, 30), (-8, 6, 14)):
            self.rect(x + left, y + top, width, 4, MUTED)
        color = {"": MUTED, "masked": MASK, "edited": STROKE[NEW]}[change]
        self.rect(x + 8, y + 6, 14, 8 if change == "masked" else 4, color)

    def sequence(self, y: float) -> None:
        """Draws a masked image and a masked caption as one input."""
        self.rect(VIEW, y, 120, 150, PAPER, CELLS["joint"][0], rx=8)
        self.image(y - 38, WEAK, "", NEW, masked=True)
        self.caption(y + 34, MASKED, "", NEW)
        self.note(VIEW, y + 90, "sequence")

    def clip_pair(self, image: float, text: float) -> None:
        """Draws CLIP's part of a method that adds to it: a weak view, its caption and InfoNCE, with the image tower drawn elsewhere."""
        self.image(image, WEAK, "weak crop")
        self.row(image, "image")
        self.caption(text, CAPTION, "caption")
        self.tower(text - 40, text + 40, "text")
        self.row(text, "text")
        self.bracket(image, text, "InfoNCE", kind=CLIP)

    def legend(self, *kinds: str, notes: str = "", **marks: str) -> None:
        """Explains outlines and marks ("dot", "ring") in one line at the bottom."""
        labels = {CLIP: "as in CLIP", NEW: "new", EMA: "EMA copy", "stop": "no gradient"}
        x, y = 24.0, self.height - 24
        for kind, label in [*((kind, labels[kind]) for kind in kinds), *marks.items()]:
            if kind in FILL:
                self.rect(x + 11, y, 22, 16, FILL[kind], STROKE[kind], rx=3, dashed=kind == EMA)
            else:
                getattr(self, kind)(x + 11, y)
            self.note(x + 30, y, label, "start")
            x += 30 + len(label) * 0.5 * SMALL + 24
        self.note(WIDTH - 20, y, notes, "end")


def _fits(label: str, width: float, size: int) -> bool:
    return max(map(len, label.split("\n"))) * 0.56 * size <= width
