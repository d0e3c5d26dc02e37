from __future__ import annotations

from io import BytesIO

import pytest
from PIL import Image

from coalign.data.images.formats import FORMATS, IMAGE_EXTENSIONS


@pytest.mark.parametrize(
    "name", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF", "AVIF", "JPEG2000", "TGA", "PPM", "ICO", "PCX", "QOI"]
)
def test_formats_that_pillow_writes_can_be_opened(name: str) -> None:
    if name not in Image.SAVE:
        pytest.skip(f"this Pillow has no {name}")
    file = BytesIO()
    Image.new("RGB", (32, 32), "red").save(file, name)
    assert Image.open(BytesIO(file.getvalue()), formats=sorted(FORMATS)).format == name


def test_extensions() -> None:
    wanted = "jpg jpeg jpe jfif jif mpo png apng gif webp bmp dib tif tiff jp2 j2k tga ppm pgm pbm pnm ico pcx psd"
    assert not set(wanted.split()) - IMAGE_EXTENSIONS
    not_images = "pdf eps ps ai mpg mpeg wmf emf h5 hdf grib bufr svg txt json csv tar zip"
    assert not set(not_images.split()) & IMAGE_EXTENSIONS
