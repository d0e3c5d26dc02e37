"""Separates the pixels of PNG and JPEG files from their metadata, so that metadata that is damaged or large cannot prevent decoding."""

from __future__ import annotations

import struct
import zlib

from coalign.errors import BadSample

_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"
_PALETTE = 3  # PNG's color type
_TRANSPARENCY_BYTES = {0: 2, 2: 6, _PALETTE: 1}  # minimum by PNG's color type; other types have an alpha channel
_COMMENT, _APP0, _APP1, _APP14, _APP15 = 0xFE, 0xE0, 0xE1, 0xEE, 0xEF  # segments of JPEG files
_START_OF_SCAN = 0xDA


def split_metadata(data: bytes) -> tuple[bytes, bytes]:
    """Returns the parts of a PNG or JPEG file that define its (first) image, as a file, and its EXIF data; other files as they are.

    Without the metadata, Pillow's limits for it do not apply (such as `PngImagePlugin.MAX_TEXT_CHUNK`), and need not be changed for the
    whole process. Raises BadSample for Apple's variant of PNG.
    """
    if data.startswith(_PNG):
        return _split_png(data)
    return _split_jpeg(data) if data.startswith(_JPEG) else (data, b"")


def _split_png(data: bytes) -> tuple[bytes, bytes]:
    kept, exif, color = [_PNG], b"", -1
    at, kind = len(_PNG), b""
    while at + 8 <= len(data) and kind != b"IEND":
        (length,), kind = struct.unpack_from(">I", data, at), data[at + 4 : at + 8]
        body, end = data[at + 8 : at + 8 + length], at + 12 + length
        if kind == b"IHDR" and length == 13:
            color = body[9]
        if kind in (b"IHDR", b"IDAT", b"IEND") or (kind == b"PLTE" and color == _PALETTE):
            kept.append(data[at:end])
        elif kind == b"CgBI":
            raise BadSample("unsupported mode", "PNG in the variant of Apple's Xcode (CgBI)")
        elif kind in (b"tRNS", b"eXIf") and data[at + 8 + length : end] == struct.pack(">I", zlib.crc32(kind + body)):
            if kind == b"eXIf":
                exif = body
            elif length >= _TRANSPARENCY_BYTES.get(color, length + 1):
                kept.append(data[at:end])
        at = end
    return b"".join(kept), exif


def _split_jpeg(data: bytes) -> tuple[bytes, bytes]:
    kept, exif = [data[:2]], b""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        length = int.from_bytes(data[at + 2 : at + 4], "big")  # includes these two bytes
        segment = data[at : at + 2 + length]
        if marker == _START_OF_SCAN or not 0xC0 <= marker <= _COMMENT or length < 2 or len(segment) < 2 + length:
            break
        content = segment[4:]
        if marker == _APP1 and content.startswith(b"Exif\0\0"):
            exif = exif or content[6:]
        # these two define the color space, if they are as long as libjpeg requires
        defines_color = (marker == _APP0 and content.startswith(b"JFIF\0") and len(content) >= 14) or (
            marker == _APP14 and content.startswith(b"Adobe") and len(content) >= 12
        )
        if defines_color or not (_APP0 <= marker <= _APP15 or marker == _COMMENT):
            kept.append(segment)
        at += 2 + length
    return b"".join([*kept, data[at:]]), exif
