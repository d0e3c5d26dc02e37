"""All randomness of the data: a pure function of (seed, epoch, sample, occurrence, view), whoever computes it, wherever, in any order."""

from __future__ import annotations

import hashlib

import numpy as np


def stable_hash(*parts: object) -> int:
    """63-bit hash of the parts' text, the same on every machine and in every process."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(seed: int, epoch: int, index: int, occurrence: int, view: str) -> np.random.Generator:
    """The generator of one view of one sample. `occurrence` tells apart several uses of a sample within one epoch."""
    key = hashlib.blake2b(f"{seed}/{epoch}/{index}/{occurrence}/{view}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
