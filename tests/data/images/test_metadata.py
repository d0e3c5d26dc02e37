"""Metadata of PNG and JPEG files: whatever is wrong with it, the pixels are decoded."""

from __future__ import annotations

import itertools
import struct
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, ImageFile, PngImagePlugin

from coalign.data.images.decode import open_image
from coalign.data.images.metadata import split_metadata
from coalign.errors import BadSample

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3)).astype(np.uint8)
CHUNKS = ["tEXt", "zTXt", "iTXt", "iCCP", "tIME", "gAMA", "pHYs", "cHRM", "sRGB", "sBIT", "bKGD", "hIST", "sPLT"]
CHUNKS += ["acTL", "fcTL", "fdAT", "eXIf", "tRNS", "PLTE", "oFFs", "caBX", "prVt"]


def chunk(kind: str, body: bytes, crc: int | None = None) -> bytes:
    name = kind.encode()
    return (
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body) if crc is None else crc)
    )


def encode(image: Image.Image | np.ndarray = PIXELS, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def insert(png: bytes, *chunks: bytes, before: bytes = b"IDAT") -> bytes:
    at = png.index(before) - 4
    return png[:at] + b"".join(chunks) + png[at:]


def decode(data: bytes) -> np.ndarray:
    return open_image(data).decode()


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("size", [2_000_000, 80_000_000])
def test_large_text_and_profiles_of_png(size: int, before: bytes) -> None:
    zeros, plain = zlib.compress(bytes(size), 1), bytes(min(size, 3_000_000))
    for made in (
        chunk("zTXt", b"key\0\0" + zeros),
        chunk("iTXt", b"key\0\1\0\0\0" + zeros),
        chunk("iTXt", b"key\0\0\0\0\0" + plain),
        chunk("tEXt", b"key\0" + plain),
        chunk("iCCP", b"icc\0\0" + zeros),
        b"".join(chunk("zTXt", b"key%d\0\0" % i + zlib.compress(bytes(900_000), 1)) for i in range(80)),
    ):
        assert (decode(insert(encode(), made, before=before)) == PIXELS).all()


@pytest.mark.parametrize("before", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", CHUNKS)
def test_damaged_ancillary_chunks_of_png(kind: str, before: bytes) -> None:
    """Empty, short and meaningless chunks, wrong checksums, chunks that occur twice, in a truecolor image."""
    bodies = (b"", b"\0", b"\0\0", b"x", b"key\0", b"key\0\0junk", b"key\0\7junk", b"key\0\1\0\0\0junk", b"\xff" * 40)
    for body, crc in itertools.product(bodies, (None, 1)):
        if kind == "tRNS" and len(body) >= 6 and crc is None:
            continue  # valid: a transparent color
        data = insert(encode(), *2 * [chunk(kind, body, crc)], before=before)
        assert (decode(data) == PIXELS).all(), (body, crc)


def test_truncated_after_the_pixels_of_a_png() -> None:
    data = insert(encode(), chunk("tEXt", b"key\0" + b"a" * 500), chunk("tEXt", b"more\0"), before=b"IEND")
    for end in range(data.index(b"tEXt") - 4, len(data)):
        assert (decode(data[:end]) == PIXELS).all(), end
    assert (decode(encode() + b"trailing" * 50) == PIXELS).all()
    with pytest.raises(BadSample, match="truncated image"):
        decode(data[: data.index(b"tEXt") - 50])


def test_pixels_are_not_lost_with_the_metadata() -> None:
    """Everything that Pillow's decoders need for the pixels is kept: palettes, transparency, JPEG's color spaces, Adobe's markers."""
    image = Image.fromarray(PIXELS)
    palette = image.convert("P")
    files = [
        encode(palette, transparency=3),
        encode(palette, transparency=bytes(range(256))),
        encode(palette.quantize(16), bits=4),
        encode(PIXELS, transparency=tuple(PIXELS[3, 4].tolist())),
        encode(image.convert("L"), transparency=int(PIXELS[0, 0, 0])),
        encode(image.convert("LA")),
        encode(image.convert("RGBA")),
        encode(image.convert("1")),
        encode(PIXELS[..., 0].astype(np.uint16) * 257),
        encode(PIXELS, save_all=True, append_images=[image.rotate(180)]),
        *(encode(PIXELS, "JPEG", **options) for options in ({}, {"progressive": True}, {"keep_rgb": True})),
        encode(image.convert("CMYK"), "JPEG", exif=Image.Exif(), icc_profile=b"profile" * 20_000, comment="a" * 60_000),
        encode(image.convert("L"), "JPEG", restart_marker_blocks=1),
        encode(PIXELS, "MPO", save_all=True, append_images=[image.rotate(180)]),
    ]
    for data in files:
        plain, _ = split_metadata(data)
        with Image.open(BytesIO(data)) as whole, Image.open(BytesIO(plain)) as stripped:
            assert (whole.mode, whole.size) == (stripped.mode, stripped.size)
            assert list(whole.convert("RGBA").tobytes()) == list(stripped.convert("RGBA").tobytes())


@pytest.mark.parametrize("marker", [*range(0xE0, 0xF0), 0xFE])
def test_damaged_segments_of_jpeg(marker: int) -> None:
    data = encode(PIXELS, "JPEG", quality=95)
    expected = decode(data)
    names = (
        b"",
        b"JF",
        b"JFIF\0",
        b"JFXX\0",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"ICC_PROFILE\0",
        b"MPF\0",
    )
    names += (
        b"Adobe",
        b"Photoshop 3.0\0",
        b"Photoshop 3.0\x008BIM\4\4\4",
        b"http://ns.adobe.com/xap/1.0/\0<x",
        b"x" * 60_000,
    )
    for content in names:
        segment = bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content
        assert (decode(data[:2] + segment + data[2:]) == expected).all(), content[:20]
        assert (decode(data[:2] + b"\xff\xff" + segment + segment + data[2:]) == expected).all(), content[:20]
    assert (decode(data + b"trailing" * 50) == expected).all()


def test_orientation_is_read_beside_damaged_metadata() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(PIXELS, -1)
    png = insert(encode(exif=exif), chunk("zTXt", b"key\0\0" + zlib.compress(bytes(2_000_000))), chunk("pHYs", b""))
    assert (decode(png) == turned).all()
    jpeg = encode(PIXELS, "JPEG", quality=95, exif=exif)
    jpeg = jpeg[:2] + b"\xff\xe2" + struct.pack(">H", 14) + b"ICC_PROFILE\0" + jpeg[2:]
    assert open_image(jpeg).size == (24, 31)


def test_damaged_exif_is_ignored() -> None:
    for exif in (b"", b"Exif\0\0", b"II*\0", b"MM\0*\xff\xff\xff\xff", b"II*\0\x08\0\0\0\xff\xff" + b"\x12\1" * 50):
        assert (decode(insert(encode(), chunk("eXIf", exif))) == PIXELS).all()


def test_apples_variant_of_png() -> None:
    with pytest.raises(BadSample, match="unsupported mode"):
        decode(insert(encode(), chunk("CgBI", b"\x50\0\x20\2"), before=b"IHDR"))


def test_settings_of_pillow_are_untouched() -> None:
    assert PngImagePlugin.MAX_TEXT_CHUNK == ImageFile.SAFEBLOCK == 1 << 20
    assert PngImagePlugin.MAX_TEXT_MEMORY == 64 << 20
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    assert Image.MAX_IMAGE_PIXELS == 1024 * 1024 * 1024 // 4 // 3
