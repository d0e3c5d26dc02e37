from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from coalign.data.loading.order import order


def test_is_a_permutation_for_every_small_n():
    for n in range(1, 501):
        assert sorted(order(n, seed=3, epoch=n)[np.arange(n)].tolist()) == list(range(n)), n


@pytest.mark.parametrize("n", [65_536, 65_537, 99_991, 262_143])
def test_is_a_permutation_for_larger_n(n):
    assert np.bincount(order(n, seed=0, epoch=1)[np.arange(n)], minlength=n).tolist() == [1] * n


@pytest.mark.parametrize("n", [10**9 + 7, 2**40, 2**52 - 1])
def test_huge_n_is_not_stored(n):
    positions = np.concatenate([np.arange(5000), np.arange(n - 5000, n)])
    values = order(n, seed=0, epoch=0)[positions]
    assert len(set(values.tolist())) == len(positions)
    assert values.min() >= 0
    assert values.max() < n
    assert abs(values.mean() / n - 0.5) < 0.02


def test_depends_only_on_position_seed_and_epoch():
    n = 1000
    whole = order(n, 5, 2)[np.arange(n)]
    some = np.array([[7, 999], [0, 7]])
    assert (order(n, 5, 2)[some] == whole[some]).all()
    for other in (order(n, 5, 3), order(n, 6, 2), order(n, 2, 5)):
        assert (other[np.arange(n)] == whole).mean() < 0.01


def test_every_position_takes_every_value_equally_often():
    n, epochs = 11, 4000
    drawn = np.stack([order(n, 0, epoch)[np.arange(n)] for epoch in range(epochs)])
    for position in range(n):
        assert chisquare(np.bincount(drawn[:, position], minlength=n)).pvalue > 1e-4
    steps = (drawn[:, 1:] - drawn[:, :-1]) % n  # consecutive samples are independent of their distance in the data
    assert chisquare(np.bincount(steps.ravel(), minlength=n)[1:]).pvalue > 1e-4


def test_all_orders_of_few_samples_are_equally_likely():
    counts = Counter(tuple(order(4, 1, epoch)[np.arange(4)].tolist()) for epoch in range(6000))
    assert len(counts) == 24
    assert chisquare(list(counts.values())).pvalue > 1e-4


def test_positions_out_of_range_raise():
    for position in (-1, 10):
        with pytest.raises(IndexError, match="0 … 9"):
            order(10, 0, 0)[np.array([position])]
