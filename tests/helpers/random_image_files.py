"""Image files of many kinds and shapes, for fuzz tests of decoding, preprocessing and exports."""

from __future__ import annotations

import io
import random

import numpy as np
from PIL import Image

_SIZES = (
    (32, 32), (64, 48), (48, 64), (333, 500), (640, 480), (1, 1), (2, 3), (1, 300), (300, 1), (900, 20), (7, 400), (3, 2500),
    (1200, 900), (105, 96), (96, 105),
)  # fmt: skip
_FORMATS = {"bmp": "BMP", "tiff": "TIFF", "gif": "GIF", "webp": "WEBP"} | dict.fromkeys(
    ("jpeg", "progressive", "cmyk", "gray jpeg", "rotated"), "JPEG"
)
_MODES = {
    "cmyk": "CMYK", "gray": "L", "gray jpeg": "L", "palette": "P", "transparent palette": "P", "one bit": "1", "gray alpha": "LA",
}  # fmt: skip
KINDS = (*_FORMATS, "png", "alpha", "16-bit", "gray", "palette", "transparent palette", "one bit", "gray alpha")


def random_image(rng: random.Random) -> tuple[bytes, str]:
    """Returns a file of a random kind and shape, and its kind, one of KINDS."""
    size, kind = rng.choice(_SIZES), rng.choice(KINDS)
    shape = (max(1, size[1] // 9), max(1, size[0] // 9), 3)
    image = Image.fromarray(np.random.default_rng(rng.getrandbits(30)).integers(0, 256, shape, dtype=np.uint8))
    image = image.resize(size, Image.Resampling.BICUBIC)
    options: dict[str, object] = {}
    if kind == "rotated":
        exif = Image.Exif()
        exif[0x0112] = rng.randint(2, 8)
        options["exif"] = exif
    if kind == "progressive":
        options["progressive"] = True
    if kind in ("alpha", "gray alpha"):
        image.putalpha(Image.linear_gradient("L").resize(size))
    if kind == "16-bit":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    image = image.convert(_MODES[kind]) if kind in _MODES else image
    if kind == "transparent palette":
        options["transparency"] = max(image.getcolors())[1]
    out = io.BytesIO()
    image.save(out, _FORMATS.get(kind, "PNG"), **options)
    return out.getvalue(), kind
