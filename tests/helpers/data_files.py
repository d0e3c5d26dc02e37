"""Small datasets on disk, for tests of the sources."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np

Entries = list[tuple[str, bytes]]


def write_tar(path: Path, entries: list, form: int = tarfile.PAX_FORMAT) -> Path:
    """Writes a tar file of entries, each (name, content) or TarInfo."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for entry in entries:
            if isinstance(entry, tarfile.TarInfo):
                tar.addfile(entry)
                continue
            info = tarfile.TarInfo(entry[0])
            info.size = len(entry[1])
            tar.addfile(info, io.BytesIO(entry[1]))
    return path


def samples(count: int, first: int = 0, seed: int = 0) -> Entries:
    """Tar entries of `count` samples in img2dataset's layout."""
    rng = np.random.default_rng(seed)
    entries: Entries = []
    for i in range(first, first + count):
        meta = {"caption": f"json caption {i}", "url": f"u{i}", "key": f"{i:09d}", "width": 64, "exif": None}
        entries += [
            (f"{i:09d}.jpg", b"\xff\xd8" + rng.bytes(int(rng.integers(1, 3000)))),
            (f"{i:09d}.json", json.dumps(meta).encode()),
            (f"{i:09d}.txt", f"caption {i}".encode()),
        ]
    return entries


def write_images(folder: Path, *names: str) -> Path:
    """Writes files with distinct content, which is not decodable, and returns the folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(f"bytes of {name}".encode())
    return folder


def write_coco(path: Path, **changes: object) -> Path:
    """Writes COCO captions JSON with five captions per image, and returns its path."""
    content = {
        "info": {},
        "images": [
            {"id": 7, "file_name": "000007.jpg"},
            {"id": 3, "file_name": "000003.jpg"},
            {"id": 9, "file_name": "000009.jpg"},
        ],
        "annotations": [
            {"id": 10 * j + i, "image_id": i, "caption": f"caption {j} of {i}"} for j in range(5) for i in (3, 7, 99)
        ],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content | changes))
    return path
