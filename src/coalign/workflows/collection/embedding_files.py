"""Embeddings on disk: a folder of Parquet files with a manifest, or a single Parquet file."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from coalign.errors import UserError, first_line
from coalign.files import write_atomically, write_json

if TYPE_CHECKING:
    import pyarrow

MANIFEST = "_manifest.json"  # pandas and Arrow skip names with an underscore or a dot when they read a folder
LOCK = ".lock"
VERSION = 1
PRECISIONS = ("float16", "float32")
_METADATA = b"coalign"  # key in the schema: counts of a part, the manifest of a single file


class DamagedFile(UserError):
    """A file of embeddings cannot be read."""


@dataclass(frozen=True)
class EmbeddingFiles:
    """Embeddings that `embed` has written: one row per sample, in the order of `files`.

    Columns: `key`, `captions`, `tags`, `path` of the image file if there is one, `stamp` (changes if the sample does), `problem` (why its
    image has no embedding), and the normalized vectors `image` and `text`, which are null without a readable image or a caption.

    Attributes:
        path: The folder or file.
        manifest: What the embeddings were made of: `model`, `data`, `precision`, `dim`, `counts`, `skipped`. `state` changes with the rows.
        files: The Parquet files.
    """

    path: Path
    manifest: dict[str, Any]
    files: Sequence[Path]

    @staticmethod
    def open(path: str | Path) -> EmbeddingFiles:
        """Opens a folder or file. Raises UserError if it holds no embeddings of this version, or is not finished."""
        path = Path(path)
        manifest = read_manifest(path) if path.is_dir() else _file_manifest(path)
        if not manifest["complete"]:
            raise UserError(
                f"The embeddings in {path} are not finished; run the command that writes them again, which resumes."
            )
        return EmbeddingFiles(path, manifest, part_files(path) if path.is_dir() else [path])

    def __len__(self) -> int:
        return int(self.manifest["counts"]["samples"])

    @property
    def dim(self) -> int:
        return int(self.manifest["dim"])

    def batches(self, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
        """Yields the rows in order, a part at a time. columns: None for all."""
        for path in self.files:
            yield from read_groups(path, columns)

    def table(self, columns: Sequence[str] | None = None) -> pyarrow.Table:
        """Returns all rows of some columns. With vectors, it takes the memory of all of them."""
        import pyarrow

        return pyarrow.concat_tables(self.batches(columns))

    def keys(self) -> list[str]:
        return self.table(["key"])["key"].to_pylist()

    def images(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the embeddings of the readable images, float32 [image, dim], and the row of each, int64 [image], ascending."""
        return self._vectors("image")

    def texts(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns the embeddings of the captions, as `images` those of images: the normalized mean over a sample's captions."""
        return self._vectors("text")

    def _vectors(self, column: str) -> tuple[np.ndarray, np.ndarray]:
        if not self.manifest[f"{column}s"]:
            raise UserError(f"{self.path} was written without embeddings of {column}s.")
        count = self.manifest["counts"][f"{column}s"]
        vectors, rows = np.empty((count, self.dim), np.float32), np.empty(count, np.int64)
        filled = first = 0
        for batch in self.batches([column]):
            found, own_rows = vectors_of(batch[column], self.dim)
            end = filled + len(found)
            if end <= count:  # else the sum differs, below
                vectors[filled:end], rows[filled:end] = found, own_rows + first
            filled, first = end, first + len(batch)
        if filled != count:
            raise UserError(f"{self.path} has {filled:,} {column} embeddings instead of {count:,}; write it again.")
        return vectors, rows

    def link_to(self, folder: Path) -> None:
        """Makes a folder with the same content, by hard links where the disk has them. Updates of either do not change the other.

        Raises UserError if it cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for path in [*self.files, self.path / MANIFEST]:
                (folder / path.name).unlink(missing_ok=True)
                try:
                    os.link(path, folder / path.name)
                except OSError:
                    shutil.copyfile(path, folder / path.name)
        except OSError as error:
            raise unwritable(folder, error) from error


def vectors_of(column: pyarrow.ChunkedArray, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the vectors in a column, [vector, dim] in its precision, and the rows that have one."""
    array = column.combine_chunks()
    rows = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    return array.flatten().to_numpy(zero_copy_only=False).reshape(-1, dim), rows


# ---------------------------------------------------------------- reading


def part_files(folder: Path) -> list[Path]:
    """Returns the Parquet files of a folder of embeddings, in the order of their rows."""
    return sorted(folder.glob("part-*.parquet"))


def read_groups(path: Path, columns: Sequence[str] | None = None) -> Iterator[pyarrow.Table]:
    """Yields the row groups of a file. Raises UserError if it is damaged."""
    arrow, parquet = require_pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for number in range(file.num_row_groups):
                yield file.read_row_group(number, columns=columns, use_threads=False)
    except (arrow.ArrowException, OSError) as error:
        raise _damaged(path, error) from error


def read_part(path: Path) -> pyarrow.Table:
    """Returns all rows of a part."""
    arrow, _ = require_pyarrow()
    return arrow.concat_tables(read_groups(path))


def read_metadata(path: Path) -> dict[str, Any]:
    """Returns what `write_part` has stored beside the rows. Raises UserError if there is none."""
    arrow, parquet = require_pyarrow()
    try:
        return json.loads(parquet.read_schema(path).metadata[_METADATA])
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (arrow.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        raise _damaged(path, error) from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """Returns the manifest of a folder. Raises UserError if there is none of this version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(f"{folder} holds no embeddings; `coalign embed` writes them.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / MANIFEST} cannot be read ({first_line(error)}); write the folder again.") from error
    return _of_this_version(manifest, folder)


def _file_manifest(path: Path) -> dict[str, Any]:
    return _of_this_version(read_metadata(path), path)


def _of_this_version(manifest: Any, path: Path) -> dict[str, Any]:
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != VERSION:
        raise UserError(f"{path} was not written by `coalign embed` of this version; write it again.")
    return manifest


def is_readable(part: Path) -> bool:
    """Whether all rows of a part can be read."""
    try:
        read_metadata(part)
        for _ in read_groups(part):
            pass
    except DamagedFile:
        return False
    return True


def _damaged(path: Path, error: Exception) -> DamagedFile:
    return DamagedFile(f"{path} is not a readable file of embeddings ({first_line(error)}); delete it and embed again.")


# ---------------------------------------------------------------- writing


def schema(dim: int, precision: str, images: bool, texts: bool) -> pyarrow.Schema:
    """Returns the columns of the files."""
    import pyarrow

    text, texts_type = pyarrow.string(), pyarrow.list_(pyarrow.string())
    vector = pyarrow.list_(pyarrow.float16() if precision == "float16" else pyarrow.float32(), dim)
    fields = {"key": text, "captions": texts_type, "tags": texts_type, "path": text, "stamp": text, "problem": text}
    if images:
        fields["image"] = vector
    if texts:
        fields["text"] = vector
    return pyarrow.schema(list(fields.items()))


def write_part(path: Path, table: pyarrow.Table) -> None:
    """Writes a part atomically, with the number of its vectors. Raises UserError if it cannot be written."""
    _, parquet = require_pyarrow()
    counts = {
        f"{name}s": len(table) - table[name].null_count if name in table.column_names else 0
        for name in ("image", "text")
    }
    table = table.replace_schema_metadata({_METADATA: json.dumps({"samples": len(table), **counts})})
    try:
        write_atomically(
            path,
            lambda temporary: parquet.write_table(table, temporary, row_group_size=max(1, len(table)), **_OPTIONS),
        )
    except OSError as error:
        raise unwritable(path, error) from error


def write_file(path: Path, files: Sequence[Path], columns: pyarrow.Schema, manifest: dict[str, Any]) -> None:
    """Writes the rows of all parts to one file, with the manifest. Raises UserError if it cannot be written."""
    _, parquet = require_pyarrow()

    def write(temporary: Path) -> None:
        with parquet.ParquetWriter(
            temporary, columns.with_metadata({_METADATA: json.dumps(manifest)}), **_OPTIONS
        ) as out:
            for part in files:
                for group in read_groups(part):
                    out.write_table(group.replace_schema_metadata(None).cast(columns))

    try:
        write_atomically(path, write)
    except OSError as error:
        raise unwritable(path, error) from error


_OPTIONS: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    try:
        write_json(folder / MANIFEST, manifest, ensure_ascii=False)
    except OSError as error:
        raise unwritable(folder / MANIFEST, error) from error


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files of a killed process."""
    for path in folder.glob(".part-*"):
        with suppress(OSError):
            path.unlink()


def state_of(keys_and_stamps: Iterator[pyarrow.Table]) -> str:
    """Returns a hash that changes if a row is added, removed, moved or made again from a changed sample."""
    digest = hashlib.blake2b(digest_size=12)
    for batch in keys_and_stamps:
        digest.update("\n".join(batch["key"].to_pylist() + batch["stamp"].to_pylist()).encode())
    return digest.hexdigest()


def unwritable(path: Path, error: OSError) -> UserError:
    return UserError(
        f"{path} could not be written ({error.strerror or first_line(error)}); what is complete is kept: "
        "free some space or choose another disk, and run the command again to resume."
    )


def require_pyarrow() -> tuple[Any, Any]:
    """Returns pyarrow and pyarrow.parquet. Raises UserError if it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError('Files of embeddings need the extra "index": pip install "coalign[index]".') from None
    return pyarrow, pyarrow.parquet
