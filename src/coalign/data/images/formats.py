"""The image file types that this installation can open: Pillow's raster formats, and those of installed plugins for Pillow."""

from __future__ import annotations

import struct
from contextlib import suppress
from importlib import import_module

from PIL import Image

# Importing one of these registers its formats, except HEIF.
for _plugin in ("pillow_heif", "pi_heif", "pillow_avif", "pillow_jxl"):
    with suppress(ImportError):
        _module = import_module(_plugin)
        if hasattr(_module, "register_heif_opener"):
            _module.register_heif_opener()
Image.init()

# Formats that are no raster images, that Pillow only identifies, or that it decodes by running another program (EPS).
_NOT_RASTER = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "PDF", "WMF"})

FORMATS = frozenset(Image.OPEN) - _NOT_RASTER  # by Pillow's names, such as "JPEG"
IMAGE_EXTENSIONS = frozenset(  # lower case, without the dot
    extension.lower().removeprefix(".") for extension, name in Image.registered_extensions().items() if name in FORMATS
) | {"mpo", "jif", "jfi"}  # JPEG files by other names, which Pillow does not register

_HEIF, _VECTOR, _RAW = "heic heif hif", "svg svgz eps ai wmf emf cdr", "cr2 cr3 nef nrw arw dng raf orf rw2 pef srw raw"
_OTHER = "avif webp jp2 jpx j2k psd psb xcf kra exr hdr dcm djvu bpg jxr wdp"
_HELP = (  # (extensions, what would help)
    (_HEIF, "pip install pillow-heif"),
    ("jxl", "pip install pillow-jxl-plugin"),
    (_VECTOR, "convert vector graphics to PNG"),
    (_RAW, "convert raw photos to JPEG"),
    (_OTHER, "convert them to PNG"),
)
# Extension -> what would help, for image files that this installation cannot open.
UNSUPPORTED = {
    extension: help_
    for extensions, help_ in _HELP
    for extension in extensions.split()
    if extension not in IMAGE_EXTENSIONS
}
# Formats whose first bytes are distinctive. Others start with a few common bytes, or differ by extension only (TGA).
DISTINCTIVE = FORMATS & {"JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "HEIF", "JPEG2000", "JXL"}


def accepts(name: str, head: bytes) -> bool:
    """Whether a file that starts with `head` (16 bytes suffice) may be of the format `name`."""
    accept = Image.OPEN[name][1]
    try:
        return accept is None or accept(head[:16]) is True  # a string says that Pillow was built without the format
    except (struct.error, IndexError):  # the file is shorter than the plugin expects
        return False


def starts_like_image(head: bytes) -> bool:
    """Whether a file that starts with `head` is an image that can be opened."""
    return any(accepts(name, head) for name in DISTINCTIVE)
