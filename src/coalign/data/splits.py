"""Stable train/val splits that share no caption and no image, for sources without splits of their own."""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.sources.base import Fingerprints, Source, Splits, hash64
from coalign.errors import BadSample, UserError
from coalign.files import cache_folder, write_atomically
from coalign.randomness import stable_hash

_LARGE = 0.01  # fraction of the data above which a group counts as boilerplate and stays in train
_log = logging.getLogger(__name__)


def assign_splits(
    source: Source, val_fraction: float = 0.05, seed: int = 0, by: str | None = None
) -> tuple[Splits, dict[str, int]]:
    """Returns the source's own splits; if it has no val split, holds one out of train (or of all samples) by a stable hash.

    Samples that share a caption or an identical image file form a group, transitively. Each group is assigned as a whole,
    by the hash of its smallest key, so adding unrelated data does not move any sample. Groups of more than 1 % of the data
    (boilerplate captions) and unusable samples go to train. If the hash leaves val empty, val is the group with the
    lowest hash.

    With `by`, a column such as the author's name, samples with the same value form a group instead. Train and val then
    share no value and no image, but may share captions. Raises UserError if no sample has a value, or if the source has
    its own val split.

    Returns the indices of each split, ascending, and counts for a report: samples per split, `groups`, `largest_group`,
    `grouped` (samples in groups of two or more), `unusable`.
    """
    own: Splits = dict(source.splits or {})
    if "val" in own or (own and "train" not in own):
        if by is not None:
            raise UserError(f"{source.name} has its own validation split; remove --val-by {by}.")
        return own, {name: len(indices) for name, indices in own.items()}
    pool = own.get("train", _all_indices(source))
    draw = lambda: _draw_val(source, pool, val_fraction, seed, by)  # noqa: E731
    in_val, counts = _cached(source, f"{val_fraction} {seed} {by}", draw)
    splits = own | {"train": pool[~in_val], "val": pool[in_val]}
    return splits, {name: len(indices) for name, indices in splits.items()} | counts


def _all_indices(source: Source) -> np.ndarray:
    """All indices, as uint32 if they fit: this saves 400 MB for a hundred million samples."""
    return np.arange(len(source), dtype=np.uint32 if len(source) < 2**32 else np.int64)


def _draw_val(
    source: Source, pool: np.ndarray, val_fraction: float, seed: int, by: str | None
) -> tuple[np.ndarray, dict[str, int]]:
    """Draws the val split of the samples in `pool`: bool [pool], and counts for a report."""
    hashes = fingerprints(source)
    usable = (hashes.caption_counts > 0)[pool]
    groups = (_groups(hashes) if by is None else _groups_by(source, by))[pool]
    in_val, counts = _val_mask(groups, hashes.keys[pool], usable, val_fraction, seed)
    if by is not None:
        images = hashes.images[pool]
        in_val &= ~np.isin(images, images[~in_val & usable])
    return in_val, counts


def _groups_by(source: Source, column: str) -> np.ndarray:
    """Group labels, int64 [sample], equal for samples with the same value in `column`. A sample without a value is its own group."""
    labels = np.arange(len(source))
    first: dict[str, int] = {}
    for index in range(len(source)):
        try:
            value = str(source.record(index).facts.get(column) or "")
        except BadSample:
            continue
        if value:
            labels[index] = first.setdefault(value, index)
    if not first:
        raise UserError(f"{source.name} has no column {column!r}; set --val-by to a column of the data.")
    return labels


def _cached(
    source: Source, settings: str, draw: Callable[[], tuple[np.ndarray, dict[str, int]]]
) -> tuple[np.ndarray, dict[str, int]]:
    """Returns `draw()`, cached by the source's stamp and the settings, since grouping a hundred million samples is slow."""
    stamp = source.stamp()
    if stamp is None:
        return draw()
    path = cache_folder() / "splits" / f"{hash64(f'{stamp} {settings}'.encode()):016x}.npz"
    try:
        with np.load(path, allow_pickle=False) as stored:
            counts = dict(zip(stored["names"].tolist(), stored["counts"].tolist()))
            return np.unpackbits(stored["in_val"], count=int(stored["size"])).view(bool), counts
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        in_val, counts = draw()
    arrays: dict[str, Any] = {"in_val": np.packbits(in_val), "size": len(in_val)}
    arrays |= {"names": list(counts), "counts": list(counts.values())}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))
    return in_val, counts


def nested_subset(indices: np.ndarray, fraction: float) -> np.ndarray:
    """A random fraction of `indices` (at least one), in the same order. Smaller fractions are subsets of larger ones."""
    if fraction == 1:
        return indices
    draws = _uniform(indices.astype(np.uint64), 1)
    return indices[np.sort(np.argsort(draws, kind="stable")[: max(1, round(fraction * len(indices)))])]


def _val_mask(
    groups: np.ndarray, keys: np.ndarray, usable: np.ndarray, val_fraction: float, seed: int
) -> tuple[np.ndarray, dict[str, int]]:
    """Whether each sample is in val, bool [sample], and counts of groups."""
    in_val = np.zeros(len(groups), dtype=bool)
    _, group, sizes = np.unique(groups[usable], return_inverse=True, return_counts=True)
    counts = {
        "groups": len(sizes),
        "largest_group": int(sizes.max(initial=0)),
        "grouped": int(sizes[sizes > 1].sum()),
        "unusable": int(np.count_nonzero(~usable)),
    }
    smallest = np.full(len(sizes), np.iinfo(np.uint64).max, dtype=np.uint64)
    np.minimum.at(smallest, group, keys[usable])
    draws = _uniform(smallest, seed)
    small = sizes <= max(1, _LARGE * len(groups))
    chosen = small & (draws < val_fraction)
    if val_fraction > 0 and len(sizes) > 1 and not chosen.any():
        chosen[np.lexsort((draws, ~small))[0]] = True
    in_val[usable] = chosen[group]
    return in_val, counts


def _uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """Hashes 64-bit keys to uniform numbers in [0, 1) (SplitMix64's finalizer)."""
    bits = keys ^ np.uint64(stable_hash("split", seed))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return (bits >> np.uint64(11)) * 2.0**-53


def _groups(hashes: Fingerprints) -> np.ndarray:
    """Group labels, int64 [sample], equal exactly for samples connected by shared images or captions.

    Unusable samples connect nothing.
    """
    counts = hashes.caption_counts.astype(np.int64)
    samples = np.arange(len(counts))
    usable = counts > 0
    _, images = np.unique(hashes.images, return_inverse=True)
    _, captions = np.unique(hashes.captions, return_inverse=True)
    edges_sample = np.concatenate([samples[usable], np.repeat(samples, counts)])
    edges_value = np.concatenate([images[usable], captions + len(samples)])
    return connected_components(len(samples), edges_sample, edges_value)


def connected_components(count: int, samples: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The smallest index in each sample's connected component: int64 [count].

    Sample `samples[i]` has the value `values[i]`; samples with equal values are connected.
    """
    labels = np.arange(count)
    lowest = np.empty(int(values.max(initial=-1)) + 1, dtype=labels.dtype)
    while True:
        lowest.fill(count)
        np.minimum.at(lowest, values, labels[samples])
        merged = labels.copy()
        np.minimum.at(merged, samples, lowest[values])
        # The current root follows, so that whole components merge at once.
        np.minimum.at(merged, labels, merged.copy())
        merged = merged[merged]
        if np.array_equal(merged, labels):
            return labels
        labels = merged


# ---------------------------------------------------------------- fingerprints


def fingerprints(source: Source) -> Fingerprints:
    """The source's own fingerprints, or those from reading every record and image. Caches the hashes of image files."""
    if (known := source.fingerprints()) is not None:
        return known
    keys = np.zeros(len(source), dtype=np.uint64)
    counts = np.zeros(len(source), dtype=np.int64)
    captions: list[int] = []
    for index in range(len(source)):
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
    missing = np.flatnonzero(usable)
    stamps = np.array([_stamp(source, index) for index in range(len(source))], dtype=np.uint64)
    cache = None
    if stamps.any():
        cache = cache_folder() / "images" / f"{hash64(os.path.abspath(source.name).encode()):016x}.npy"
        cached_stamps, cached_hashes = _load_cache(cache)
        position = np.minimum(np.searchsorted(cached_stamps, stamps), max(0, len(cached_stamps) - 1))
        if len(cached_stamps):
            is_cached = (stamps != 0) & (cached_stamps[position] == stamps)
            hashes = np.where(is_cached, cached_hashes[position], 0).astype(np.uint64)
            missing = missing[hashes[missing] == 0]
    if len(missing):
        _log.info("hashing %s images to detect duplicates (once)", f"{len(missing):,}")
        hashes[missing] = np.fromiter(_hash_images(source, missing), dtype=np.uint64, count=len(missing))
        if cache is not None:
            _store_cache(cache, stamps, hashes)
    return hashes


def _hash_images(source: Source, indices: np.ndarray) -> Iterable[int]:
    def hash_one(index: int) -> int:
        try:
            image: Any = source.image(index)
        except BadSample:
            return 0
        return hash64(image if isinstance(image, bytes) else f"{image.shape}".encode() + image.tobytes()) or 1

    def hash_chunk(start: int) -> list[int]:
        return [hash_one(index) for index in indices[start : start + 64].tolist()]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for hashes in pool.map(hash_chunk, range(0, len(indices), 64)):
            yield from hashes


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


def _load_cache(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        cached = np.load(path, allow_pickle=False)
        if cached.dtype == np.uint64 and cached.ndim == 2 and len(cached) == 2:
            return cached[0], cached[1]
    except (OSError, ValueError, EOFError):
        pass
    return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)


def _store_cache(path: Path, stamps: np.ndarray, hashes: np.ndarray) -> None:
    sorted_by_stamp = np.stack([stamps, hashes])[:, np.argsort(stamps)]
    with suppress(OSError):  # if the disk is full or read-only, the next run reads the files again
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: np.save(temporary, sorted_by_stamp))
