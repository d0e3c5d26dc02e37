"""`open_source` opens any supported kind of data from one string."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import FOLDER, LeftOut, Source, choose_split
from coalign.data.sources.benchmarks.digits import DIGITS, Digits
from coalign.data.sources.benchmarks.sugarcrepe import SugarCrepe
from coalign.data.sources.benchmarks.winoground import Winoground
from coalign.data.sources.coco import is_coco, is_karpathy, open_coco, open_karpathy
from coalign.data.sources.folders.folder import FolderSource
from coalign.data.sources.folders.metadata_tables import open_other_tables, open_tables
from coalign.data.sources.folders.scan import ARCHIVE_EXTENSIONS, FolderScan, extension, name_files, scan_folder
from coalign.data.sources.labeled import label_source
from coalign.data.sources.mixture import SEPARATOR, open_mixture
from coalign.data.sources.tables.files import table_kind
from coalign.data.sources.tables.hf import is_saved_dataset, open_hf
from coalign.data.sources.tables.json_table import load_json
from coalign.data.sources.tables.parquet_table import holds_samples, open_parquet, parquet_files
from coalign.data.sources.tables.table import TABLE_TYPES, open_table
from coalign.data.sources.tables.table_source import TableSource
from coalign.data.sources.tar.remote import is_remote
from coalign.data.sources.tar.shards import ShardSource, open_shards, shards_in
from coalign.data.splits import assign_splits
from coalign.data.text.captions import printable
from coalign.data.text.prompts import templates
from coalign.errors import UserError

_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SUPPORTED = (
    "a folder of images, a CSV, TSV, JSON, Parquet or Arrow table, a folder of Parquet files, .tar shards, COCO captions JSON, "
    "a saved Hugging Face dataset, hf:owner/name, coco:captions.json:images, sugarcrepe:folder:images, winoground:folder, digits, or scenes"
)


def open_source(spec: str, split: str | None = None, reading: DataConfig = DETECT) -> Source:
    """Opens image-text pairs of any supported kind, without reading all of them.

    Args:
        spec: A folder, a table, a shard pattern, `scenes:8192`, `hf:owner/name`, `coco:captions.json:images`, or a mixture such as
            `2*photos + 0.5*web/{00..10}.tar`.
        split: "train", "val", "test" or another split of the data. If the data has no validation split, "val" are the 5 % that `train`
            holds out by default. None: all samples.
        reading: The columns of a table to read. Unset ones are detected automatically.

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
    source = open_any(spec, reading)
    check_columns([source], reading)
    if split is None:
        return source
    if _is_scenes(spec) and not _is_mixture(spec):
        return _open_scenes(spec, split)
    return choose_split(source, split, assign_splits(source, group=reading.group_column)[0])


def open_any(spec: str, reading: DataConfig) -> Source:
    """Opens all samples as `open_source` does, but without `check_columns`."""
    if reading.captions_from is not None and reading.caption_column:
        raise UserError("--captions-from and --caption-column both set the captions; omit one of them.")
    if _is_mixture(spec):
        return open_mixture(
            spec, lambda part: _open_scenes(part, None) if _is_scenes(part) else _open_labeled(part, reading)
        )
    if _is_scenes(spec):
        if reading.captions_from is not None:
            raise UserError(f"{spec} has its own captions; omit --captions-from.")
        return _open_scenes(spec, None)
    return _open_labeled(spec, reading)


def check_columns(sources: Sequence[Source], reading: DataConfig) -> None:
    """Raises UserError if an option on the columns of a table has no effect, as none of the sources has a table."""
    if not any(source.has_columns for source in sources) and (option := _column_option(reading)):
        names = list(dict.fromkeys(source.name for source in sources))
        without = f"{' and '.join(names)} {'has' if len(names) == 1 else 'have'} no table with columns"
        raise UserError(f"{without}, which {option} needs; name a table or omit the option.")


def _is_mixture(spec: str) -> bool:
    return SEPARATOR in spec and not os.path.exists(spec)


def _is_scenes(spec: str) -> bool:
    return spec == "scenes" or spec.startswith("scenes:")


def _open_scenes(spec: str, split: str | None) -> Source:
    from coalign.data.scenes.source import open_scenes

    return open_scenes(spec.partition(":")[2], split)


def _column_option(reading: DataConfig) -> str | None:
    """The first option that is given for the columns of a table."""
    options = ("image_column", "caption_column", "tag_column", "separator")
    return next((f"--{name.replace('_', '-')}" for name in options if getattr(reading, name)), None)


def _open_labeled(spec: str, reading: DataConfig) -> Source:
    source = _open(spec, reading)
    if reading.captions_from is None:
        return source
    return label_source(source, reading.captions_from, templates(*reading.prompts))


def _open(spec: str, reading: DataConfig) -> Source:
    if spec.startswith("hf:"):
        return open_hf(spec[3:], reading)
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
    if spec == DIGITS and not os.path.exists(spec):
        return Digits()
    spec = os.path.expanduser(spec)
    if not os.path.exists(spec) and any(character in spec for character in "{*?["):
        if not spec.endswith(".tar"):
            raise UserError(f"The pattern {spec} does not end with .tar; patterns are supported for .tar shards only.")
        return open_shards(spec)
    path = _existing(spec)
    if path.is_dir():
        return _open_folder(path, reading)
    if path.suffix.lower() in (".arrow", ".feather"):
        return open_hf(spec, reading)
    if path.name.lower().endswith((".tar", *_COMPRESSED_TARS)):  # indexing a compressed shard raises a helpful error
        return open_shards(spec)
    if table_kind(path) in TABLE_TYPES:
        return _open_table(path, reading)
    if extension(path.name) in ARCHIVE_EXTENSIONS:
        raise UserError(f"{path} is an archive; extract it and open the folder.")
    raise UserError(f"Unsupported file type: {path}. Supported data: {_SUPPORTED}.")


def _open_table(path: Path, reading: DataConfig) -> Source:
    if table_kind(path) == ".json":
        content = load_json(path)
        if is_coco(content) or is_karpathy(content):
            return open_karpathy(path) if is_karpathy(content) else open_coco(path)
    return open_table(path, reading)


def _open_folder(path: Path, reading: DataConfig) -> Source:
    """Opens a saved dataset, metadata tables, shards or images, in this order. Shards are read unless there are more images."""
    if is_saved_dataset(path):
        return open_hf(str(path), reading)
    scan = scan_folder(str(path))
    shards = shards_in(scan)
    if shards and len(shards) >= len(scan.images):
        source: Source = ShardSource(printable(str(path)), shards)
        names = {os.path.relpath(shard, path) for shard in shards}
        source.unread = [*source.unread, *name_files(scan.images), *scan.unread(used=names)]
        return source
    if (tables := open_tables(scan, reading, _open_table)) is not None:
        return tables
    files = parquet_files(path)
    if files and (holds_samples(files[0], reading) or not (scan.images or scan.unsupported or scan.archives)):
        return _open_parquet_folder(path, scan, reading)
    compressed = [name for name in scan.archives if name.lower().endswith(_COMPRESSED_TARS)]
    if compressed and not scan.images:
        raise UserError(
            f"{path} contains compressed shards such as {compressed[0]}, which do not support random access; "
            "decompress them to plain .tar files."
        )
    if reading.captions_from != FOLDER and (tables := open_other_tables(scan, reading, _open_table)) is not None:
        return tables
    return FolderSource(path, scan, needs_captions=reading.captions_from is None)


def _open_parquet_folder(path: Path, scan: FolderScan, reading: DataConfig) -> Source:
    """Opens a folder of Parquet files. Images beside them that they do not name are left out; if they hold images, not read."""
    source = open_parquet(path, reading)
    used = {os.path.relpath(file, path) for file in parquet_files(path)}
    if isinstance(source, TableSource):
        paths = filter(None, map(source.image_path, range(len(source))))
        used.update(os.path.relpath(image, path) for image in paths)
        if unnamed := [image for image in scan.images if image not in used]:
            reason = "image that is not in any of the Parquet files"
            source.left_out = [*source.left_out, LeftOut(printable(unnamed[0]), reason, len(unnamed))]
    else:
        source.unread = [*source.unread, *name_files(scan.images)]
    source.left_out = [*source.left_out, *scan.left_out(except_for=used)]
    source.unread = [*source.unread, *scan.unread(used)]
    return source


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
