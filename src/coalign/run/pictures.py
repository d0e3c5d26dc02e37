"""Pictures that a command is given, and those that it leaves where it is told to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from torch import Tensor

from coalign.data.image_views import make_views
from coalign.data.images import open_image
from coalign.data.randomness import generator
from coalign.errors import BadSample, UserError
from coalign.types import EVALUATION, Source

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")
_THUMBNAIL = 128  # pixels


def read_picture(path: str | Path, side: int, preprocess: Callable[[Any], Tensor] | None = None) -> Tensor:
    """The evaluation view of a file, or what `preprocess` makes of it, uint8 [1, 3, side, side]. UserError for what is no picture."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"The image {path} could not be read: {error.strerror}.") from error
    try:
        if preprocess is not None:
            return preprocess(Image.fromarray(open_image(data).decode(1.0)))[None]
        return evaluation_view(data, side)[None]
    except BadSample as bad:
        raise UserError(
            f"The image {path} cannot be used: {bad.reason}" + (f" ({bad.detail})." if bad.detail else ".")
        ) from bad


def evaluation_view(image: bytes | np.ndarray, side: int) -> Tensor:
    """uint8 [3, side, side]. BadSample for what is no picture."""
    views = make_views(image, {"evaluation": EVALUATION}, lambda _: generator(0, 0, 0, 0, "picture"), side)
    return views["evaluation"][0]


def thumbnail(source: Source, index: int) -> np.ndarray:
    """A sample's picture for a page, uint8 [height, width, 3]."""
    return evaluation_view(source.image(index), _THUMBNAIL).permute(1, 2, 0).numpy()


def check_picture(path: str | Path) -> Path:
    """UserError, before the work, for a name that is no picture's."""
    path = Path(path)
    if path.suffix.lower() not in _KINDS:
        raise UserError(f"{path} is no picture's name; end it in .png, .jpg, .pdf or .svg.")
    if not path.parent.is_dir():
        raise UserError(f"The picture cannot be written to {path}: there is no folder {path.parent}.")
    return path


def save_picture(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, dpi=160)
    except OSError as error:
        raise UserError(f"The picture could not be written to {path}: {error.strerror}.") from error
