"""SugarCrepe (Hsieh et al. 2023): COCO's validation images with captions that are true and captions that are false in one thing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.coco import image_folder
from coalign.data.common import printable, read_image_file
from coalign.data.tabular import load_json
from coalign.errors import UserError
from coalign.types import Foil, Record

# The seven files: what was done, and to what.
KINDS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


class SugarCrepe:
    """A sample for each image that a file of the folder names; its captions are the true ones."""

    def __init__(self, folder: Path, images: Path | None = None) -> None:
        self.name = printable(str(folder))
        files = [(kind, folder / f"{kind}.json") for kind in KINDS if (folder / f"{kind}.json").is_file()]
        if not files:
            raise UserError(f"{folder} holds none of SugarCrepe's files: {', '.join(f'{kind}.json' for kind in KINDS)}")
        numbers: dict[str, int] = {}
        self._captions: list[list[str]] = []
        self._foils: list[Foil] = []
        for kind, path in files:
            content = load_json(path)
            items: list[Any] = list(content.values()) if isinstance(content, dict) else [content]
            for item in items:
                try:
                    file, true, false = (str(item[key]) for key in ("filename", "caption", "negative_caption"))
                except (TypeError, KeyError):
                    raise UserError(
                        f"{path} is not a file of SugarCrepe's: {str(item)[:60]!r} is no item of it"
                    ) from None
                number = numbers.setdefault(file, len(numbers))
                if number == len(self._captions):
                    self._captions.append([])
                if true not in self._captions[number]:
                    self._captions[number].append(true)
                self._foils.append(Foil(number, kind, kind.partition("_")[0], true, false))
        if not numbers:
            raise UserError(f"{folder} holds no items of SugarCrepe's")
        self._files = list(numbers)
        self.folder = image_folder(files[0][1], self._files[0], images)

    def __len__(self) -> int:
        return len(self._files)

    def record(self, index: int) -> Record:
        return Record(self._files[index], tuple(self._captions[index]))

    def image(self, index: int) -> bytes:
        return read_image_file(self.folder / self._files[index])

    def foils(self, indices: np.ndarray) -> list[Foil]:
        """The two-way choices about these images."""
        wanted = set(indices.tolist())
        return [foil for foil in self._foils if foil.index in wanted]
