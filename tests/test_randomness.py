from __future__ import annotations

import hashlib
import itertools

import numpy as np
from scipy.stats import kstest

from coalign.randomness import Draws, generator, stable_hash


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


def test_uniform_draws_depend_on_every_argument_and_not_on_other_samples():
    indices = np.array([5, 0, 2**40, 7])
    ours = Draws(1, 2, indices, 3).uniform("view", 20)
    assert ours.shape == (4, 20)
    for row in range(4):
        assert (Draws(1, 2, indices[[row]], 3).uniform("view", 7)[0] == ours[row, :7]).all()
    others = [Draws(0, 2, indices, 3), Draws(1, 0, indices, 3), Draws(1, 2, indices + 1, 3), Draws(1, 2, indices, 0)]
    for other in [*(each.uniform("view", 20) for each in others), Draws(1, 2, indices, 3).uniform("other", 20)]:
        assert not np.isin(other, ours).any()
    assert (Draws(1, 2, indices, 3)[np.array([2, 0])].uniform("view", 20) == ours[[2, 0]]).all()


def test_uniform_draws_are_a_splitmix64_sequence():
    """As in Steele et al. 2014, in Python's integers."""

    def mix(value):
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        value = (value ^ value >> 27) * 0x94D049BB133111EB % 2**64
        return value ^ value >> 31

    start = mix((mix(9) + stable_hash(4, 3, 0, "view")) % 2**64)
    expected = [(mix((start + step * 0x9E3779B97F4A7C15) % 2**64) >> 11) / 2**53 for step in range(1, 6)]
    assert Draws(4, 3, np.array([9])).uniform("view", 5)[0].tolist() == expected


def test_uniform_draws_are_uniform_and_independent():
    draws = Draws(0, 0, np.arange(4000)).uniform("view", 8)
    assert draws.min() >= 0
    assert draws.max() < 1
    for column in draws.T:
        assert kstest(column, "uniform").pvalue > 1e-3
    later = [draws, Draws(0, 1, np.arange(4000)).uniform("view", 8), Draws(0, 0, np.arange(4000)).uniform("b", 8)]
    correlations = np.corrcoef(np.concatenate([each[:-1].T for each in later] + [draws[1:].T]))
    assert np.abs(correlations - np.eye(len(correlations))).max() < 5 / 4000**0.5
