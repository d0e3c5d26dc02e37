"""Train and validation parts of a source that has none: no caption and no image on both sides, and the same sides
tomorrow."""

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

from coalign.data.common import Fingerprints, Splits, cache_folder, hash64
from coalign.data.randomness import stable_hash
from coalign.errors import BadSample, UserError
from coalign.types import Source

_LARGE = 0.01  # share of the data from which a group is boilerplate and stays in train
_log = logging.getLogger(__name__)


def assign_splits(
    source: Source, val_fraction: float = 0.05, seed: int = 0, by: str | None = None
) -> tuple[Splits, dict[str, int]]:
    """The source's own splits; where it has no val, one taken from its train part (or from all of it) by a stable
    hash.

    Samples that share a caption or an identical image file form a group, groups that share a sample are one, and a
    group goes to one side by the hash of its smallest key, so that data added elsewhere moves nothing. A group of more
    than 1 % of the data (a caption that is boilerplate) goes to train, as do samples that cannot be used. If the hash
    leaves val empty, the group with the lowest hash makes it.

    With `by`, a column of the data such as an author's name, samples with the same value of it form a group instead, and what is held
    out is by others than what is trained on. Captions may then be on both sides, images not. UserError if no sample has such a
    value, or the data have their own validation part.

    Returns the indices of each split, ascending, and counts for a report: samples per split, `groups`,
    `largest_group`, `grouped` (samples in groups of two or more), `unusable`.
    """
    own: Splits = dict(getattr(source, "splits", None) or {})
    if "val" in own or (own and "train" not in own):
        if by is not None:
            raise UserError(f"{source.name} has its own validation part; leave out --val-by {by}.")
        return own, {name: len(indices) for name, indices in own.items()}
    pool = own.get("train", _every(source))
    draw = lambda: _drawn(source, pool, val_fraction, seed, by)  # noqa: E731
    in_val, counts = _kept(source, f"{val_fraction} {seed} {by}", draw)
    splits = own | {"train": pool[~in_val], "val": pool[in_val]}
    return splits, {name: len(indices) for name, indices in splits.items()} | counts


def _every(source: Source) -> np.ndarray:
    """All indices, in half of the memory where they are small enough: of a hundred million samples it counts."""
    return np.arange(len(source), dtype=np.uint32 if len(source) < 2**32 else np.int64)


def _drawn(
    source: Source, pool: np.ndarray, val_fraction: float, seed: int, by: str | None
) -> tuple[np.ndarray, dict[str, int]]:
    prints = fingerprints(source)
    usable = (prints.caption_counts > 0)[pool]
    groups = (_groups(prints) if by is None else _groups_by(source, by))[pool]
    in_val, counts = _val_mask(groups, prints.keys[pool], usable, val_fraction, seed)
    if by is not None:
        images = prints.images[pool]
        in_val &= ~np.isin(images, images[~in_val & usable])
    return in_val, counts


def _groups_by(source: Source, column: str) -> np.ndarray:
    """One label a sample, equal where it has the same value in this column. Samples without one are groups of their own."""
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
        raise UserError(f"{source.name} has no column {column!r} to hold out by.")
    return labels


def _kept(
    source: Source, settings: str, draw: Callable[[], tuple[np.ndarray, dict[str, int]]]
) -> tuple[np.ndarray, dict[str, int]]:
    """What was drawn of a source in this state before, from the cache folder: grouping a hundred million samples takes long."""
    if not hasattr(source, "stamp"):
        return draw()
    place = cache_folder() / "splits" / f"{hash64(f'{source.stamp()} {settings}'.encode()):016x}.npz"
    try:
        with np.load(place, allow_pickle=False) as stored:
            counts = dict(zip(stored["names"].tolist(), stored["counts"].tolist()))
            return np.unpackbits(stored["in_val"], count=int(stored["size"])).view(bool), counts
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        in_val, counts = draw()
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_suffix(f".{os.getpid()}.npz")
        np.savez(
            temporary, in_val=np.packbits(in_val), size=len(in_val), names=list(counts), counts=list(counts.values())
        )
        os.replace(temporary, place)
    return in_val, counts


def nested_share(indices: np.ndarray, fraction: float) -> np.ndarray:
    """A random share of these samples, at least one, in their order; a smaller share is part of every larger one."""
    if fraction == 1:
        return indices
    draws = _uniform(indices.astype(np.uint64), 1)
    return indices[np.sort(np.argsort(draws, kind="stable")[: max(1, round(fraction * len(indices)))])]


def _val_mask(
    groups: np.ndarray, keys: np.ndarray, usable: np.ndarray, val_fraction: float, seed: int
) -> tuple[np.ndarray, dict[str, int]]:
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
    """A number in [0, 1) of each 64-bit key (SplitMix64's finaliser)."""
    bits = keys ^ np.uint64(stable_hash("split", seed))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return (bits >> np.uint64(11)) * 2.0**-53


def _groups(prints: Fingerprints) -> np.ndarray:
    """One label a sample, equal exactly where samples are connected by shared images or captions. Unusable samples
    connect nothing."""
    counts = prints.caption_counts.astype(np.int64)
    samples = np.arange(len(counts))
    usable = counts > 0
    _, images = np.unique(prints.images, return_inverse=True)
    _, captions = np.unique(prints.captions, return_inverse=True)
    edges_sample = np.concatenate([samples[usable], np.repeat(samples, counts)])
    edges_value = np.concatenate([images[usable], captions + len(samples)])
    return connected_components(len(samples), edges_sample, edges_value)


def connected_components(count: int, samples: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The smallest index of each sample's component: [count]. Sample `samples[i]` has the value `values[i]`; equal
    values connect."""
    labels = np.arange(count)
    lowest = np.empty(int(values.max(initial=-1)) + 1, dtype=labels.dtype)
    while True:
        lowest.fill(count)
        np.minimum.at(lowest, values, labels[samples])
        merged = labels.copy()
        np.minimum.at(merged, samples, lowest[values])
        np.minimum.at(
            merged, labels, merged.copy()
        )  # the component's present root follows, so that whole components merge at once
        merged = merged[merged]
        if np.array_equal(merged, labels):
            return labels
        labels = merged


# ---------------------------------------------------------------- fingerprints


def fingerprints(source: Source) -> Fingerprints:
    """The source's own fingerprints, or made by reading every record and image once. Hashes of image files are kept in
    the cache folder."""
    if hasattr(source, "fingerprints"):
        return source.fingerprints()
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
    """uint64 [sample], 0 for an image that cannot be read."""
    hashes = np.zeros(len(source), dtype=np.uint64)
    stamps, cache = None, None
    wanted = np.flatnonzero(usable)
    if hasattr(source, "image_path"):
        stamps = np.array([_stamp(source, index) for index in range(len(source))], dtype=np.uint64)
        cache = cache_folder() / "images" / f"{hash64(os.path.abspath(source.name).encode()):016x}.npy"
        known_stamps, known_hashes = _load_cache(cache)
        place = np.minimum(np.searchsorted(known_stamps, stamps), max(0, len(known_stamps) - 1))
        if len(known_stamps):
            hashes = np.where(known_stamps[place] == stamps, known_hashes[place], 0).astype(np.uint64)
            wanted = wanted[hashes[wanted] == 0]
    if len(wanted):
        _log.info("reading %s images once to find identical ones", f"{len(wanted):,}")
        hashes[wanted] = np.fromiter(_hash_images(source, wanted), dtype=np.uint64, count=len(wanted))
        if cache is not None and stamps is not None:
            _store_cache(cache, stamps, hashes)
    return hashes


def _hash_images(source: Source, indices: np.ndarray) -> Iterable[int]:
    def hash_one(index: int) -> int:
        try:
            image: Any = source.image(index)
        except BadSample:
            return 0
        return hash64(image if isinstance(image, bytes) else f"{image.shape}".encode() + image.tobytes()) or 1

    def hash_some(start: int) -> list[int]:
        return [hash_one(index) for index in indices[start : start + 64].tolist()]

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        for hashes in pool.map(hash_some, range(0, len(indices), 64)):
            yield from hashes


def _stamp(source: Any, index: int) -> int:
    """Hash of an image file's path, size and time of change: as long as it is the same, so is the file."""
    try:
        path = source.image_path(index)
        status = os.stat(path)
    except (OSError, ValueError, BadSample):
        return 0
    return hash64(os.fsencode(f"{path}\0{status.st_size}\0{status.st_mtime_ns}")) or 1


def _load_cache(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        known = np.load(path, allow_pickle=False)
        if known.dtype == np.uint64 and known.ndim == 2 and len(known) == 2:
            return known[0], known[1]
    except (OSError, ValueError, EOFError):
        pass
    return np.empty(0, dtype=np.uint64), np.empty(0, dtype=np.uint64)


def _store_cache(path: Path, stamps: np.ndarray, hashes: np.ndarray) -> None:
    order = np.argsort(stamps)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            np.save(file, np.stack([stamps, hashes])[:, order])
        os.replace(temporary, path)
    except OSError:  # a full or read-only disk: the files are read again next time
        temporary.unlink(missing_ok=True)
