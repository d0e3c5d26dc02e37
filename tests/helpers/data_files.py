"""Small datasets on disk, for tests of the sources."""

from __future__ import annotations

import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np

from coalign.data.sources.base import Source
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample

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


def write_files(root: Path, files: dict[str, bytes | str]) -> Path:
    """Writes files by name, with folders, and returns the root."""
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def account(source: Source) -> dict[str, tuple[str, ...] | str]:
    """The captions of every sample by key, or the reason why it cannot be used; images are read, but not decoded."""
    result: dict[str, tuple[str, ...] | str] = {}
    for index in range(len(source)):
        key = f"sample {index}"
        try:
            record = source.record(index)
            assert record.key not in result
            key = record.key
            source.image(index)
            result[key] = require_captions(record)
        except BadSample as bad:
            result[key] = bad.reason
    return result


def splits_by_key(source: Source) -> dict[str, list[str]]:
    """The keys of each split; {} if the source has no splits."""
    return {
        name: [source.record(int(index)).key for index in indices] for name, indices in (source.splits or {}).items()
    }


def left_out_by_reason(source: Source) -> dict[str, int]:
    """The counts of what opening left out, by reason; without notes."""
    counts: Counter[str] = Counter()
    for each in source.left_out:
        counts[each.reason] += each.count
    return {reason: count for reason, count in counts.items() if count}
