from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from coalign.errors import UserError
from coalign.evaluation import metrics


def median(values, clusters=None):
    return metrics.mean_median([values], clusters)


def naive_bootstrap(values: np.ndarray, clusters: np.ndarray, statistic, replicates: int = 4000) -> tuple[float, float]:
    generator = np.random.default_rng(123)
    groups = [values[clusters == c] for c in np.unique(clusters)]
    draws = [
        statistic(np.concatenate([groups[i] for i in generator.integers(len(groups), size=len(groups))]))
        for _ in range(replicates)
    ]
    return tuple(np.quantile(draws, [0.025, 0.975]))


@pytest.mark.parametrize(("ours", "statistic"), [(metrics.mean, np.mean), (median, np.median)])
@pytest.mark.parametrize("clustered", [False, True])
def test_interval_matches_a_naive_bootstrap(ours, statistic, clustered):
    generator = np.random.default_rng(0)
    clusters = np.sort(generator.integers(0, 60, size=200)) * 7
    level = generator.normal(size=500)[clusters % 500]  # items of a cluster are correlated
    values = np.round(level + 0.5 * generator.normal(size=200), 1)
    metric = ours(values, clusters) if clustered else ours(values)
    low, high = naive_bootstrap(values, clusters if clustered else np.arange(200), statistic)
    width = high - low
    assert metric.value == pytest.approx(statistic(values))
    assert metric.count == 200
    assert abs(metric.low - low) < 0.06 * width
    assert abs(metric.high - high) < 0.06 * width


def test_correlated_clusters_widen_the_interval():
    scores = np.repeat(np.random.default_rng(1).integers(0, 2, 50), 8)
    plain, clustered = metrics.mean(scores), metrics.mean(scores, np.repeat(np.arange(50), 8))
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)


def test_interval_has_nominal_coverage():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        metric = metrics.mean(generator.random(200) < 0.3, seed=trial)
        covered += metric.low <= 0.3 <= metric.high
    assert 180 <= covered <= 200


def test_interval_depends_on_the_seed_only():
    scores = np.random.default_rng(3).random(100)
    assert metrics.mean(scores, seed=5) == metrics.mean(scores, seed=5)
    assert metrics.mean(scores, seed=5) != metrics.mean(scores, seed=6)


def test_mean_per_class_is_balanced_accuracy_with_a_stratified_interval():
    generator = np.random.default_rng(4)
    labels = np.concatenate([np.zeros(150, int), np.full(30, 2), np.full(6, 5)])
    predictions = np.where(generator.random(len(labels)) < 0.6, labels, 2)
    correct = (labels == predictions).astype(float)
    metric = metrics.mean_per_class(correct, labels)
    assert metric.value == pytest.approx(balanced_accuracy_score(labels, predictions))
    # stratified resampling has the closed-form variance of a mean of independent means
    variance = sum(np.var(correct[labels == c]) / np.sum(labels == c) for c in (0, 2, 5)) / 9
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.12)


def test_per_class_is_nan_for_classes_without_items():
    rates = metrics.per_class(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 2]), 4)
    np.testing.assert_array_equal(rates, [0.5, np.nan, 1.0, np.nan])


@pytest.mark.parametrize("function", [metrics.mean, median])
def test_single_item_has_zero_width_and_no_items_raise(function):
    assert function(np.array([0.25])) == metrics.Estimate(0.25, 0.25, 0.25, 1)
    with pytest.raises(UserError, match="nothing to evaluate"):
        function(np.array([]))


def test_mean_per_class_of_one_class_is_the_mean():
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    assert metrics.mean_per_class(scores, np.full(4, 3)).value == 0.75
    with pytest.raises(UserError, match="nothing to evaluate"):
        metrics.mean_per_class(np.array([]), np.array([], dtype=int))


def test_median_averages_the_middle_two_in_each_resample(monkeypatch):
    assert median(np.array([1.0, 4.0, 2.0, 9.0])).value == 3.0
    monkeypatch.setattr(metrics, "LEVEL", 0.0)  # both bounds become the median of the resamples 00, 01, 10 and 11
    assert median(np.array([0.0, 1.0])) == metrics.Estimate(0.5, 0.5, 0.5, 2)


def test_hit_probability_averages_over_all_orders_of_ties():
    for better in range(3):
        for incorrect in range(4):
            for correct in range(1, 4):
                tied = [False] * incorrect + [True] * correct
                for k in range(1, 7):
                    orders = list(permutations(tied))
                    hits = np.mean([any(([False] * better + list(order))[:k]) for order in orders])
                    counts = (np.array([value]) for value in (better, incorrect, correct))
                    assert metrics.hit_probability(*counts, k)[0] == pytest.approx(hits)


@pytest.mark.parametrize("num_queries", [2001, 2002])
def test_drawn_ranks_are_distributed_as_random_orders(num_queries):
    """Ranks of queries with the same ties are distributed as in shuffled lists, whatever the other queries are."""
    generator = np.random.default_rng(0)
    kinds = [(0, 24, 1), (3, 10, 4), (7, 0, 2), (1, 1, 1), (0, 99, 5)]  # better, tied incorrect, tied correct
    chosen = generator.integers(len(kinds), size=num_queries)
    ranks = metrics.drawn_ranks(*np.array(kinds)[chosen].T)
    for number, (better, incorrect, correct) in enumerate(kinds):
        is_correct = np.arange(incorrect + correct) < correct
        shuffled = [better + 1 + generator.permutation(is_correct).argmax() for _ in range(4000)]
        drawn = ranks[chosen == number]
        assert stats.ks_2samp(drawn, shuffled).statistic < 0.05
        assert drawn.min() >= better + 1
        assert drawn.max() <= better + 1 + incorrect


@pytest.mark.parametrize(("candidates", "correct"), [(25, 1), (24, 1), (1000, 1), (25, 5), (1_000_000, 1), (5, 5)])
def test_median_of_drawn_ranks(candidates, correct):
    """The median of equal queries is that of the distribution of the smallest of `correct` numbers out of `candidates`."""
    ranks = np.arange(1, candidates + 1)
    queries = np.ones(1001, int)
    drawn = metrics.drawn_ranks(0 * queries, (candidates - correct) * queries, correct * queries)
    survival = stats.hypergeom(candidates, correct, ranks).pmf(0)  # P(rank > r)
    assert np.median(drawn) == ranks[survival <= 0.5 + 1e-9][0]


# ---------------------------------------------------------------- several runs


def test_mean_median_shares_resamples_among_runs():
    """Against a naive bootstrap of the difference between two groups of runs."""
    generator = np.random.default_rng(5)
    runs = generator.exponential(20, (5, 90)).round() + generator.exponential(20, 90).round()
    clusters = np.arange(90) // 3
    metric = metrics.mean_median(runs[:2], clusters, minus=runs[2:])
    draws = []
    for _ in range(3000):
        rows = (generator.integers(30, size=30)[:, None] * 3 + np.arange(3)).ravel()
        medians = np.median(runs[:, rows], axis=1)
        draws.append(medians[:2].mean() - medians[2:].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    medians = np.median(runs, axis=1)
    assert metric.value == pytest.approx(medians[:2].mean() - medians[2:].mean())
    assert (metric.low, metric.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    same = metrics.mean_median(runs[:2], clusters, minus=runs[:2])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_over_runs_matches_t_and_welch_intervals():
    first, second = [0.21, 0.25, 0.24], [0.31, 0.27, 0.36, 0.30]
    expected = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    assert metrics.over_runs(first) == pytest.approx(tuple(expected))
    welch = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert metrics.over_runs(second, first) == pytest.approx(tuple(welch))
    assert metrics.over_runs([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert metrics.over_runs([0.5]) is None
    assert metrics.over_runs(first, [0.5]) is None


@pytest.mark.parametrize("statistic", ["mean", "mean per class", "median"])
def test_the_estimate_of_a_difference_is_paired(statistic):
    """Resamples are shared, so a constant difference has no width; runs count by their mean."""
    generator = np.random.default_rng(6)
    values, groups = generator.integers(0, 20, 60).astype(float), np.arange(60) // 5
    runs = [metrics.Outcome(values + shift, groups, statistic) for shift in (0.0, 1.0, 5.0)]
    alone, several, difference = (
        metrics.estimate(runs[:1]),
        metrics.estimate(runs),
        metrics.estimate(runs[1:], runs[:1]),
    )
    assert several.value == pytest.approx(alone.value + 2)
    assert (several.low, several.high) == pytest.approx((alone.low + 2, alone.high + 2))
    assert (difference.value, difference.low, difference.high) == pytest.approx((3, 3, 3))
    assert alone.low < alone.value < alone.high
    metric = metrics.measure("name", "Title", runs[0], chance=0.5)
    assert (metric.value, metric.low, metric.high, metric.count) == (alone.value, alone.low, alone.high, 60)
    assert metric.kind == ("rank" if statistic == "median" else "rate")
