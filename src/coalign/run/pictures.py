"""Pictures that a command leaves where it is told to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from coalign.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_KINDS = (".png", ".jpg", ".jpeg", ".pdf", ".svg")


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
