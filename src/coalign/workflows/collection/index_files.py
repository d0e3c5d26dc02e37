"""The files of an index: `index.json`, which names the version of the others in use, and each version's embeddings and faiss index.

    shelf/index.json               what the index is of, and the version in use
    shelf/v3/embeddings/           as `coalign embed` writes them
    shelf/v3/index.faiss           nearest-neighbor search

A new version is complete before `index.json` names it, so a killed update leaves the index as it was. Embeddings that a version shares with
the one before are hard links.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from coalign.config import DataConfig, from_json, to_json
from coalign.errors import UserError, first_line
from coalign.files import write_atomically, write_json
from coalign.workflows.collection.embedding_files import (
    MANIFEST,
    EmbeddingFiles,
    is_readable,
    part_files,
    read_manifest,
    read_metadata,
)
from coalign.workflows.collection.nearest import require_faiss

INFO = "index.json"
FAISS = "index.faiss"
EMBEDDINGS = "embeddings"
VERSION = 1  # of the layout
_VERSION_FOLDER = re.compile(r"\.?v\d+")
_AGAIN = "build it with `coalign index MODEL DATA --out {}`"


@dataclass(frozen=True)
class IndexInfo:
    """The contents of index.json."""

    model: str  # a path, absolute, or another reference such as open_clip:NAME:WEIGHTS
    data: str  # a path, absolute, or another reference
    split: str
    reading: DataConfig
    kind: str  # exact or ivf
    recall: float | None  # recall@10 against exact search; None: it is exact
    size: int  # images
    dim: int
    bad: int  # images that could not be read
    state: str  # of the embeddings that index.faiss is of
    current: str  # the folder of the version in use
    faiss_bytes: int  # size of its index.faiss
    version: int = VERSION


def is_index(path: str | Path) -> bool:
    """Whether the path is the folder of an index."""
    return (Path(path) / INFO).is_file()


def read_info(folder: Path) -> IndexInfo:
    """Reads index.json. Raises UserError if the folder is not an index of this version."""
    path = folder / INFO
    if not path.is_file():
        problem = "is not an index" if folder.exists() else "does not exist"
        raise UserError(f"{folder} {problem}; {_AGAIN.format(folder)}.")
    try:
        values = json.loads(path.read_text())
        version = values["version"]
        if version == VERSION:
            return IndexInfo(**{**values, "reading": from_json(DataConfig, values["reading"])})
        reason = f"it has the layout {version}, and this version of coalign reads {VERSION}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else first_line(error)
    raise UserError(f"{path} cannot be read: {reason}; delete {folder} and {_AGAIN.format(folder)}.")


def write_info(folder: Path, info: IndexInfo) -> None:
    values: dict[str, Any] = {each.name: getattr(info, each.name) for each in fields(info)}
    write_json(folder / INFO, {**values, "reading": to_json(info.reading)})


def write_faiss(index: Any, path: Path) -> None:
    """Writes a faiss index atomically. Raises OSError."""
    faiss = require_faiss()

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:  # faiss itself would ignore an error of the last bytes
            faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))

    write_atomically(path, write)


def read_faiss(folder: Path, info: IndexInfo) -> Any:
    """Reads the faiss index in use. Raises UserError if it is missing, truncated, or of other embeddings."""
    faiss = require_faiss()
    path = folder / info.current / FAISS
    reason = "it is missing"
    if path.is_file():
        size = path.stat().st_size
        reason = f"it has {size:,} bytes instead of {info.faiss_bytes:,}"
        if size == info.faiss_bytes:
            try:
                index = faiss.read_index(str(path))
                if (index.ntotal, index.d) == (info.size, info.dim):
                    return index
                reason = f"it has {index.ntotal:,} vectors of {index.d} instead of {info.size:,} of {info.dim}"
            except RuntimeError as error:
                reason = first_line(error).rpartition(": ")[2]
    raise UserError(f"{path} cannot be used: {reason}; run `coalign index` again for {folder}, which writes it again.")


def open_embeddings(folder: Path, info: IndexInfo) -> EmbeddingFiles:
    """Opens the embeddings in use. Raises UserError if they are missing or not those that the index was built of."""
    path = folder / info.current / EMBEDDINGS
    try:
        files = EmbeddingFiles.open(path)
        counts = [read_metadata(part)["samples"] for part in files.files]
    except UserError as error:
        raise damaged(folder, error) from error
    if sum(counts) != len(files) or files.manifest["state"] != info.state:
        raise UserError(f"The embeddings in {path} are not those of the index; run `coalign index` again for {folder}.")
    return files


def damaged(folder: Path, error: UserError) -> UserError:
    """Returns an error of an index's embeddings as one of the index, which is repaired by building it again."""
    problem = str(error).rpartition("; ")[0] or str(error).rstrip(".")  # without the advice for embeddings alone
    return UserError(
        f"The index {folder} is damaged: {problem}; run `coalign index` again for {folder}, which repairs it."
    )


def start_version(folder: Path, before: IndexInfo | None) -> str:
    """Returns the name of the next version, whose folder has links to the embeddings in use, or what an interrupted update wrote.

    Embeddings that are damaged are left out, to be written again. Removes all other versions. Raises UserError or OSError if it cannot be
    written.
    """
    current = before.current if before else None
    name = f"v{int(current[1:]) + 1}" if current else "v1"
    for other in version_folders(folder):
        if other.name not in (current, name):
            shutil.rmtree(other)
    target = folder / name
    if current and not target.exists():
        linking = folder / f".{name}"
        linking.mkdir()
        _link_readable(folder / current / EMBEDDINGS, linking / EMBEDDINGS)
        linking.rename(target)
    target.mkdir(exist_ok=True)
    _remove_damaged(target / EMBEDDINGS)
    return name


def _link_readable(source: Path, target: Path) -> None:
    try:
        files = EmbeddingFiles.open(source)
    except UserError:
        return
    files.link_to(target)


def _remove_damaged(embeddings: Path) -> None:
    try:
        if (embeddings / MANIFEST).exists():
            read_manifest(embeddings)
    except UserError:
        shutil.rmtree(embeddings)
    for part in part_files(embeddings):
        if not is_readable(part):
            part.unlink()


def remove_other_versions(folder: Path, current: str) -> None:
    for other in version_folders(folder):
        if other.name != current:
            shutil.rmtree(other, ignore_errors=True)


def version_folders(folder: Path) -> list[Path]:
    """Returns the folders of all versions, also those that a killed process did not complete."""
    return [path for path in folder.iterdir() if _VERSION_FOLDER.fullmatch(path.name)]


def check_folder(folder: Path, data: str) -> None:
    """Raises UserError if the folder is not new, empty or an index, or is inside the data."""
    if Path(data).is_dir() and folder.resolve().is_relative_to(Path(data).resolve()):
        raise UserError(f"{folder} is inside the data, {data}, which would then contain it; choose an --out beside it.")
    if folder.is_dir():
        others = {path.name for path in folder.iterdir()} - {INFO, "run.lock"}
        others -= {path.name for path in version_folders(folder)}
        if others and not is_index(folder):
            raise UserError(
                f"{folder} is not an index and has other files, such as {min(others)}; choose another --out."
            )
    elif folder.exists():
        raise UserError(f"{folder} is a file; --out is the folder of the index.")
