"""Reads the images that commands take, and writes the figures that they produce."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coalign.data.images.decode import open_image
from coalign.data.images.views import make_view
from coalign.errors import BadSample, UserError
from coalign.types import CLIP_PREPROCESS, DualEncoder, Preprocess

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FIGURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
_THUMBNAIL = 128  # pixels


def load_images(paths: str | Path | Sequence[str | Path], encoder: DualEncoder) -> Tensor:
    """Reads image files as the pixels that an encoder takes, the same that evaluation feeds it.

    Images are rotated upright (EXIF), transparency is put on white, and all modes are converted to RGB. Then they are resized to
    `encoder.image_size` as `encoder.preprocess` says.

    Args:
        paths: One or more image files: JPEG, PNG, GIF, WebP, BMP, TIFF and others that Pillow decodes.
        encoder: The encoder whose input is needed, such as `Run.encoder` returns.

    Returns:
        uint8 pixels [image, 3, size, size].

    Raises:
        UserError: A file cannot be read or is not an image, or there is none.

    Example:
        ```python
        encoder = coalign.load("runs/clip").encoder()
        image_embeds = encoder.encode_image(coalign.load_images(["cat.jpg", "dog.jpg"], encoder))  # [2, dim]
        ```
    """
    chosen = [paths] if isinstance(paths, str | Path) else list(paths)
    if not chosen:
        raise UserError("There are no images to load; give one path or more.")
    return torch.cat([read_image(path, encoder.image_size, encoder.preprocess) for path in chosen])


def read_image(path: str | Path, side: int, preprocess: Preprocess | Callable[[Any], Tensor]) -> Tensor:
    """Reads an image file as its evaluation view, or as the output of a function `preprocess`: uint8 [1, 3, side, side].

    Raises UserError if the file cannot be read or is not an image.
    """
    with _readable(path):
        return _view(Path(path).read_bytes(), side, preprocess)


def encoder_view(image: bytes | np.ndarray, encoder: DualEncoder) -> Tensor:
    """Returns a file's bytes or RGB pixels as the encoder takes them, uint8 [1, 3, size, size]. Raises BadSample if they are invalid."""
    return _view(image, encoder.image_size, encoder.preprocess)


def _view(image: bytes | np.ndarray, side: int, preprocess: Preprocess | Callable[[Any], Tensor]) -> Tensor:
    if isinstance(preprocess, Preprocess):
        return evaluation_view(image, side, preprocess)[None]
    return preprocess(Image.fromarray(open_image(image).decode()))[None]


def read_picture(path: str | Path) -> Image.Image:
    """Reads an image file, upright RGB. Raises UserError if it cannot be read or is not an image."""
    with _readable(path):
        return Image.fromarray(open_image(Path(path).read_bytes()).decode())


@contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"The image {path} could not be read: {error.strerror}.") from error
    except BadSample as bad:
        raise UserError(
            f"The image {path} cannot be used: {bad.reason}" + (f" ({bad.detail})." if bad.detail else ".")
        ) from bad


def evaluation_view(image: bytes | np.ndarray, side: int, preprocess: Preprocess = CLIP_PREPROCESS) -> Tensor:
    """Returns the evaluation view of an image, uint8 [3, side, side]. Raises BadSample if it cannot be decoded."""
    return make_view(image, side, preprocess=preprocess)[0]


def thumbnail(image: bytes | np.ndarray) -> np.ndarray:
    """Returns an image for a report page, uint8 [height, width, 3]. Raises BadSample if it cannot be decoded."""
    return evaluation_view(image, _THUMBNAIL).permute(1, 2, 0).numpy()


def check_figure_path(path: str | Path) -> Path:
    """Returns the path of a figure to write. Raises UserError if its suffix is not an image format, or its folder does not exist."""
    path = Path(path)
    if path.suffix.lower() not in _FIGURE_SUFFIXES:
        raise UserError(f"{path} is not an image file name; it must end in .png, .jpg, .pdf or .svg.")
    if not path.parent.is_dir():
        raise UserError(f"The figure cannot be written to {path}: the folder {path.parent} does not exist.")
    return path


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a matplotlib figure. Raises UserError if the file cannot be written."""
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise UserError(f"The figure could not be written to {path}: {error.strerror}.") from error
