"""All randomness of the data: a pure function of (seed, epoch, sample, occurrence, view), wherever and in any order."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts' text, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, epoch: int, index: int, occurrence: int, view: str) -> np.random.Generator:
    """The generator of one view of one sample. `occurrence` tells apart several uses of a sample within one epoch."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{index}/{occurrence}/{view}".encode(), digest_size=16).digest()
    sequence: Any = _Key(key)
    return np.random.Generator(np.random.Philox(sequence))


class _Key(ISeedSequence):
    """Gives Philox(key=…)'s stream, without the entropy that it gathers and drops: two thirds of a generator's cost."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return np.frombuffer(self._key, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)
