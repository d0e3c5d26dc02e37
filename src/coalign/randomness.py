"""Random numbers for data, as pure functions of (seed, epoch, sample, occurrence, view).

Samples are therefore the same for any number of workers, in any order, and after a resume.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.random.bit_generator import ISeedSequence


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts as text, the same in every process and on every machine."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, uint64 -> uint64: flipping any input bit flips each output bit with probability one half."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True)
class Draws:
    """The random numbers of samples, each a function of (seed, epoch, index, occurrence, name) and not of the other samples.

    indices: int64 [sample]. occurrence: counts repetitions of a sample within an epoch.
    """

    seed: int
    epoch: int
    indices: np.ndarray
    occurrence: int = 0

    def uniform(self, name: str, count: int) -> np.ndarray:
        """`count` numbers in [0, 1) per sample, multiples of 2^-53: float64 [sample, count]. They differ by name and position."""
        key = stable_hash(self.seed, self.epoch, self.occurrence, name)
        start = mix(mix(self.indices.astype(np.uint64)) + np.uint64(key))  # of the sample's SplitMix64 sequence
        steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        return (mix(start[:, None] + steps) >> np.uint64(11)) * 2.0**-53

    def generator(self, row: int, name: str) -> np.random.Generator:
        """The generator of one sample, for draws that cannot be vectorized."""
        return generator(self.seed, self.epoch, int(self.indices[row]), self.occurrence, name)

    def __getitem__(self, rows: np.ndarray) -> Draws:
        return Draws(self.seed, self.epoch, self.indices[rows], self.occurrence)


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
