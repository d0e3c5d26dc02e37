from __future__ import annotations

import struct
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, features

from coalign.data.images import decode as images
from coalign.data.images.decode import open_image
from coalign.errors import BadSample

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # pytest overrides the module's filters


def scene(width: int = 61, height: int = 40) -> np.ndarray:
    """Smooth colors without symmetry, so that any rotation or channel swap changes the pixels."""
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([255 * x / width, 255 * y / height, 255 * (x + y) ** 2 / (width + height) ** 2], axis=-1).astype(
        np.uint8
    )


def encode(image: Image.Image | np.ndarray, kind: str = "PNG", **options: object) -> bytes:
    out = BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(out, kind, **options)
    return out.getvalue()


def png(width: int, height: int, bits: int, color: int, rows: bytes = b"", extra: bytes = b"") -> bytes:
    """A hand-written PNG with filtered rows; without rows, the header may claim any size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def decode(data: bytes) -> np.ndarray:
    opened = open_image(data)
    pixels = opened.decode()
    assert pixels.dtype == np.uint8
    assert pixels.shape == (opened.size[1], opened.size[0], 3)
    return pixels


def reason(data: bytes | np.ndarray) -> str:
    with pytest.raises(BadSample) as caught:
        open_image(data).decode()
    return caught.value.reason


def distance(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b.astype(int)).max())


# ---------------------------------------------------------------- formats and modes


@pytest.mark.parametrize(
    "kind", ["PNG", "BMP", "PPM", "TIFF", "WEBP", "JPEG2000", "TGA", "DDS", "QOI", "SGI", "PCX", "DIB"]
)
def test_lossless_formats_preserve_pixels(kind: str) -> None:
    if kind in ("WEBP", "JPEG2000") and not features.check({"WEBP": "webp", "JPEG2000": "jpg_2000"}[kind]):
        pytest.skip(f"this Pillow has no {kind}")
    assert distance(decode(encode(scene(), kind, **({"lossless": True} if kind == "WEBP" else {}))), scene()) == 0


def test_pixels_pass_through() -> None:
    opened = open_image(scene())
    assert opened.size == (61, 40)
    assert (opened.decode(0.1) == scene()).all()
    assert reason(scene()[..., 0]) == "unsupported mode"
    assert reason(scene().astype(np.float32)) == "unsupported mode"


def test_decode_works_twice() -> None:
    opened = open_image(encode(scene(), "JPEG"))
    assert (opened.decode() == opened.decode()).all()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(kind: str, orientation: int) -> None:
    """Stored pixels are transformed such that the EXIF orientation, as defined, restores the scene."""
    upright = scene(64, 40)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}.get(kind, {})
    data = encode(np.ascontiguousarray(stored), kind, exif=exif, **options)
    opened = open_image(data)
    assert opened.size == (64, 40)
    assert distance(opened.decode(), upright) <= 4


def test_exif_after_the_pixels_of_a_png() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(scene(), exif=exif)
    start = data.index(b"eXIf") - 4
    end = start + 12 + struct.unpack(">I", data[start : start + 4])[0]
    iend = data.index(b"IEND") - 4
    moved = data[:start] + data[end:iend] + data[start:end] + data[iend:]
    assert open_image(moved).size == (40, 61)
    assert (decode(moved) == decode(data)).all()


def test_broken_exif_is_ignored() -> None:
    for exif in (
        b"Exif\0\0II*\0\xff\xff\xff\x7f",
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff",
        b"Exif\0\0nonsense",
        b"Exif\0\0",
    ):
        assert distance(decode(encode(scene(), "JPEG", quality=100, subsampling=0, exif=exif)), scene()) <= 4


def test_alpha_is_shown_on_white() -> None:
    alpha = np.tile(np.linspace(0, 255, 61).astype(np.uint8), (40, 1))
    expected = (scene() * (alpha[..., None] / 255.0) + 255 * (1 - alpha[..., None] / 255.0)).round()
    rgba = Image.fromarray(np.dstack([scene(), alpha]))
    assert distance(decode(encode(rgba)), expected) <= 1
    assert distance(decode(encode(rgba, "WEBP", lossless=True, exact=True)), expected) <= 1
    gray = scene()[..., 0]
    expected = (gray * (alpha / 255.0) + 255 * (1 - alpha / 255.0)).round()[..., None].repeat(3, axis=2)
    assert distance(decode(encode(Image.merge("LA", [Image.fromarray(gray), Image.fromarray(alpha)]))), expected) <= 1


def test_palettes_and_their_transparency() -> None:
    paletted = Image.new("P", (3, 1))
    paletted.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    paletted.putdata([0, 1, 2])
    assert decode(encode(paletted)).tolist() == [[[255, 0, 0], [0, 255, 0], [0, 0, 255]]]
    assert decode(encode(paletted, transparency=1)).tolist() == [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]]
    half = decode(encode(paletted, transparency=bytes([255, 128, 0]))).tolist()[0]
    assert half[0] == [255, 0, 0]
    assert half[1] == [127, 255, 127]
    assert half[2] == [255, 255, 255]


def test_color_keys_are_transparent() -> None:
    pixels = np.array([[[9, 8, 7], [1, 2, 3]]], np.uint8)
    assert decode(encode(pixels, transparency=(1, 2, 3))).tolist() == [[[9, 8, 7], [255, 255, 255]]]


def test_one_bit() -> None:
    assert decode(encode(Image.fromarray(np.array([[True, False]])))).tolist() == [[[255] * 3, [0] * 3]]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_rescaled(kind: str) -> None:
    values = np.linspace(0, 65535, 257).astype(np.uint16)[None]
    expected = (values / 257.0).round()[..., None].repeat(3, axis=2)
    assert distance(decode(encode(Image.fromarray(values), kind)), expected) <= 1


def test_sixteen_bit_color_is_rescaled() -> None:
    values = np.array([[0, 1000, 65535], [257 * 100, 257 * 200, 257 * 50]], ">u2")
    assert distance(decode(png(2, 1, 16, 2, b"\0" + values.tobytes())), (values / 257.0).round()[None]) <= 1
    with_alpha = np.array([[65535, 0, 0, 65535], [0, 0, 0, 0]], ">u2")
    assert decode(png(2, 1, 16, 6, b"\0" + with_alpha.tobytes())).tolist() == [[[255, 0, 0], [255, 255, 255]]]


def test_sixteen_bit_pgm() -> None:
    assert (
        distance(decode(b"P5 2 1 65535\n" + np.array([0, 25700], ">u2").tobytes()), np.array([[[0] * 3, [100] * 3]]))
        <= 1
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 128, 255]], np.float32), [0, 128, 255]),
        (np.array([[0, 25700, 65535]], np.float32), [0, 100, 255]),
        (np.array([[-1, 0, 1]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, 0.5, np.inf]], np.float32), [0, 128, 255]),
        (np.array([[np.nan, np.nan, np.nan]], np.float32), [0, 0, 0]),
        (np.array([[0, 128, 255]], np.int32), [0, 128, 255]),
        (np.array([[-100000, 0, 100000]], np.int32), [0, 128, 255]),
        (np.array([[-7, -7, -7]], np.int32), [0, 0, 0]),
    ],
)
def test_deep_gray_is_scaled_from_its_range(values: np.ndarray, expected: list[int]) -> None:
    assert distance(decode(encode(Image.fromarray(values), "TIFF")), np.array(expected)[None, :, None]) <= 1


def test_cmyk() -> None:
    image = Image.fromarray(scene()).convert("CMYK")
    for kind in ("TIFF", "JPEG"):  # Pillow writes CMYK JPEGs inverted, with Adobe's marker, as Photoshop does
        assert distance(decode(encode(image, kind, **({"quality": 100} if kind == "JPEG" else {}))), scene()) <= 6


def test_ycck() -> None:
    """Adobe's YCCK stores inverted CMY as YCbCr and sets the last byte of the marker.

    Changing that byte in a CMYK file whose channels are equal, hence without chroma, must result in YCbCr decoding of these channels.
    """
    flat = Image.new("CMYK", (16, 16), (100, 128, 128, 0))
    data = bytearray(encode(flat, "JPEG", quality=100))
    at = data.index(b"Adobe") + 11
    assert data[at] == 0
    data[at] = 2
    # Stored values are inverted: Y 155, Cb 127, Cr 127; libjpeg returns 255 - RGB, which is again inverted CMY.
    red, green, blue = decode(bytes(data))[8, 8].tolist()
    assert max(red, green, blue) - min(red, green, blue) <= 5  # neutral only if the chroma planes were used


def test_lab() -> None:
    image = Image.fromarray(scene()).convert("LAB")
    assert np.abs(decode(encode(image, "TIFF")).astype(int) - scene()).mean() < 3  # L, a and b have 8 bits


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP"])
def test_first_frame_of_animations(kind: str) -> None:
    frames = [Image.new("RGB", (20, 10), color) for color in ("red", "lime", "blue")]
    data = encode(
        frames[0],
        kind,
        save_all=True,
        append_images=frames[1:],
        duration=50,
        **({"lossless": True} if kind == "WEBP" else {}),
    )
    assert Image.open(BytesIO(data)).n_frames == 3
    assert (decode(data) == [255, 0, 0]).all()


# ---------------------------------------------------------------- reduced decoding and memory limits


@pytest.mark.parametrize(
    ("scale", "expected"), [(1, 1), (0.51, 1), (0.5, 2), (0.3, 2), (0.25, 4), (0.13, 4), (0.125, 8), (0.01, 8)]
)
def test_jpeg_is_decoded_reduced(scale: float, expected: int) -> None:
    pixels = scene(803, 405)
    decoded = open_image(encode(pixels, "JPEG", quality=95)).decode(scale)
    assert decoded.shape == (-(-405 // expected), -(-803 // expected), 3)
    averaged = np.asarray(Image.fromarray(pixels).reduce(expected))
    assert distance(decoded, averaged) <= 12


def test_size_needs_only_the_header() -> None:
    data = encode(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8), "JPEG")
    assert open_image(data[: len(data) // 4]).size == (500, 375)
    assert reason(data[: len(data) // 4]) == "truncated image"


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_large_images_are_converted_in_tiles(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With tiles of 16 pixels, every image is large. The result must equal converting, then averaging the whole image."""
    image = (
        Image.fromarray(scene(101, 67)[..., 0].astype(np.uint16) * 257)
        if mode == "I;16"
        else Image.fromarray(scene(101, 67))
    )
    if mode == "RGBA":
        image.putalpha(Image.fromarray(scene(101, 67)[..., 1]))
    elif mode != "I;16":
        image = image.convert(mode)
    data = encode(image)
    whole = decode(data)
    monkeypatch.setattr(images, "TILE", 16)
    assert (decode(data) == whole).all()
    for factor in (2, 5, 20):
        reduced = open_image(data).decode(1 / factor)
        assert (reduced == np.asarray(Image.fromarray(whole).reduce(factor))).all()


def test_big_png_is_decoded_within_the_limit() -> None:
    """36 megapixels with a palette, as in clip-art collections: larger than a tile, far below the memory limit."""
    image = Image.new("P", (9000, 4000), 1)
    image.putpalette([255, 0, 0, 0, 255, 0])
    opened = open_image(encode(image, compress_level=1))
    assert opened.size == (9000, 4000)
    pixels = opened.decode(224 / 4000)
    assert pixels.shape == (-(-4000 // 17), -(-9000 // 17), 3)
    assert (pixels == [0, 255, 0]).all()


def test_decompression_bombs_are_rejected_before_decoding() -> None:
    for data in (
        png(100_000, 100_000, 8, 2),
        png(2**31 - 1, 2**31 - 1, 1, 3),
        png(20_000, 20_000, 8, 6),  # 1.6 GB of RGBA
        b"BM"
        + struct.pack("<IHHI", 54, 0, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, 60_000, 60_000, 1, 24, 0, 0, 0, 0, 0, 0),
        b"P6 90000 90000 255\n",
        b"GIF89a"
        + struct.pack("<HHBBB", 65535, 65535, 0, 0, 0)
        + b",\0\0\0\0"
        + struct.pack("<HHB", 65535, 65535, 0)
        + b"\x08\0;",
    ):
        with pytest.raises(BadSample) as caught:
            open_image(data)
        assert caught.value.reason == "image too large"
        assert "pixels" in caught.value.detail


def test_the_memory_limit_applies_to_the_requested_resolution() -> None:
    """A JPEG of 100 megapixels is too large at full resolution, but not at an eighth."""
    data = bytearray(encode(Image.new("L", (16, 16)), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", 10_000, 10_000)
    opened = open_image(bytes(data))
    assert opened.size == (10_000, 10_000)
    with pytest.raises(BadSample, match="image too large"):
        opened.decode()
    assert reason(bytes(data)) == "image too large"
    assert open_image(bytes(data)).decode(0.1).shape == (1250, 1250, 3)
    data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)
    assert reason(bytes(data)) == "image too large"


def test_pillow_warnings_are_suppressed() -> None:
    """In a fresh interpreter, since pytest sets its own warning filters: 100 megapixels (above Pillow's lower limit), bad EXIF."""
    program = """
import sys, io, struct
from PIL import Image
from coalign.data.images.decode import open_image
out = io.BytesIO(); Image.new("1", (10000, 10000)).save(out, "PNG")
assert open_image(out.getvalue()).decode(0.05).shape == (500, 500, 3)
exif = b"Exif\\0\\0II*\\0\\x08\\0\\0\\0\\x03\\0" + struct.pack("<HHII", 0x0128, 5, 9, 5000) * 3
out = io.BytesIO(); Image.new("RGB", (9, 9)).save(out, "JPEG", exif=exif)
open_image(out.getvalue()).decode()
out = io.BytesIO(); image = Image.new("P", (9, 9)); image.putpalette([0] * 9); image.save(out, "PNG", transparency=b"\\0\\1\\2")
open_image(out.getvalue()).decode()
"""
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


# ---------------------------------------------------------------- bad files


def test_files_that_are_not_images() -> None:
    assert reason(b"") == "empty file"
    with pytest.raises(BadSample) as caught:
        open_image(b"\n  <!DOCTYPE html><html><body>404 Not Found</body></html>")
    assert caught.value.reason == "not an image"
    assert "HTML" in caught.value.detail
    assert "DOCTYPE" in caught.value.detail
    for data in (
        b"\0" * 100,
        b"plain words",
        b"%!PS-Adobe-3.0 EPSF-3.0\n",
        b"\x89PN",
        b"GIF",
        b"RIFF0000WAVE",
        b"8BPS\0\1",
    ):
        assert reason(data) == "not an image"


def samples() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    noisy = np.clip(scene(96, 64).astype(int) + rng.integers(-30, 30, (64, 96, 3)), 0, 255).astype(np.uint8)
    image = Image.fromarray(noisy)
    encoded = {
        "jpeg": encode(image, "JPEG"),
        "progressive": encode(image, "JPEG", progressive=True, exif=Image.Exif()),
        "cmyk": encode(image.convert("CMYK"), "JPEG"),
        "png": encode(image),
        "palette": encode(image.convert("P"), transparency=3),
        "deep": encode(Image.fromarray(noisy[..., 0].astype(np.uint16) * 257)),
        "still": encode(image, "GIF"),
        "gif": encode(image, "GIF", save_all=True, append_images=[image.rotate(90)]),
        "bmp": encode(image, "BMP"),
        "tiff": encode(image, "TIFF"),
        "lzw": encode(image, "TIFF", compression="tiff_lzw"),
        "ppm": encode(image, "PPM"),
    }
    for name in ("WEBP", "JPEG2000", "AVIF"):
        if name in Image.SAVE:
            encoded[name.lower()] = encode(image, name)
    return encoded


@pytest.mark.parametrize(
    "name", ["jpeg", "progressive", "cmyk", "png", "palette", "deep", "still", "bmp", "tiff", "ppm", "webp"]
)
def test_truncated_files(name: str) -> None:
    data = samples()[name]
    for cut in np.linspace(400 if name == "tiff" else 40, 0.95 * len(data), 30).astype(int):
        assert reason(data[:cut]) == "truncated image", cut


def test_fuzz() -> None:
    """Truncated and corrupted files of every format give pixels or a BadSample with a documented reason, nothing else."""
    rng = np.random.default_rng(1)
    reasons: set[str] = set()
    decoded, all_have_details = 0, True
    for data in samples().values():
        altered = [data[: int(cut)] for cut in np.linspace(0, len(data) - 1, 25)]
        header = min(len(data), 700)
        for trial in range(60):
            broken = bytearray(data)
            for at in rng.integers(0, header if trial % 2 else len(data), 1 + trial % 4):
                broken[at] = int(rng.integers(0, 256))
            altered.append(bytes(broken))
        for broken in altered:
            try:
                opened = open_image(broken)
                pixels = opened.decode(0.5 if rng.random() < 0.5 else 1.0)
            except BadSample as error:
                reasons.add(error.reason)
                all_have_details = all_have_details and bool(error.detail)
            else:
                decoded += 1
                assert pixels.dtype == np.uint8
                assert pixels.ndim == 3
                assert pixels.shape[2] == 3
    assert reasons <= {
        "empty file",
        "not an image",
        "truncated image",
        "corrupt image",
        "image too large",
        "unsupported mode",
    }
    assert {"empty file", "not an image", "truncated image", "corrupt image"} <= reasons
    assert decoded > 50
    assert all_have_details
