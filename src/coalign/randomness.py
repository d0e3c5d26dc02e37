"""Random generators for data, as pure functions of (seed, epoch, sample, occurrence, view).

Samples are therefore the same for any number of workers, in any order, and after a resume.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts as text, the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, epoch: int, index: int, occurrence: int, view: str) -> np.random.Generator:
    """Returns the generator for one view of a sample. `occurrence` counts repetitions of the sample within an epoch."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{index}/{occurrence}/{view}".encode(), digest_size=16).digest()
    sequence: Any = _Key(key)
    return np.random.Generator(np.random.Philox(sequence))


class _Key(ISeedSequence):
    """Seeds Philox with a key. Same stream as Philox(key=…), which first gathers unused entropy: two thirds of its cost."""

    def __init__(self, key: bytes) -> None:
        self._key = key

    def generate_state(self, n_words: int, dtype: Any = np.uint64) -> np.ndarray:
        return np.frombuffer(self._key, np.dtype(dtype).newbyteorder("<"), n_words).astype(dtype)
