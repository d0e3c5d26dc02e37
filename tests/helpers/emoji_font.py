"""A color font of bitmaps in the format of NotoColorEmoji.ttf, with few emoji."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

from fontTools.feaLib.builder import addOpenTypeFeaturesFromString
from fontTools.fontBuilder import FontBuilder
from fontTools.ttLib import newTable
from fontTools.ttLib.tables import C_B_D_T_, E_B_L_C_
from fontTools.ttLib.tables.BitmapGlyphMetrics import SmallGlyphMetrics
from PIL import Image

SIZE, ADVANCE = 109, 136
ZWJ = 0x200D
_LINE_METRICS = (
    *("caretSlopeNumerator", "caretSlopeDenominator", "caretOffset", "minOriginSB", "minAdvanceSB"),
    *("maxBeforeBL", "minAfterBL", "pad1", "pad2"),
)


def write_emoji_font(path: Path, images: dict[str, Image.Image]) -> Path:
    """Writes a font with the RGBA images (at most 136 × 128) of the given emoji. It has glyphs for the characters of sequences, too."""
    characters = sorted({ord(character) for text in images for character in text} | {0x20})
    glyphs = {text: "_".join(f"u{ord(character):X}" for character in text) for text in images}
    singles = {point: f"u{point:X}" for point in characters}
    order = [".notdef", *singles.values(), *(name for name in glyphs.values() if name not in singles.values())]
    builder = FontBuilder(2048, isTTF=True)
    builder.setupGlyphOrder(order)
    builder.setupCharacterMap(singles)
    builder.setupHorizontalMetrics({name: (0 if name == f"u{ZWJ:X}" else 2550, 0) for name in order})
    builder.setupHorizontalHeader(ascent=1900, descent=-500)
    builder.setupNameTable({"familyName": "Test Emoji", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    _add_bitmaps(builder.font, {glyphs[text]: image for text, image in images.items()})
    rules = [
        f"sub {' '.join(singles[ord(character)] for character in text)} by {name};"
        for text, name in glyphs.items()
        if len(text) > 1
    ]
    if rules:
        addOpenTypeFeaturesFromString(builder.font, "feature ccmp {" + "\n".join(rules) + "} ccmp;")
    path.parent.mkdir(parents=True, exist_ok=True)
    builder.font.save(path)
    return path


def _add_bitmaps(font, images: dict[str, Image.Image]) -> None:
    """Adds the tables CBDT and CBLC, and removes the outlines' tables."""
    data, locations = newTable("CBDT"), newTable("CBLC")
    data.version = locations.version = 3.0
    data.strikeData, locations.strikes = [{}], []
    table = E_B_L_C_.eblc_index_sub_table_1(None, font)
    table.indexFormat, table.imageFormat = 1, 17
    table.names = sorted(images, key=font.getGlyphID)
    table.firstGlyphIndex, table.lastGlyphIndex = font.getGlyphID(table.names[0]), font.getGlyphID(table.names[-1])
    for name, image in images.items():
        glyph = C_B_D_T_.cbdt_bitmap_format_17(None, font)
        glyph.metrics = SmallGlyphMetrics()
        glyph.metrics.height, glyph.metrics.width = image.height, image.width
        glyph.metrics.BearingX, glyph.metrics.BearingY, glyph.metrics.Advance = 0, 101, ADVANCE
        buffer = BytesIO()
        image.save(buffer, "PNG")
        glyph.imageData = buffer.getvalue()
        data.strikeData[0][name] = glyph
    strike = E_B_L_C_.Strike()
    sizes = strike.bitmapSizeTable = E_B_L_C_.BitmapSizeTable()
    sizes.colorRef, sizes.flags, sizes.bitDepth, sizes.ppemX, sizes.ppemY = 0, 1, 32, SIZE, SIZE
    sizes.startGlyphIndex, sizes.endGlyphIndex = table.firstGlyphIndex, table.lastGlyphIndex
    for direction in ("hori", "vert"):
        metrics = E_B_L_C_.SbitLineMetrics()
        vars(metrics).update(dict.fromkeys(_LINE_METRICS, 0), ascender=101, descender=-27, widthMax=ADVANCE)
        setattr(sizes, direction, metrics)
    strike.indexSubTables = [table]
    locations.strikes = [strike]
    font["CBDT"], font["CBLC"] = data, locations
    for tag in ("glyf", "loca"):
        if tag in font:
            del font[tag]
