from __future__ import annotations

import hashlib
import itertools

import numpy as np

from coalign.randomness import generator, stable_hash


def test_generator_matches_keyed_philox():
    for index in range(50):
        key = hashlib.blake2b(f"1/2/{index}/4/view".encode(), digest_size=16).digest()
        reference = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))
        ours = generator(1, 2, index, 4, "view")
        assert (ours.random(100) == reference.random(100)).all()
        assert (ours.normal(size=7) == reference.normal(size=7)).all()
        assert (ours.integers(0, 10, 9) == reference.integers(0, 10, 9)).all()


def test_every_argument_changes_the_stream():
    arguments = [(*numbers, view) for numbers in itertools.product(range(3), repeat=4) for view in ("a", "b")]
    assert len({generator(*args).integers(2**63) for args in arguments}) == len(arguments)


def test_stable_hash_is_63_bits_of_blake2b():
    digest = hashlib.blake2b(b"a\x1f1", digest_size=8).digest()
    assert stable_hash("a", 1) == int.from_bytes(digest, "little") // 2
    assert stable_hash("a", 1) != stable_hash("a1")
    assert all(0 <= stable_hash(number) < 2**63 for number in range(1000))
