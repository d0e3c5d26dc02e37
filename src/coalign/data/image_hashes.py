"""Computes hashes of images on all cores, and caches them by key."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from coalign.cores import num_cores
from coalign.data.sources.base import Source
from coalign.errors import BadSample
from coalign.files import write_atomically
from coalign.progress import track

_CHUNK = 64  # images per task


def hash_images(
    source: Source, indices: np.ndarray, hash_image: Callable[[bytes | np.ndarray], int], what: str
) -> np.ndarray:
    """Shows `what` as its progress. Returns the hash of each sample's image, uint64 [index]; 0 for an image that cannot be read."""

    def hash_one(index: int) -> int:
        try:
            return hash_image(source.image(index))
        except BadSample:
            return 0

    def hash_chunk(start: int) -> list[int]:
        return [hash_one(index) for index in indices[start : start + _CHUNK].tolist()]

    def hashes() -> Iterable[int]:
        with ThreadPoolExecutor(num_cores()) as pool:
            for chunk in pool.map(hash_chunk, range(0, len(indices), _CHUNK)):
                yield from chunk

    return np.fromiter(track(hashes(), what, len(indices)), dtype=np.uint64, count=len(indices))


def read_hashes(cache: Path, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the cached hash of each key, uint64 [key], and whether it is cached, bool [key]."""
    hashes, is_cached = np.zeros(len(keys), dtype=np.uint64), np.zeros(len(keys), dtype=bool)
    with suppress(OSError, ValueError, EOFError):
        table = np.load(cache, allow_pickle=False)
        if table.dtype == np.uint64 and table.ndim == 2 and len(table) == 2 and table.size:
            position = np.minimum(np.searchsorted(table[0], keys), table.shape[1] - 1)
            is_cached = table[0][position] == keys
            hashes[is_cached] = table[1][position[is_cached]]
    return hashes, is_cached


def write_hashes(cache: Path, keys: np.ndarray, hashes: np.ndarray) -> None:
    table = np.stack([keys, hashes])[:, np.argsort(keys)]
    with suppress(OSError):  # if the disk is full or read-only, the next run computes the hashes again
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cache, lambda temporary: np.save(temporary, table))
