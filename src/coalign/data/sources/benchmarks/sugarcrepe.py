"""SugarCrepe (Hsieh et al. 2023): COCO validation images with true captions and hard negatives that differ in one element."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.sources.base import Source, read_image_file
from coalign.data.sources.coco import resolve_image_folder
from coalign.data.sources.tables.json_table import load_json
from coalign.data.text.captions import printable
from coalign.errors import UserError
from coalign.types import Foil, Record

# The seven files: how the negative captions were made, and of what.
KINDS = ("replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att", "add_obj", "add_att")


class SugarCrepe(Source):
    """One sample per image in the folder's JSON files, with its true captions. `foils` returns the hard negatives."""

    def __init__(self, folder: Path, images: Path | None = None) -> None:
        self.name = printable(str(folder))
        files = [(kind, folder / f"{kind}.json") for kind in KINDS if (folder / f"{kind}.json").is_file()]
        if not files:
            raise UserError(
                f"{folder} contains none of the SugarCrepe files: {', '.join(f'{kind}.json' for kind in KINDS)}"
            )
        index_of: dict[str, int] = {}
        self._captions: list[list[str]] = []
        self._foils: list[Foil] = []
        for kind, path in files:
            content = load_json(path)
            items: list[Any] = list(content.values()) if isinstance(content, dict) else [content]
            for item in items:
                try:
                    file, true, false = (str(item[key]) for key in ("filename", "caption", "negative_caption"))
                except (TypeError, KeyError):
                    raise UserError(f"{path} is not a SugarCrepe file: invalid item {str(item)[:60]!r}") from None
                index = index_of.setdefault(file, len(index_of))
                if index == len(self._captions):
                    self._captions.append([])
                if true not in self._captions[index]:
                    self._captions[index].append(true)
                self._foils.append(Foil(index, kind, kind.partition("_")[0], true, false))
        if not index_of:
            raise UserError(f"The SugarCrepe files in {folder} contain no items.")
        self._files = list(index_of)
        self.folder = resolve_image_folder(files[0][1], self._files, images)

    def __len__(self) -> int:
        return len(self._files)

    def record(self, index: int) -> Record:
        return Record(self._files[index], tuple(self._captions[index]))

    def image(self, index: int) -> bytes:
        return read_image_file(self.folder / self._files[index])

    def foils(self, indices: np.ndarray) -> list[Foil]:
        """The pairs of true and false captions of the samples at `indices`."""
        selected = set(indices.tolist())
        return [foil for foil in self._foils if foil.index in selected]
