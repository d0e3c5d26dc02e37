"""Hugging Face datasets: saved to disk, local Parquet files with embedded images, or by Hub id. Requires the `hf` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.sources.base import Source, canonical_split, read_image_file
from coalign.data.sources.table import choose_columns
from coalign.data.text.captions import caption_values, make_record, tag_values
from coalign.errors import BadSample, UserError
from coalign.types import Record


class HFSource(Source):
    """All splits of a dataset, concatenated. Images are not decoded: `image` returns the encoded file."""

    def __init__(self, name: str, parts: dict[str, Any]) -> None:
        from datasets import Image

        self.name = name
        features = next(iter(parts.values())).features
        encoded = [column for column, feature in features.items() if isinstance(feature, Image)]
        self.columns = choose_columns(name, list(features), image_column=encoded[0] if encoded else None)
        image = self.columns.image
        self._images = [part.with_format(None).select_columns([image]) for part in parts.values()]
        if encoded:
            self._images = [part.cast_column(image, Image(decode=False)) for part in self._images]
        self._texts = [part.with_format(None).remove_columns(encoded) for part in parts.values()]
        self._ends = np.cumsum([len(part) for part in parts.values()])
        self._names = list(parts)
        bounds = zip(self._names, [0, *self._ends], self._ends)
        ranges = {canonical_split(split) or split: np.arange(start, end) for split, start, end in bounds}
        self.splits = ranges if set(ranges) - {"train"} else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def record(self, index: int) -> Record:
        part, row_number = self._locate(index)
        row = self._texts[part][row_number]
        key = f"{self._names[part]}/{row_number}"
        raws = [raw for name in self.columns.captions for raw in caption_values(row[name])]
        tags = tag_values(row[self.columns.tags]) if self.columns.tags else ()
        used = (self.columns.image, self.columns.tags, self.columns.split, *self.columns.captions)
        return make_record(key, raws, tags, {name: value for name, value in row.items() if name not in used})

    def image(self, index: int) -> bytes:
        part, row_number = self._locate(index)
        value = self._images[part][row_number][self.columns.image]
        if isinstance(value, dict):
            if value.get("bytes") is not None:
                return value["bytes"]
            value = value.get("path")
        if not isinstance(value, str):
            raise BadSample("no image", f"{self._names[part]}/{row_number}")
        return read_image_file(value)


def open_hf(spec: str) -> HFSource:
    """Opens a folder written by `save_to_disk`, a Parquet file or folder with embedded images, or a Hub id "owner/name".

    Raises UserError if the dataset cannot be opened or is empty.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f'Reading {spec} requires the "hf" extra: pip install "coalign[hf]"') from None
    path = Path(spec)
    try:
        if is_saved_dataset(path):
            data = datasets.load_from_disk(spec)
        elif path.is_file():
            data = datasets.load_dataset("parquet", data_files=spec)
        else:
            data = datasets.load_dataset(spec)
    except Exception as error:  # missing datasets, network failures, denied access and damaged files raise many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"Cannot open the Hugging Face dataset {spec}: {reason[0]}") from None
    parts = dict(data) if isinstance(data, datasets.DatasetDict) else {"train": data}
    parts = {str(split): part for split, part in parts.items() if len(part)}
    if not parts:
        raise UserError(f"The Hugging Face dataset {spec} has no rows.")
    return HFSource(spec, parts)


def is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )
