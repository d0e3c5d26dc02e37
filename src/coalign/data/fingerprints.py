"""Hashes of the keys, captions and image files of a source's samples."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from dataclasses import fields

import numpy as np

from coalign.data.image_hashes import hash_images, read_hashes, write_hashes
from coalign.data.sources.base import Fingerprints, Source, hash64
from coalign.errors import BadSample
from coalign.files import cache_folder, write_atomically
from coalign.progress import track

_VERSION = 1  # of cached fingerprints


def fingerprints(source: Source) -> Fingerprints:
    """The source's own fingerprints, or those from reading every record and image.

    They are cached by the source's stamp; if it has none, the hashes of its image files are.
    """
    if (known := source.fingerprints()) is not None:
        return known
    if (stamp := source.stamp()) is None:
        return _read(source)
    cache = cache_folder() / "fingerprints" / f"{stamp:016x}-{_VERSION}.npz"
    names = [field.name for field in fields(Fingerprints)]
    with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile), np.load(cache, allow_pickle=False) as stored:
        return Fingerprints(*(stored[name] for name in names))
    found = _read(source)
    with suppress(OSError):  # if the disk is full or read-only, the next run reads the source again
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda temporary: np.savez(temporary, **{name: getattr(found, name) for name in names}))
    return found


def _read(source: Source) -> Fingerprints:
    keys = np.zeros(len(source), dtype=np.uint64)
    counts = np.zeros(len(source), dtype=np.int64)
    captions: list[int] = []
    for index in track(range(len(source)), "Reading captions"):
        try:
            record = source.record(index)
        except BadSample:
            keys[index] = hash64(f"unusable {index}".encode())
            continue
        keys[index] = hash64(record.key.encode())
        captions += (hash64(caption.encode()) for caption in record.captions)
        counts[index] = len(record.captions)
    images = _image_hashes(source, counts > 0)
    unreadable = images == 0
    captions_array = np.array(captions, dtype=np.uint64)[~np.repeat(unreadable, counts)]
    return Fingerprints(keys, images, captions_array, np.where(unreadable, 0, counts))


def _image_hashes(source: Source, usable: np.ndarray) -> np.ndarray:
    """Image hashes, uint64 [sample]; 0 for unusable samples and unreadable images."""
    hashes = np.zeros(len(source), dtype=np.uint64)
    stamps = np.fromiter((_stamp(source, index) for index in range(len(source))), dtype=np.uint64, count=len(source))
    cache = cache_folder() / "images" / f"{hash64(os.path.abspath(source.name).encode()):016x}.npy"
    if stamps.any():
        cached, is_cached = read_hashes(cache, stamps)
        hashes = np.where(is_cached & (stamps != 0), cached, 0)
    missing = np.flatnonzero(usable & (hashes == 0))
    if len(missing):
        hashes[missing] = hash_images(source, missing, _content_hash, "Hashing images to detect duplicates (once)")
        if stamps.any():
            write_hashes(cache, stamps, hashes)
    return hashes


def _content_hash(image: bytes | np.ndarray) -> int:
    return hash64(image if isinstance(image, bytes) else f"{image.shape}".encode() + image.tobytes()) or 1


def _stamp(source: Source, index: int) -> int:
    """Hash of an image file's path, size and modification time, which changes when the file does; 0 if there is no file."""
    try:
        path = source.image_path(index)
        if path is None:
            return 0
        status = os.stat(path)
    except (OSError, ValueError, BadSample):
        return 0
    return hash64(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")) or 1
