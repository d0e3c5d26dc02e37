"""Hugging Face datasets: saved to disk, Arrow files, or by Hub id. Requires the `hf` extra."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import DataConfig
from coalign.data.sources.base import LeftOut, Source, Splits, canonical_split, read_image_file, splits_by_name
from coalign.data.sources.tables.columns import choose_columns, image_name
from coalign.data.sources.tables.parquet_table import download_failure, is_img2dataset
from coalign.data.sources.tables.row_groups import encoded
from coalign.data.sources.tables.table_source import locate_images, no_rows, probed
from coalign.data.text.captions import caption_values, make_record, tag_values
from coalign.errors import NoImage, UserError
from coalign.types import Record


class HFSource(Source):
    """All splits of a dataset, concatenated. Images are not decoded: `image` returns the encoded file."""

    has_columns = True

    def __init__(self, name: str, folder: Path, parts: dict[str, Any], reading: DataConfig) -> None:
        from datasets import ClassLabel

        self.name = name
        features = next(iter(parts.values())).features
        embedded = [column for column, feature in features.items() if _holds_images(feature)]
        self.columns = choose_columns(name, list(features), reading, embedded)
        image = self.columns.image
        parts, self.left_out = _downloaded(parts)
        if not parts:
            raise no_rows(name, self.left_out)
        parts = {split: part.with_format(None) for split, part in parts.items()}
        self._images = [
            part.select_columns([image]).cast_column(image, _undecoded(features[image])) for part in parts.values()
        ]
        unread = {*embedded} - {*self.columns.captions, self.columns.tags, self.columns.split}
        cells = [self._images[0][row][image] for row in probed(len(self._images[0]))]
        some = [image_name(cell) for cell in cells if isinstance(cell, str)]
        self._paths = locate_images(name, self.columns, folder, some, self.left_out)
        self._texts = [part.remove_columns(list(unread)) for part in parts.values()]
        self._labels = {column: feature for column, feature in features.items() if isinstance(feature, ClassLabel)}
        self._ends = np.cumsum([len(part) for part in parts.values()])
        self._names = list(parts)
        bounds = zip(self._names, [0, *self._ends], self._ends)
        ranges = {canonical_split(split) or split: np.arange(start, end) for split, start, end in bounds}
        self.splits = ranges if set(ranges) - {"train"} else self._splits_by_column()

    def _splits_by_column(self) -> Splits | None:
        if self.columns.split is None:
            return None
        return splits_by_name([str(name or "") for part in self._texts for name in part[self.columns.split]])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def _locate(self, index: int) -> tuple[int, int]:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return part, index - (int(self._ends[part - 1]) if part else 0)

    def record(self, index: int) -> Record:
        part, row_number = self._locate(index)
        row = self._texts[part][row_number]
        for column, feature in self._labels.items():  # -1: unlabeled
            row[column] = None if row[column] in (None, -1) else feature.int2str(row[column])
        key = f"{self._names[part]}/{row_number}"
        raws = [raw for name in self.columns.captions for raw in caption_values(row[name])]
        tags = tag_values(row[self.columns.tags]) if self.columns.tags else ()
        used = (self.columns.image, self.columns.tags, self.columns.split, *self.columns.captions)
        return make_record(key, raws, tags, {name: value for name, value in row.items() if name not in used})

    def image(self, index: int) -> bytes:
        part, row_number = self._locate(index)
        value = encoded(self._images[part][row_number][self.columns.image])
        if isinstance(value, str):
            return read_image_file(self._paths.path(image_name(value)))
        if not value:
            raise NoImage("no image", f"{self._names[part]}/{row_number}")
        return value


def _holds_images(feature: Any) -> bool:
    """Whether a feature is an image, bytes, or a struct or list of them."""
    from datasets import Image, List, Value

    if isinstance(feature, dict):
        return "bytes" in feature or any(map(_holds_images, feature.values()))
    if isinstance(feature, List):
        return _holds_images(feature.feature) or (
            isinstance(feature.feature, Value) and feature.feature.dtype in ("int8", "uint8")
        )
    return isinstance(feature, Image) or (isinstance(feature, Value) and "binary" in feature.dtype)


def _undecoded(feature: Any) -> Any:
    """The feature of the same values with images as encoded files."""
    from datasets import Image, List

    if isinstance(feature, List):
        return List(_undecoded(feature.feature))
    return Image(decode=False) if isinstance(feature, Image) else feature


def _downloaded(parts: dict[str, Any]) -> tuple[dict[str, Any], list[LeftOut]]:
    """Leaves out the rows whose image img2dataset could not download, and parts that are empty then."""
    left_out: list[LeftOut] = []
    kept: dict[str, Any] = {}
    for split, part in parts.items():
        rows = np.arange(len(part))
        if is_img2dataset(part.column_names):
            failures = list(map(download_failure, part["status"]))
            rows = np.flatnonzero([failure is None for failure in failures])
            failed = Counter(failure for failure in failures if failure is not None)
            left_out += [LeftOut(split, reason, count) for reason, count in failed.items()]
        if len(rows):
            kept[split] = part if len(rows) == len(part) else part.select(rows)
    return kept, left_out


def open_hf(spec: str, reading: DataConfig) -> HFSource:
    """Opens a folder written by `save_to_disk`, an Arrow or Parquet file, a folder, or a Hub id "owner/name".

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
            data = datasets.load_dataset("parquet" if path.suffix.lower() == ".parquet" else "arrow", data_files=spec)
        else:
            data = datasets.load_dataset(spec)
    except Exception as error:  # missing datasets, network failures, denied access and damaged files raise many types
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"Cannot open the Hugging Face dataset {spec}: {reason[0]}") from None
    parts = dict(data) if isinstance(data, datasets.DatasetDict) else {"train": data}
    parts = {str(split): part for split, part in parts.items() if len(part)}
    if not parts:
        raise UserError(f"The Hugging Face dataset {spec} has no rows.")
    folder = path if path.is_dir() else path.parent if path.is_file() else Path()
    return HFSource(spec, folder, parts, reading)


def is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )
