"""Files: atomic writing, the cache folder, rows of JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object], *, temporary: Path | None = None) -> None:
    """Replaces `path` with the file that `write` creates at the path passed to it. Readers see the old or new file, never a partial one.

    On failure, keeps the old file and removes the new one. `temporary` overrides the default name, which contains the process id: a caller
    that holds a lock can use a fixed name, to overwrite the leftovers of a killed process.
    """
    if temporary is None:
        temporary = path.with_name(f".{path.name}.{os.getpid()}{path.suffix}")  # np.savez appends a missing suffix
    try:
        write(temporary)
        with open(temporary, "rb+") as file:  # Windows syncs no read-only files
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_at(file: int, data: memoryview, start: int) -> None:
    """Writes all of `data` at a position of an open file."""
    while data:
        if hasattr(os, "pwrite"):
            written = os.pwrite(file, data, start)
        else:  # Windows
            os.lseek(file, start, os.SEEK_SET)
            written = os.write(file, data)
        data, start = data[written:], start + written


def write_bytes(path: Path, data: bytes) -> None:
    """Writes the bytes atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(data))


def write_text(path: Path, text: str) -> None:
    """Writes the text atomically, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, values: Any, *, indent: int = 2, **options: Any) -> None:
    """Writes the values atomically as JSON with a newline at the end. `options` go to `json.dumps`."""
    write_text(path, json.dumps(values, indent=indent, **options) + "\n")


def save_tensors(path: Path, tensors: Mapping[str, Any], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors as a safetensors file with the usual permissions; the library's own are for the owner alone."""
    from safetensors.torch import save_file  # imports torch

    path.touch()
    mode = path.stat().st_mode
    save_file(dict(tensors), path, metadata=metadata)
    path.chmod(mode)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, none if it is absent."""
    return [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []


def cache_folder() -> Path:
    """Returns the folder for recomputable files that cannot be stored beside the data."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "coalign"
