"""Writing samples to a folder that `open_source` can read: metadata.jsonl, and images that are not files already."""

from __future__ import annotations

import io
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.sources.base import Source
from coalign.errors import NoImage, UserError
from coalign.files import write_atomically
from coalign.types import Record

_SIGNATURES = {
    "jpg": rb"\xff\xd8",
    "png": rb"\x89PNG",
    "gif": rb"GIF8",
    "webp": rb"RIFF....WEBP",
    "bmp": rb"BM",
    "tif": rb"II\*\0|MM\0\*",
}


@contextmanager
def new_folder(out: Path, content: str) -> Iterator[Path]:
    """Yields a folder that becomes `out` when the block ends without an exception; its parent is a temporary folder.

    Raises UserError if `out` is not empty or `content` ("The dataset") cannot be written.
    """
    out = Path(os.path.abspath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; choose another folder or empty it.")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as work:
            staging = Path(work) / "staging"  # unlike the temporary folder, readable by other users
            staging.mkdir()
            yield staging
            os.replace(staging, out)
    except OSError as error:
        raise UserError(f"{content} cannot be written to {out}: {error.strerror or error}.") from error


def write_rows(source: Source, samples: Iterable[tuple[int, Record]], out: str | Path) -> Path:
    """Writes samples, given by their index in `source` and their new record, to `out`/metadata.jsonl. Returns its path.

    The columns are image, captions, tags and, if available, split and facts. Image files are referenced by absolute path; other images
    (archive members, pixels) are written to `out`/images. Raises UserError if `out` is not empty, and BadSample if an image cannot be read.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"The folder {out} is not empty; choose another folder or empty it.")
        write_json_lines(folder / "metadata.jsonl", _rows(source, samples, folder))
    except OSError as error:
        raise UserError(f"The dataset cannot be written to {out}: {error.strerror or error}.") from None
    return folder / "metadata.jsonl"


def _rows(source: Source, samples: Iterable[tuple[int, Record]], folder: Path) -> Iterable[dict[str, Any]]:
    splits = {int(index): name for name, indices in (source.splits or {}).items() for index in indices}
    for index, record in samples:
        image = None
        with suppress(NoImage):
            path = source.image_path(index)
            image = os.path.abspath(path) if path is not None else _write_image(source.image(index), folder, index)
        row: dict[str, Any] = {"image": image, "captions": record.captions, "tags": record.tags}
        if index in splits:
            row["split"] = splits[index]
        if record.facts:
            row["facts"] = dict(record.facts)
        yield row


def _write_image(image: bytes | np.ndarray, folder: Path, index: int) -> str:
    """Writes an encoded image as is, or pixels as PNG, with 1000 images per subfolder. Returns the path relative to `folder`."""
    if isinstance(image, bytes):
        data = image
    else:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data = buffer.getvalue()
    extension = next((name for name, start in _SIGNATURES.items() if re.match(start, data, re.DOTALL)), "image")
    path = Path("images", f"{index // 1000:05d}", f"{index:08d}.{extension}")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)
    return path.as_posix()


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line, atomically."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            for row in rows:
                try:
                    line = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
                except UnicodeEncodeError:  # a file name that is not UTF-8; JSON escapes preserve it
                    line = json.dumps(row, default=str).encode()
                file.write(line + b"\n")

    write_atomically(path, write)
