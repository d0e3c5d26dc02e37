"""Decodes uploads within bounds, and encodes pictures anew, so that nothing of a file but its pixels leaves the server."""

from __future__ import annotations

from io import BytesIO

import numpy as np
from PIL import Image

from coalign.data.images.decode import open_image
from coalign.errors import BadSample, UserError


def uploaded_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decodes an upload to upright RGB. Raises UserError if it is not an image or has more than `max_pixels`."""
    try:
        opened = open_image(data)
        width, height = opened.size
        if width * height > max_pixels:
            raise UserError(
                f"The uploaded image has {width} × {height} pixels, more than {max_pixels / 1e6:.3g} million; reduce it first."
            )
        return Image.fromarray(opened.decode())
    except BadSample as bad:
        raise UserError(f"The uploaded image cannot be used: {bad.reason}.") from bad


def encode_jpeg(image: Image.Image, side: int) -> bytes:
    """Encodes a picture of at most side × side pixels as JPEG, without metadata."""
    image = image.copy() if image.mode == "RGB" else image.convert("RGB")
    image.thumbnail((side, side))
    return _encode(image, "JPEG", quality=85)


def encode_png(pixels: np.ndarray) -> bytes:
    """Encodes uint8 [height, width, 3] as PNG."""
    return _encode(Image.fromarray(pixels), "PNG")


def _encode(image: Image.Image, kind: str, **options: int) -> bytes:
    file = BytesIO()
    plain = Image.fromarray(np.asarray(image))  # Pillow would write comments and color profiles of the original
    plain.save(file, kind, **options)
    return file.getvalue()
