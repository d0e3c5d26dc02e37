"""Stable train/val splits that share no caption, image or look-alike, for sources without splits of their own."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from coalign.config import TrainConfig
from coalign.data.components import connected_components
from coalign.data.fingerprints import fingerprints
from coalign.data.look_alikes import VERSION, have_look_alike, look_alike_groups, look_hashes
from coalign.data.sources.base import Fingerprints, Source, Splits, are_labels, hash64
from coalign.data.text.captions import printable
from coalign.errors import BadSample, UserError
from coalign.files import cache_folder, write_atomically
from coalign.randomness import stable_hash

MAX_LOOK_ALIKES = 10_000_000  # samples; decoding more images to find look-alikes would take hours
_LARGE = 0.01  # fraction of the data above which a group counts as boilerplate and stays in train; more if a column makes the groups
_log = logging.getLogger(__name__)


def assign_splits(
    source: Source,
    val_fraction: float = 0.05,
    seed: int = 0,
    by: str | None = None,
    group: str | None = None,
    look_alikes: bool = True,
    test_fraction: float = 0.0,
) -> tuple[Splits, dict[str, int]]:
    """Returns the source's own splits; if it has no val split, holds one out of train (or of all samples) by a stable hash.

    With a `test_fraction`, a source without a test split gets one likewise; val is then held out of the rest.

    Samples that share a caption, an identical image file or a value in the column `group`, and with `look_alikes` also those with
    near-duplicate images, form a group, transitively. Each group is assigned as a whole, by the hash of its smallest key. So if data is
    added, a sample changes sides only if the new data

    - joins its group with a sample of a smaller key: the group then is on that key's side;
    - moves its group across the limit of 1 % of the data (or the fraction to hold out, with `group`): larger groups, such as pairs with
      boilerplate captions and long series of look-alikes, go to train;
    - changes what is a look-alike: see `look_alike_groups` on groups of more than half of the data, and `MAX_LOOK_ALIKES`.

    Unusable samples go to train. If the hash leaves val or test empty, it is the group with the lowest hash.

    Finding look-alikes decodes every image once; the hashes are cached. In data of more than `MAX_LOOK_ALIKES` samples, they are not
    searched for.

    With `by`, a column such as the author's name, samples with the same value form a group instead. Train and what is held out then share
    no value, but may share captions. A sample of a held-out value whose image is in train too, or looks like one there, is in neither.

    Raises UserError if no sample has a value in a column, or if `by` is set but nothing is held out.

    If the captions are class labels (`source.classes`, or few distinct ones over many images), captions do not connect samples, and every
    class with two groups or more is on both sides. The group that this needs is the one with the lowest or highest hash of the class; added
    data can change which one.

    Returns the indices of each split, ascending, and counts for a report: samples per split, `groups`, `largest_group`,
    `grouped` (samples in groups of two or more), `unusable`, `look_alikes` (samples with a look-alike, if searched for), and with `by`
    `excluded` (samples in neither split).
    """
    splits: Splits = dict(source.splits or {})
    can_hold_out = not splits or "train" in splits
    fractions = {"test": test_fraction} if can_hold_out and test_fraction > 0 and "test" not in splits else {}
    if can_hold_out and "val" not in splits:
        fractions["val"] = val_fraction
    if by is not None and not any(fractions.values()):
        why = "holds out no pairs" if fractions else "has its own validation split"
        raise UserError(f"{source.name} {why}; remove --val-by {by}.")
    if not fractions and group is not None and not has_column(source, group):
        raise _no_column(source, "--group-column", group)
    counts: dict[str, int] = {}
    of_test = f" after test {test_fraction}" if "test" in fractions else ""
    for name, fraction in fractions.items():
        pool = splits.get("train", _all_indices(source))
        similar = look_alikes and fraction > 0
        if similar and len(source) > MAX_LOOK_ALIKES:
            _log.info(
                "%s has more than %s samples: its splits may share look-alikes", source.name, f"{MAX_LOOK_ALIKES:,}"
            )
        similar = similar and 0 < len(source) <= MAX_LOOK_ALIKES
        settings = f"{fraction} {seed} {by} stratified"
        settings += (f" {group}" if group else "") + (f" look-alikes {VERSION}" if similar else "")
        settings += " test" if name == "test" else of_test
        # another hash than for val, which is drawn from the rest
        draw = partial(_draw, source, pool, fraction, seed + (name == "test"), by, group, similar)
        (in_train, held_out), found = _cached(source, settings, draw)
        if excluded := found.get("excluded"):
            _log.info(
                "%s samples of held-out values of %s are left out, as their images are in train too, or look like one there",
                f"{excluded:,}",
                by,
            )
        if by is not None:  # of test and val
            found["excluded"] += counts.get("excluded", 0)
        counts = found
        splits = splits | {"train": pool[in_train], name: pool[held_out]}
    return splits, {name: len(indices) for name, indices in splits.items()} | counts


def run_splits(source: Source, config: TrainConfig) -> Splits:
    """Returns the splits of the training data of a run with this configuration. With --val-data, no pairs are held out for validation."""
    group, similar = config.reading.group_column, config.group_look_alikes
    val_fraction = 0.0 if config.val_data else config.val_fraction
    return assign_splits(source, val_fraction, 0, config.val_by, group, similar, config.test_fraction)[0]


def _all_indices(source: Source) -> np.ndarray:
    """All indices, as uint32 if they fit: this saves 400 MB for a hundred million samples."""
    return np.arange(len(source), dtype=np.uint32 if len(source) < 2**32 else np.int64)


def _draw(
    source: Source,
    pool: np.ndarray,
    fraction: float,
    seed: int,
    by: str | None,
    group: str | None,
    look_alikes: bool,
) -> tuple[np.ndarray, dict[str, int]]:
    """Draws the fraction of the samples in `pool` to hold out: whether each is in train and is held out, bool [2, pool], and counts for a
    report."""
    hashes = fingerprints(source)
    is_usable = hashes.caption_counts > 0
    together = [column_labels(source, "--group-column", group)] if group is not None else []
    looks = None
    if look_alikes:
        looks = look_alike_groups(look_hashes(source, np.where(is_usable, hashes.images, np.uint64(0))))
    similar = [] if looks is None else [looks]
    largest = _LARGE if group is None else max(_LARGE, fraction)
    usable, keys = is_usable[pool], hashes.keys[pool]
    if by is not None:
        groups = _connected(is_usable, [column_labels(source, "--val-by", by), *together])
        held_out, counts = _held_out_mask(groups[pool], keys, usable, fraction, seed, largest)
    elif (labels := _labels(source, hashes)) is not None:
        groups = _connected(is_usable, [_numbered(hashes.images), *together, *similar])
        held_out, counts = _stratified_mask(groups[pool], labels[pool], keys, usable, fraction, seed, largest)
    else:
        groups = _groups(hashes, [*together, *similar])
        held_out, counts = _held_out_mask(groups[pool], keys, usable, fraction, seed, largest)
    in_train = ~held_out
    if by is not None:
        for values in (hashes.images.view(np.int64), *similar):
            own = values[pool]
            held_out &= ~np.isin(own, own[in_train & usable & (own != -1)])
        counts["excluded"] = int(np.count_nonzero(~in_train & ~held_out))
    if looks is not None:
        counts["look_alikes"] = int((np.bincount(looks + 1)[looks + 1] > 1)[looks >= 0].sum())
    return np.stack([in_train, held_out]), counts


def _labels(source: Source, hashes: Fingerprints) -> np.ndarray | None:
    """The class of each sample, int64 or uint64 [sample], if the captions are class labels; else None."""
    if source.classes is not None and not source.classes.in_captions:
        return source.classes.of
    usable = hashes.caption_counts > 0
    if not are_labels(len(np.unique(hashes.captions)), int(np.count_nonzero(usable))):
        return None
    labels = np.zeros(len(usable), dtype=np.uint64)
    first = np.cumsum(hashes.caption_counts) - hashes.caption_counts
    labels[usable] = hashes.captions[first[usable]]
    return labels


def column_labels(source: Source, option: str, column: str) -> np.ndarray:
    """Labels, int64 [sample], equal for samples with the same value in `column`; -1 for samples without a value."""
    labels = np.full(len(source), -1)
    first: dict[str, int] = {}
    for index, value in _column(source, column):
        if value:
            labels[index] = first.setdefault(value, index)
    if not first:
        raise _no_column(source, option, column)
    return labels


def has_column(source: Source, column: str) -> bool:
    """Whether a sample has a value in `column`."""
    return any(value for _, value in _column(source, column))


def _column(source: Source, column: str) -> Iterator[tuple[int, str | None]]:
    """Yields the index of each readable sample, and its value in `column`."""
    for index in range(len(source)):
        with suppress(BadSample):
            yield index, source.record(index).fact(column)


def _no_column(source: Source, option: str, column: str) -> UserError:
    names: list[str] = []
    for index in range(len(source)):
        with suppress(BadSample):
            names = list(source.record(index).facts)
            break
    listed = f": {', '.join(map(printable, names))}" if names else ""
    return UserError(f"{source.name} has no column {column!r}; set {option} to a column of the data{listed}.")


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
            return np.unpackbits(stored["sides"], axis=1, count=int(stored["size"])).view(bool), counts
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        sides, counts = draw()
    arrays: dict[str, Any] = {"sides": np.packbits(sides, axis=1), "size": sides.shape[1]}
    arrays |= {"names": list(counts), "counts": list(counts.values())}
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda temporary: np.savez(temporary, **arrays))
    return sides, counts


def look_alikes_in_train(
    source: Source, train: np.ndarray, held_out_source: Source, held_out: np.ndarray
) -> np.ndarray | None:
    """Returns whether each sample of `held_out` has an image that is in `train` too, or looks like one: bool [held_out].

    `train` and `held_out` are indices of their sources. Returns None if a source has more than `MAX_LOOK_ALIKES` samples.
    """
    if max(len(source), len(held_out_source)) > MAX_LOOK_ALIKES:
        return None
    parts = []
    for part, indices in ((source, train), (held_out_source, held_out)):
        hashes = fingerprints(part)
        contents = np.where(hashes.caption_counts > 0, hashes.images, np.uint64(0))
        at = indices % len(part)  # a mixture's repeated samples have indices beyond its length
        parts.append((contents[at], look_hashes(part, contents)[at]))
    (train_contents, train_looks), (contents, looks) = parts
    return (np.isin(contents, train_contents) & (contents != 0)) | have_look_alike(looks, train_looks)


def nested_subset(indices: np.ndarray, fraction: float) -> np.ndarray:
    """A random fraction of `indices` (at least one), in the same order. Smaller fractions are subsets of larger ones."""
    if fraction == 1:
        return indices
    draws = _uniform(indices.astype(np.uint64), 1)
    return indices[np.sort(np.argsort(draws, kind="stable")[: max(1, round(fraction * len(indices)))])]


def _held_out_mask(
    groups: np.ndarray, keys: np.ndarray, usable: np.ndarray, fraction: float, seed: int, largest: float
) -> tuple[np.ndarray, dict[str, int]]:
    """Whether each sample is held out, bool [sample], and counts of groups. Those above the fraction `largest` of the data are in train."""
    held_out = np.zeros(len(groups), dtype=bool)
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
    small = sizes <= max(1, largest * len(groups))
    chosen = small & (draws < fraction)
    if fraction > 0 and len(sizes) > 1 and not chosen.any():
        chosen[np.lexsort((draws, ~small))[0]] = True
    held_out[usable] = chosen[group]
    return held_out, counts


def _stratified_mask(
    groups: np.ndarray,
    classes: np.ndarray,
    keys: np.ndarray,
    usable: np.ndarray,
    fraction: float,
    seed: int,
    largest: float,
) -> tuple[np.ndarray, dict[str, int]]:
    """Like `_held_out_mask`, but every class with two groups or more has one held out and one in train.

    A group belongs to the class of its smallest key. The hash of that key decides, as in `_held_out_mask`; of a class without a held-out
    group, the one with the lowest hash is held out, if possible a small one; of one without a group in train, that with the highest is in
    train.
    """
    held_out = np.zeros(len(groups), dtype=bool)
    order = np.flatnonzero(usable)[np.argsort(keys[usable], kind="stable")]
    _, first, group, sizes = np.unique(groups[order], return_index=True, return_inverse=True, return_counts=True)
    _, stratum = np.unique(classes[order][first], return_inverse=True)  # of each group
    draws = _uniform(keys[order][first], seed)
    small = sizes <= max(1, largest * len(groups))
    chosen = small & (draws < fraction)
    by_draw = np.lexsort((draws, ~small, stratum))
    starts = np.flatnonzero(np.diff(stratum[by_draw], prepend=-1))
    lowest, highest = by_draw[starts], by_draw[np.append(starts[1:], len(by_draw))[: len(starts)] - 1]
    divisible = lowest != highest
    if fraction > 0:
        chosen[lowest[divisible]] = True
        chosen[highest[divisible]] = False
        chosen[lowest[~divisible]] = False  # its class would never be trained on
    held_out[order] = chosen[group]
    counts = {
        "groups": len(sizes),
        "largest_group": int(sizes.max(initial=0)),
        "grouped": int(sizes[sizes > 1].sum()),
        "unusable": int(np.count_nonzero(~usable)),
        "classes": len(starts),
    }
    return held_out, counts


def _uniform(keys: np.ndarray, seed: int) -> np.ndarray:
    """Hashes 64-bit keys to uniform numbers in [0, 1) (SplitMix64's finalizer)."""
    bits = keys ^ np.uint64(stable_hash("split", seed))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        bits = (bits ^ (bits >> np.uint64(shift))) * np.uint64(factor)
    return (bits >> np.uint64(11)) * 2.0**-53


def _groups(hashes: Fingerprints, labelings: Sequence[np.ndarray]) -> np.ndarray:
    """Group labels, int64 [sample], equal exactly for samples connected by shared images, captions or labels.

    A label of -1 and unusable samples connect nothing.
    """
    counts = hashes.caption_counts.astype(np.int64)
    owners = np.repeat(np.arange(len(counts)), counts)
    return _connected(counts > 0, [_numbered(hashes.images), *labelings], (owners, _numbered(hashes.captions)))


def _numbered(values: np.ndarray) -> np.ndarray:
    """Numbers the distinct values: int64 of the same length."""
    return np.unique(values, return_inverse=True)[1].reshape(-1)


def _connected(
    usable: np.ndarray, labelings: Sequence[np.ndarray], more: tuple[np.ndarray, np.ndarray] | None = None
) -> np.ndarray:
    """Components of usable samples that share a label (not -1) of any labeling, or a value of `more`, (samples, values)."""
    samples, values = [], []
    first = 0
    for labels in labelings:
        labeled = np.flatnonzero(usable & (labels >= 0))
        samples.append(labeled)
        values.append(labels[labeled] + first)
        first += len(usable)
    if more is not None:
        samples.append(more[0])
        values.append(more[1] + first)
    return connected_components(len(usable), np.concatenate(samples), np.concatenate(values))
