"""`open_source` opens any supported kind of data from one string."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from coalign.data.sources.base import Source, choose_split, is_image_name
from coalign.data.sources.benchmarks.sugarcrepe import SugarCrepe
from coalign.data.sources.benchmarks.winoground import Winoground
from coalign.data.sources.coco import is_coco, is_karpathy, open_coco, open_karpathy
from coalign.data.sources.folder import FolderSource
from coalign.data.sources.hf import is_saved_dataset, open_hf
from coalign.data.sources.mixture import SEPARATOR, open_mixture
from coalign.data.sources.remote import is_remote
from coalign.data.sources.shards import open_shards, shards_in
from coalign.data.sources.table import load_json, open_table
from coalign.data.splits import assign_splits
from coalign.data.text.captions import printable
from coalign.errors import UserError

_TABLES_IN_FOLDERS = ("metadata.jsonl", "metadata.csv", "captions.jsonl")
_TABLE_TYPES = frozenset({".csv", ".tsv", ".jsonl", ".ndjson", ".parquet"})
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SUPPORTED = (
    "a folder of images, a CSV, TSV, JSONL or Parquet table, .tar shards, COCO captions JSON, "
    "a saved Hugging Face dataset, hf:owner/name, coco:captions.json:images, sugarcrepe:folder:images, winoground:folder, or scenes"
)


def open_source(
    spec: str,
    split: str | None = None,
    *,
    image_column: str | None = None,
    caption_columns: Sequence[str] | None = None,
    tags_column: str | None = None,
) -> Source:
    """Opens image-text pairs of any supported kind, without reading all of them.

    Args:
        spec: A folder, a table, a shard pattern, `scenes:8192`, `hf:owner/name`, `coco:captions.json:images`, or a mixture such as
            `2*photos + 0.5*web/{00..10}.tar`.
        split: "train", "val", "test" or another split of the data. If the data has no validation split, "val" are the 5 % that `train`
            holds out by default. None: all samples.
        image_column: The column of a table with image paths. None: detected automatically. The columns apply to tables only.
        caption_columns: The columns with captions. None: detected automatically.
        tags_column: The column with tags. None: `tags`, if there is one.

    Returns:
        A sequence of samples with random access.

    Raises:
        UserError: The data is missing, empty or of an unsupported kind, or has no such split.

    Example:
        ```python
        pairs = coalign.open_data("photos", split="val")
        record = pairs.record(0)
        print(record.key, record.captions)
        ```
    """
    if SEPARATOR in spec and not os.path.exists(spec):
        mixture = open_mixture(spec, open_source)
        return mixture if split is None else choose_split(mixture, split, assign_splits(mixture)[0])
    if spec == "scenes" or spec.startswith("scenes:"):
        from coalign.data.scenes.source import open_scenes

        return open_scenes(spec.partition(":")[2], split)
    source = _open(spec, image_column, caption_columns, tags_column)
    if split is None:
        return source
    return choose_split(source, split, assign_splits(source)[0])


def _open(
    spec: str, image_column: str | None, caption_columns: Sequence[str] | None, tags_column: str | None
) -> Source:
    if spec.startswith("hf:"):
        return open_hf(spec[3:])
    if spec.startswith("coco:"):
        captions, _, images = spec[5:].partition(":")
        path, folder = _existing(captions), Path(images) if images else None
        return open_karpathy(path, folder) if is_karpathy(load_json(path)) else open_coco(path, folder)
    if spec.startswith("sugarcrepe:"):
        files, _, images = spec.removeprefix("sugarcrepe:").partition(":")
        return SugarCrepe(_existing(files), Path(images) if images else None)
    if spec.startswith("winoground:"):
        return Winoground(_existing(spec.removeprefix("winoground:")))
    if is_remote(spec):
        if not spec.split("?")[0].endswith(".tar"):
            raise UserError(f"{spec} does not end with .tar; only .tar shards can be read from a URL.")
        return open_shards(spec)
    spec = os.path.expanduser(spec)
    if not os.path.exists(spec) and any(character in spec for character in "{*?["):
        if not spec.endswith(".tar"):
            raise UserError(f"The pattern {spec} does not end with .tar; patterns are supported for .tar shards only.")
        return open_shards(spec)
    path = _existing(spec)
    if path.is_dir():
        return _open_folder(path, image_column, caption_columns, tags_column)
    kind = path.suffix.lower()
    if path.name.lower().endswith((".tar", *_COMPRESSED_TARS)):  # indexing a compressed shard raises a helpful error
        return open_shards(spec)
    if kind == ".json":
        content = load_json(path)
        if is_coco(content) or is_karpathy(content):
            return open_karpathy(path) if is_karpathy(content) else open_coco(path)
    if kind in _TABLE_TYPES or kind == ".json":
        return open_table(path, image_column, caption_columns, tags_column)
    raise UserError(f"Unsupported file type: {path}. Supported data: {_SUPPORTED}.")


def _open_folder(
    path: Path, image_column: str | None, caption_columns: Sequence[str] | None, tags_column: str | None
) -> Source:
    if is_saved_dataset(path):
        return open_hf(str(path))
    for name in _TABLES_IN_FOLDERS:
        if (path / name).is_file():
            return open_table(path / name, image_column, caption_columns, tags_column)
    if shards_in(str(path)):
        return open_shards(str(path))
    compressed = sorted(name for name in os.listdir(path) if name.endswith(_COMPRESSED_TARS))
    if compressed and not any(is_image_name(name) for name in os.listdir(path)):
        raise UserError(
            f"{path} contains compressed shards such as {compressed[0]}, which do not support random access; "
            "decompress them to plain .tar files."
        )
    return FolderSource(path)


def _existing(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.exists():
        return path
    missing = path  # the topmost component that does not exist
    while not missing.parent.exists():
        missing = missing.parent
    siblings = os.listdir(missing.parent) if missing.parent.is_dir() else []
    matches = difflib.get_close_matches(missing.name, siblings, n=1)
    hint = f"Did you mean {missing.parent / matches[0]}?" if matches else f"Supported data: {_SUPPORTED}."
    raise UserError(f"No such file or folder: {printable(spec)}. {hint}")
