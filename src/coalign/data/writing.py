"""Writing samples as a folder that `open_source` reads: metadata.jsonl, and the images that are no files of their own."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from coalign.errors import NoImage, UserError
from coalign.types import Record, Source

_SIGNATURES = {
    "jpg": rb"\xff\xd8",
    "png": rb"\x89PNG",
    "gif": rb"GIF8",
    "webp": rb"RIFF....WEBP",
    "bmp": rb"BM",
    "tif": rb"II\*\0|MM\0\*",
}


def write_rows(source: Source, samples: Iterable[tuple[int, Record]], out: str | Path) -> Path:
    """Writes samples, by their index in `source` and with the record that they shall have, as `metadata.jsonl` (image, captions, tags, and
    split and facts where there are any) in the new folder `out`. Gives its path.

    Images that are files are named by their absolute path; others (members of archives, drawn ones) are written below
    `images/`. Raises UserError where `out` holds something already, and BadSample for an image that cannot be read.
    """
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise UserError(f"The folder {out} is not empty: name a new one for the data.")
        write_json_lines(folder / "metadata.jsonl", _rows(source, samples, folder))
    except OSError as error:
        raise UserError(f"The data cannot be written to {out}: {error.strerror or error}.") from None
    return folder / "metadata.jsonl"


def _rows(source: Source, samples: Iterable[tuple[int, Record]], folder: Path) -> Iterable[dict[str, Any]]:
    splits = {
        int(index): name for name, indices in (getattr(source, "splits", None) or {}).items() for index in indices
    }
    image_path: Callable[[int], str] | None = getattr(source, "image_path", None)
    for index, record in samples:
        image = None
        with suppress(NoImage):
            if image_path is not None:
                image = os.path.abspath(image_path(index))
            else:
                image = _write_image(source.image(index), folder, index)
        row: dict[str, Any] = {"image": image, "captions": record.captions, "tags": record.tags}
        if index in splits:
            row["split"] = splits[index]
        if record.facts:
            row["facts"] = dict(record.facts)
        yield row


def _write_image(image: bytes | np.ndarray, folder: Path, index: int) -> str:
    """The encoded file as it is, pixels as PNG; a thousand images a folder. Gives the path relative to `folder`."""
    if isinstance(image, bytes):
        data = image
    else:
        from PIL import Image

        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "PNG")
        data = buffer.getvalue()
    kind = next((kind for kind, start in _SIGNATURES.items() if re.match(start, data, re.DOTALL)), "image")
    path = Path("images", f"{index // 1000:05d}", f"{index:08d}.{kind}")
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_bytes(data)
    return path.as_posix()


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One object a line; the file appears when it is complete."""
    unfinished = path.with_suffix(".unfinished")
    with open(unfinished, "wb") as file:
        for row in rows:
            try:
                line = json.dumps(row, ensure_ascii=False, default=str).encode("utf-8")
            except UnicodeEncodeError:  # a file name that is no UTF-8: escapes bring it back as it was
                line = json.dumps(row, default=str).encode()
            file.write(line + b"\n")
    unfinished.replace(path)
