from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score

from coalign.errors import UserError
from coalign.evaluation import metrics


def naive_bootstrap(values: np.ndarray, clusters: np.ndarray, statistic, replicates: int = 4000) -> tuple[float, float]:
    generator = np.random.default_rng(123)
    groups = [values[clusters == c] for c in np.unique(clusters)]
    draws = [
        statistic(np.concatenate([groups[i] for i in generator.integers(len(groups), size=len(groups))]))
        for _ in range(replicates)
    ]
    return tuple(np.quantile(draws, [0.025, 0.975]))


@pytest.mark.parametrize(("ours", "statistic"), [(metrics.mean, np.mean), (metrics.median, np.median)])
@pytest.mark.parametrize("clustered", [False, True])
def test_interval_is_that_of_a_naive_bootstrap(ours, statistic, clustered):
    generator = np.random.default_rng(0)
    clusters = np.sort(generator.integers(0, 60, size=200)) * 7
    level = generator.normal(size=500)[clusters % 500]  # items of a cluster resemble each other
    values = np.round(level + 0.5 * generator.normal(size=200), 1)
    metric = ours(values, clusters) if clustered else ours(values)
    low, high = naive_bootstrap(values, clusters if clustered else np.arange(200), statistic)
    width = high - low
    assert metric.value == pytest.approx(statistic(values))
    assert metric.n == 200
    assert abs(metric.low - low) < 0.06 * width
    assert abs(metric.high - high) < 0.06 * width


def test_clusters_of_like_items_widen_the_interval():
    scores = np.repeat(np.random.default_rng(1).integers(0, 2, 50), 8)
    plain, clustered = metrics.mean(scores), metrics.mean(scores, np.repeat(np.arange(50), 8))
    assert clustered.high - clustered.low > 2 * (plain.high - plain.low)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(2)
    covered = 0
    for trial in range(200):
        metric = metrics.mean(generator.random(200) < 0.3, seed=trial)
        covered += metric.low <= 0.3 <= metric.high
    assert 180 <= covered <= 200


def test_same_seed_same_interval():
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
    # Stratified resampling has the closed-form variance of a mean of independent means.
    variance = sum(np.var(correct[labels == c]) / np.sum(labels == c) for c in (0, 2, 5)) / 9
    assert metric.high - metric.low == pytest.approx(2 * 1.96 * variance**0.5, rel=0.12)


def test_per_class_marks_classes_without_items():
    rates = metrics.per_class(np.array([1.0, 0.0, 1.0]), np.array([0, 0, 2]), 4)
    np.testing.assert_array_equal(rates, [0.5, np.nan, 1.0, np.nan])


@pytest.mark.parametrize("function", [metrics.mean, metrics.median])
def test_one_item_has_an_interval_without_width_and_none_is_an_error(function):
    assert function(np.array([0.25])) == metrics.Metric(0.25, 0.25, 0.25, 1)
    with pytest.raises(UserError, match="nothing to evaluate"):
        function(np.array([]))


def test_mean_per_class_of_one_class_is_the_mean():
    scores = np.array([1.0, 0.0, 1.0, 1.0])
    assert metrics.mean_per_class(scores, np.full(4, 3)).value == 0.75
    with pytest.raises(UserError, match="nothing to evaluate"):
        metrics.mean_per_class(np.array([]), np.array([], dtype=int))


def test_median_averages_the_middle_two_in_each_resample_too(monkeypatch):
    assert metrics.median(np.array([1.0, 4.0, 2.0, 9.0])).value == 3.0
    monkeypatch.setattr(metrics, "LEVEL", 0.0)  # both ends are now the median of the resamples 00, 01, 10 and 11
    assert metrics.median(np.array([0.0, 1.0])) == metrics.Metric(0.5, 0.5, 0.5, 2)


def test_hit_probability_counts_all_orders_of_the_tied():
    for better in range(3):
        for wrong in range(4):
            for right in range(1, 4):
                tied = [False] * wrong + [True] * right
                for k in range(1, 7):
                    orders = list(permutations(tied))
                    hits = np.mean([any(([False] * better + list(order))[:k]) for order in orders])
                    counts = (np.array([value]) for value in (better, wrong, right))
                    assert metrics.hit_probability(*counts, k)[0] == pytest.approx(hits)


def test_chance_median_rank_is_that_of_random_orders():
    right = np.array([1, 1, 1, 5, 5, 20])
    wrong = 100 - right
    generator = np.random.default_rng(0)
    # Rank of the best of r right ones among 100 in random order, all queries pooled.
    ranks = [1 + generator.permutation(100)[:r].min() for r in right for _ in range(4000)]
    assert metrics.chance_median_rank(wrong, right) == pytest.approx(np.median(ranks), abs=1.0)
    assert metrics.chance_median_rank(np.array([0]), np.array([1])) == 1
    assert metrics.chance_median_rank(np.array([999_999]), np.array([1])) == 500_000


# ---------------------------------------------------------------- several runs


def test_mean_median_of_one_run_is_its_median():
    generator = np.random.default_rng(4)
    values, clusters = generator.integers(1, 50, 120).astype(float), np.sort(generator.integers(0, 40, 120))
    assert metrics.mean_median([values], clusters, seed=3) == metrics.median(values, clusters, seed=3)


def test_mean_median_draws_the_same_items_for_every_run():
    """Naive: items are drawn, then each run's median is taken of the drawn ones, and the others' mean is subtracted."""
    generator = np.random.default_rng(5)
    runs = generator.exponential(20, (5, 90)).round() + generator.exponential(20, 90).round()
    clusters = np.arange(90) // 3
    found = metrics.mean_median(runs[:2], clusters, minus=runs[2:])
    draws = []
    for _ in range(3000):
        rows = (generator.integers(30, size=30)[:, None] * 3 + np.arange(3)).ravel()
        medians = np.median(runs[:, rows], axis=1)
        draws.append(medians[:2].mean() - medians[2:].mean())
    low, high = np.quantile(draws, [0.025, 0.975])
    medians = np.median(runs, axis=1)
    assert found.value == pytest.approx(medians[:2].mean() - medians[2:].mean())
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.1 * (high - low))
    same = metrics.mean_median(runs[:2], clusters, minus=runs[:2])
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_over_runs_is_the_t_interval_and_welchs():
    first, second = [0.21, 0.25, 0.24], [0.31, 0.27, 0.36, 0.30]
    alone = stats.ttest_1samp(first, 0).confidence_interval(0.95)
    assert metrics.over_runs(first) == pytest.approx(tuple(alone))
    welch = stats.ttest_ind(second, first, equal_var=False).confidence_interval(0.95)
    assert metrics.over_runs(second, first) == pytest.approx(tuple(welch))
    assert metrics.over_runs([0.5, 0.5, 0.5]) == (0.5, 0.5)
    assert metrics.over_runs([0.5]) is None
    assert metrics.over_runs(first, [0.5]) is None
