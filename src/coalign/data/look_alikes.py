"""Near-duplicate images, such as resized, re-encoded or recolored copies, by a 64-bit perceptual hash.

`scripts/look_alikes.py` compares the hash with EfficientNet features on 6,898 pictures of Open Clip Art:

- It finds 92 % of the pairs with a cosine above 0.9, and 97 % of those above 0.95. Of the pairs that it finds, 26 % are above 0.9 and 53 %
  above 0.8. Most of these are pairs of one series of circular patterns. Without the group of this series, it finds 19 % of the pairs above
  0.9 (most missed pairs are different drawings of one series); of those found, 32 % are above 0.9 and 67 % above 0.8 (most others share
  an outline).
- With the default split at 10 %, 71 of 518 held-out pictures have a cosine above 0.9 to a training picture; if look-alikes are not grouped,
  253 of 686. Above 0.95, 31 instead of 192. By the hash, 0 instead of 252.
- Of copies scaled by 0.5 or 1.5, re-encoded as JPEG of quality 60, or with another hue, at least 99 % are found. Cropped, mirrored and
  rotated copies, and copies with another margin, are not, nor are grayscale copies of saturated images.

CPU time (`scripts/look_alikes.py --cost`): 0.4, 1.3 and 4.3 ms to decode a JPEG of 256, 512 and 1024 pixels (0.5 bytes per pixel), and
0.1 ms to hash it. To group a million hashes, 1 to 7 s and 123 MB, and four million, 8 to 41 s, depending on how many are similar.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import combinations, pairwise

import numpy as np
from PIL import Image

from coalign.data.components import connected_components
from coalign.data.image_hashes import hash_images, read_hashes, write_hashes
from coalign.data.images.decode import open_image
from coalign.data.sources.base import Source, hash64
from coalign.files import cache_folder

MAX_DISTANCE = 4  # of 63 bits, between the hashes of look-alikes
NO_HASH = 0  # the hash of an image with too little detail to compare
MOST = 0.5  # fraction of the data above which a group is a chain, not a series of look-alikes
DECODED_SIDE = 64  # pixels; images are decoded at about this size if the format allows it
_SIDE, _FREQUENCIES = 32, 8
_SMALL = 0.04  # coefficients up to this fraction of the largest count as zero
_MIN_COEFFICIENTS = 10  # other coefficients of an image with enough detail
_MIN_CONTRAST = 8  # gray levels
_BLOCKS = 6  # of the bits of a hash; MAX_DISTANCE differing bits leave at least two of them equal
_NEIGHBORS = 16  # compared with each hash per pair of equal blocks
VERSION = 1  # of the hash, for the cache

_DCT = np.cos(np.pi / _SIDE * np.outer(np.arange(_FREQUENCIES), np.arange(_SIDE) + 0.5)).astype(np.float32)
_DCT[0] *= np.sqrt(0.5)


# ---------------------------------------------------------------- hashes


def look_hash(pixels: np.ndarray) -> int:
    """Returns a 64-bit hash of an image, uint8 [height, width, 3], or `NO_HASH` if it is nearly blank.

    Look-alikes differ in at most `MAX_DISTANCE` bits. The bits are the signs of the 63 lowest frequencies of the cosine transform of a
    32 × 32 gray view. Small coefficients count as zero: in a drawing with much background, their signs are noise. Gray is the mean of
    the channels rather than luminance, so that a change of hue changes little.
    """
    small = np.asarray(Image.fromarray(pixels).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR), dtype=np.float32)
    gray = small.mean(axis=2)
    if np.ptp(gray) < _MIN_CONTRAST:
        return NO_HASH
    coefficients = (_DCT @ gray @ _DCT.T).ravel()[1:]
    threshold = _SMALL * np.abs(coefficients).max()
    if np.count_nonzero(np.abs(coefficients) > threshold) < _MIN_COEFFICIENTS:
        return NO_HASH
    bits = np.concatenate([[True], coefficients > threshold])  # the first bit distinguishes the hash from NO_HASH
    return int.from_bytes(np.packbits(bits).tobytes(), "big")


def decode_small(image: bytes | np.ndarray) -> np.ndarray:
    """Decodes an image for `look_hash`: RGB, at reduced resolution if this saves time. Raises BadSample."""
    opened = open_image(image)
    return opened.decode(min_scale=min(1.0, DECODED_SIDE / max(opened.size)))


def look_hashes(source: Source, contents: np.ndarray) -> np.ndarray:
    """Returns the hash of each sample's image, uint64 [sample]; `NO_HASH` for images that cannot be decoded.

    `contents` are hashes of the encoded files, uint64 [sample], 0 for samples to leave out. Every distinct file is decoded once, on all
    cores; the results are cached by content.
    """
    distinct, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    name = hash64(f"{VERSION} {os.path.abspath(source.name)}".encode())
    cache = cache_folder() / "look-alikes" / f"{name:016x}.npy"
    hashes, is_cached = read_hashes(cache, distinct)
    missing = (distinct != 0) & ~is_cached
    if missing.any():
        what = "Hashing images to find look-alikes (once)"
        hashes[missing] = hash_images(source, first[missing], lambda image: look_hash(decode_small(image)), what)
        write_hashes(cache, distinct, hashes)
    return hashes[inverse.reshape(-1)]


# ---------------------------------------------------------------- groups


def look_alike_groups(hashes: np.ndarray) -> np.ndarray:
    """Returns group labels of images, int64 [image], equal for look-alikes and for those that a series of look-alikes connects.

    The label of an image without a hash is -1. If a group exceeds `MOST` of the images, as in data in which all images look alike, only
    those of its images with equal hashes stay together.
    """
    distinct, inverse = np.unique(hashes, return_inverse=True)
    inverse = inverse.reshape(-1)
    own = np.arange(len(distinct))
    labels = own
    for one, other in _near_pairs(distinct):
        apart = labels[one] != labels[other]
        edges = len(distinct) + np.arange(np.count_nonzero(apart))
        samples = np.concatenate([own, one[apart], other[apart]])
        labels = connected_components(len(distinct), samples, np.concatenate([labels, edges, edges]))
    sizes = np.bincount(labels[inverse], minlength=len(distinct))
    labels = np.where(sizes[labels] > MOST * len(hashes), own, labels)
    return np.where(hashes == NO_HASH, -1, labels[inverse])


def have_look_alike(hashes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns whether each image of `hashes` has a look-alike in `others`: bool [image]."""
    distinct = np.unique(np.concatenate([hashes, others]))
    is_other = np.isin(distinct, others)
    found = is_other & (distinct != NO_HASH)
    for one, other in _near_pairs(distinct):
        found[one[is_other[other]]] = True
        found[other[is_other[one]]] = True
    return found[np.searchsorted(distinct, hashes)]


def _near_pairs(hashes: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields positions (one, other) of distinct hashes that differ in at most `MAX_DISTANCE` bits; a pair may occur repeatedly.

    Such hashes agree in at least two of `_BLOCKS` blocks of bits. For each two blocks, the hashes are sorted by them, and each is compared
    with the next `_NEIGHBORS` with the same two. So the time is at most 15 sorts and 240 comparisons of arrays, whatever the data. If more
    hashes agree in two blocks (many look-alikes, or tens of millions of images), distant ones may be missed.
    """
    places = np.flatnonzero(hashes != NO_HASH)
    known = hashes[places]
    edges = np.linspace(0, 64, _BLOCKS + 1).astype(int)
    blocks = [np.uint64((1 << int(stop)) - (1 << int(start))) for start, stop in pairwise(edges)]
    for equal in combinations(blocks, _BLOCKS - MAX_DISTANCE):
        mask = np.bitwise_or.reduce(np.array(equal))
        order = np.lexsort((known, known & mask))
        ordered = known[order]
        keys = ordered & mask
        at = np.arange(len(known))
        for shift in range(1, _NEIGHBORS + 1):
            at = at[at < len(known) - shift]
            at = at[keys[at] == keys[at + shift]]
            near = at[num_differing_bits(ordered[at], ordered[at + shift]) <= MAX_DISTANCE]
            if len(near):
                yield places[order[near]], places[order[near + shift]]


def num_differing_bits(hashes: np.ndarray, others: np.ndarray | np.uint64) -> np.ndarray:
    """Returns the number of bits in which each two hashes differ, as uint64."""
    one, two, four = np.uint64(1), np.uint64(2), np.uint64(4)
    values = hashes ^ others
    values = values - ((values >> one) & np.uint64(0x5555555555555555))
    values = (values & np.uint64(0x3333333333333333)) + ((values >> two) & np.uint64(0x3333333333333333))
    values = (values + (values >> four)) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (values * np.uint64(0x0101010101010101)) >> np.uint64(56)
