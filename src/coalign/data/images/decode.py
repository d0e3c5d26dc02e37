"""Decodes image files of common formats and modes to upright 8-bit RGB. Raises `BadSample` for files that cannot be decoded."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from coalign.data.images.formats import DISTINCTIVE, FORMATS, accepts
from coalign.data.images.metadata import split_metadata
from coalign.errors import BadSample

# Pillow warns about malformed files. They either decode or raise BadSample, and a warning per file would flood the progress display.
for _category in (UserWarning, Image.DecompressionBombWarning):
    warnings.filterwarnings("ignore", category=_category, module=r"PIL\.")

MAX_BYTES = 1 << 30  # approximate memory limit for decoding one image; above it, the image is "too large"
REDUCTIONS = (1, 2, 4, 8)  # factors by which JPEG decoders can reduce the resolution, which also saves time
TILE = 4096  # larger images (more than TILE² pixels) are converted in tiles, to avoid a second full-size copy

# Bytes per pixel that decoders hold besides Pillow's raster: libjpeg the coefficients of a progressive file, libwebp, libavif and libheif
# two canvases, openjpeg 32 bits per channel, libtiff a strip. For other formats it is not known.
_DECODER_BYTES = {"JPEG": 6, "PNG": 0, "GIF": 1, "WEBP": 12, "BMP": 0, "TIFF": 4, "PPM": 0, "JPEG2000": 16, "AVIF": 12}
_OTHER_DECODER_BYTES = 12
# Bytes per pixel by mode; 4 for all others.
_RASTER_BYTES = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2, "I": 12, "F": 12}
_RESULT_BYTES = 7  # per pixel of the result: 4 in Pillow's RGB raster, 3 in the array
_DEEP_GRAY = ("I", "I;16", "I;16B", "I;16L", "I;16N", "F")

_UPRIGHT = {  # EXIF orientation -> operation that makes the stored pixels upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_LOOKS_LIKE = (  # (first bytes, kind) of files often found under image names
    (b"<!doctype html", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "XML or an SVG drawing"),
    (b"{", "JSON"),
    (b"version https://git-lfs", "a Git LFS pointer"),
    (b"%pdf", "a PDF"),
    (b"%!ps", "PostScript"),
    (b"pk\x03\x04", "a ZIP archive"),
    (b"\x1f\x8b", "gzip"),
    (b"8bps", "a Photoshop file"),
)


def jpeg_reduction(min_scale: float) -> int:
    """The largest JPEG reduction factor that keeps at least `min_scale` of the resolution."""
    return max(f for f in REDUCTIONS if f <= int(1 / min_scale + 1e-9))


class OpenedImage:
    """An image of which only the header has been read.

    size: (width, height) after EXIF rotation. reducible: whether the decoder can reduce the resolution, which saves time. format, mode:
    Pillow's names of the file format and the color mode. num_bytes: memory that the undecoded image holds.
    """

    def __init__(self, data: bytes | np.ndarray) -> None:
        if isinstance(data, np.ndarray):
            if data.dtype != np.uint8 or data.ndim != 3 or data.shape[2] != 3 or 0 in data.shape:
                raise BadSample(
                    "unsupported mode", f"{data.dtype} array of shape {data.shape}, not uint8 [height, width, 3]"
                )
            self.size, self.reducible, self.format, self.mode = (data.shape[1], data.shape[0]), False, "pixels", "RGB"
        else:
            image, exif = _open(data)
            self._image: Image.Image | None = image
            # Pillow already applies the orientation of TIFF files.
            self._orientation = 1 if image.format == "TIFF" else _orientation(exif)
            width, height = image.size
            self.size = (height, width) if self._orientation >= 5 else (width, height)
            self.reducible = image.format == "JPEG"
            self.format, self.mode = image.format or "unknown", image.mode
        self._data = data
        self.num_bytes = data.nbytes if isinstance(data, np.ndarray) else len(data)

    def decode(self, min_scale: float = 1.0) -> np.ndarray:
        """Decodes to upright RGB, uint8 [height, width, 3].

        The result may be reduced by an integer factor that keeps at least `min_scale` of the resolution: 2, 4 or 8 for JPEG, where
        this saves time, and any factor for images too large to be converted in one piece. Grayscale of more than 8 bits is scaled from
        its range (16-bit: 65535; 32-bit and float: the first of 1 (float only), 255 and 65535 that covers all values, else the range of
        the values). Transparent images are shown on white, animations by their first frame. Raises `BadSample`.
        """
        if isinstance(self._data, np.ndarray):
            return self._data
        image = self._image or _open(self._data)[0]
        self._image = None  # a Pillow image can be decoded only once
        factor = int(1 / min_scale + 1e-9)
        reduction = jpeg_reduction(min_scale) if self.reducible else 1
        factor //= reduction
        factor = factor if _num_pixels(image, reduction) > TILE**2 else 1
        _check_memory(image, reduction, reduction * factor)
        with _bad_samples(image, self._data):
            if reduction > 1:
                image.draft(None, (image.width // reduction, image.height // reduction))
            image.load()
            result = _rgb(image, factor)
            if self._orientation > 1:
                result = result.transpose(_UPRIGHT[self._orientation])
            return np.asarray(result)


def open_image(data: bytes | np.ndarray) -> OpenedImage:
    """Reads the header of an encoded file, or wraps decoded pixels, uint8 [height, width, 3].

    This function and `decode` raise `BadSample` with one of these reasons: "empty file", "not an image", "truncated image",
    "corrupt image", "image too large", "unsupported mode".
    """
    return OpenedImage(data)


def _open(data: bytes) -> tuple[Image.Image, bytes]:
    """Returns an image of which only the header has been read, and its EXIF data."""
    if not data:
        raise BadSample("empty file", "zero bytes")
    plain, exif = split_metadata(data)
    image = _identify(plain, data)
    if 0 in image.size:
        raise BadSample("corrupt image", f"{image.width} × {image.height} pixels")
    smallest = 8 if image.format == "JPEG" else 1
    _check_memory(image, smallest, max(smallest, *image.size))
    if not exif and isinstance(image.info.get("exif"), bytes):  # of other formats
        exif = image.info["exif"]
    return image, exif


def _identify(plain: bytes, data: bytes) -> Image.Image:
    """Opens a file with the plugin of its format. `data` is the file with its metadata."""
    failure: BadSample | None = None
    # Formats that start with common bytes come last.
    for name in sorted(Image.ID, key=lambda name: name not in DISTINCTIVE):
        if name not in FORMATS or not accepts(name, plain):
            continue
        try:
            with _bad_samples(name, data):
                # not Image.open, whose pixel limit does not account for reduced decoding
                return Image.OPEN[name][0](BytesIO(plain), "")
        except BadSample as bad:
            if name in DISTINCTIVE:
                failure = failure or bad
    raise failure or BadSample("not an image", _describe(data))


def _num_pixels(image: Image.Image, factor: int) -> int:
    """Number of pixels after reduction by `factor`."""
    return -(-image.width // factor) * -(-image.height // factor)


def _check_memory(image: Image.Image, reduction: int, factor: int) -> None:
    """Raises BadSample if decoding takes too much memory. The decoder reduces by `reduction`; the result is reduced by `factor`."""
    needed = _num_pixels(image, 1) * _DECODER_BYTES.get(image.format or "", _OTHER_DECODER_BYTES)
    needed += _num_pixels(image, reduction) * _RASTER_BYTES.get(image.mode, 4)
    needed += _num_pixels(image, factor) * _RESULT_BYTES
    if needed > MAX_BYTES:
        raise BadSample("image too large", f"{image.width} × {image.height} pixels ({image.format}, {image.mode})")


@contextmanager
def _bad_samples(image: Image.Image | str, data: bytes) -> Iterator[None]:
    """Turns any error that Pillow raises for a broken file into a `BadSample`. Plugins raise a dozen undocumented types."""
    try:
        yield
    except (Image.DecompressionBombError, MemoryError) as error:
        raise BadSample("image too large", str(error)) from error
    except Exception as error:
        name = image if isinstance(image, str) else str(image.format)
        reason = "truncated image" if _is_truncated(name, data, error) else "corrupt image"
        raise BadSample(reason, f"{name}, {len(data)} bytes: {type(error).__name__}: {error}") from error


def _is_truncated(name: str, data: bytes, error: Exception) -> bool:
    if "truncated" in str(error).lower() or isinstance(error, EOFError):
        return True
    if name == "WEBP":
        return len(data) < 12 or len(data) < int.from_bytes(data[4:8], "little") + 8
    end = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}.get(name)
    return end is not None and end not in data[-16:]


def _describe(data: bytes) -> str:
    start = data[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    kind = next((f" (looks like {kind})" for magic, kind in _LOOKS_LIKE if start.startswith(magic)), "")
    return f"{len(data)} bytes that start with {data[:24]!r}{kind}"


# ---------------------------------------------------------------- orientation


def _orientation(exif: bytes) -> int:
    """The EXIF orientation; 1 (upright) if it is missing or malformed, since intact images often have broken EXIF data."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (directory,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, directory)
        for i in range(count):
            tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, directory + 2 + 12 * i)
            if tag == 0x0112:
                return value if kind == 3 and value in _UPRIGHT else 1
    except struct.error:
        pass
    return 1


# ---------------------------------------------------------------- conversion to RGB


def _rgb(image: Image.Image, factor: int) -> Image.Image:
    """Converts a loaded image to RGB, averaged over squares of `factor` pixels. Large images are converted in tiles to save memory."""
    gray_range = _gray_range(image) if image.mode in _DEEP_GRAY else None
    if _num_pixels(image, 1) <= TILE**2:
        return _tile_rgb(image, gray_range)  # `factor` is above 1 for large images only
    side = max(TILE // factor, 1) * factor
    result = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    for top in range(0, image.height, side):
        for left in range(0, image.width, side):
            box = (left, top, min(left + side, image.width), min(top + side, image.height))
            tile = _tile_rgb(image.crop(box), gray_range)
            result.paste(tile.reduce(factor), (left // factor, top // factor))
    return result


def _tile_rgb(image: Image.Image, gray_range: tuple[float, float] | None) -> Image.Image:
    if gray_range is not None:
        low, high = gray_range
        values = np.nan_to_num(np.asarray(image, np.float64), nan=low, posinf=high, neginf=low)
        values = (values - low) * (255 / (high - low)) + 0.5
        return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image.convert("RGB"), mask=image.getchannel("A"))
        return white
    if image.mode == "LAB":
        to_rgb = ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")
        image = ImageCms.applyTransform(image, to_rgb) or image
    return image if image.mode == "RGB" else image.convert("RGB")


def _gray_range(image: Image.Image) -> tuple[float, float]:
    """The values of a deep grayscale image to map to black and white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        return 0.0, 65535.0
    values = np.asarray(image)
    if image.mode == "F":
        values = values[np.isfinite(values)]
    if values.size == 0:
        return 0.0, 1.0
    low, high = float(values.min()), float(values.max())
    for top in (1.0, 255.0, 65535.0) if image.mode == "F" else (255.0, 65535.0):
        if low >= 0 and high <= top:
            return 0.0, top
    return low, high if high > low else low + 1
