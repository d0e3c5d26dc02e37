"""The bootstrap over seeds and items, compared with loops, with simulated data and with its two limits."""

import numpy as np
import pytest

from coalign.evaluation import metrics
from coalign.evaluation.metrics import arm_draws, hierarchical
from coalign.metric import Outcome


def rates(generator, num_runs, images, captions, shift=0.0):
    """Runs of two metrics: a value per image, and per caption of the same images, correlated within an image."""
    ability, level = 0.5 * generator.normal(size=(num_runs, 1)), generator.normal(size=(1, images))
    image_of_text = np.repeat(np.arange(images), captions)

    def run(row):
        return [
            Outcome((row + 0.3 * generator.normal(size=images) > 0).astype(float), np.arange(images) * 3),
            Outcome(
                (row[image_of_text] + generator.normal(size=len(image_of_text)) > 0).astype(float), image_of_text * 3
            ),
        ]

    return [run(row) for row in ability + level + shift]


def naive(runs, minus, replicates):
    """The same bootstrap, written as loops."""
    generator = np.random.default_rng(123)
    images = np.unique(runs[0][0].groups)
    draws = []
    for _ in range(replicates):
        drawn = generator.choice(images, len(images))
        difference = 0.0
        for arm, sign in ((runs, 1), (minus, -1)):
            of_run = []
            for run in arm:
                values = [np.concatenate([each.values[each.groups == image] for image in drawn]).mean() for each in run]
                of_run.append(np.mean(values))
            seeds = [of_run[i] for i in generator.integers(len(arm), size=len(arm))]
            center, k = np.mean(of_run), len(arm)
            difference += sign * (center + np.sqrt(k / (k - 1)) * (np.mean(seeds) - center))
        draws.append(difference)
    return np.array(draws)


def test_it_matches_loops():
    generator = np.random.default_rng(0)
    runs, minus = rates(generator, 3, 25, 2, 0.3), rates(generator, 4, 25, 2)
    found, draws = hierarchical(runs, minus), naive(runs, minus, 800)
    low, high = np.quantile(draws, [0.025, 0.975])
    assert found.value == pytest.approx(
        np.mean([each.values.mean() for run in runs for each in run])
        - np.mean([each.values.mean() for run in minus for each in run])
    )
    assert abs(found.low - low) < 0.1 * (high - low)
    assert abs(found.high - high) < 0.1 * (high - low)
    assert found.p == pytest.approx(2 * min(np.mean(draws <= 0), np.mean(draws >= 0)), abs=0.05)


def test_coverage_is_near_nominal(monkeypatch):
    monkeypatch.setattr(metrics, "HIERARCHICAL_REPLICATES", 500)
    generator, covered = np.random.default_rng(1), 0
    for trial in range(200):
        items = generator.normal(size=60)  # shared by both arms
        runs, minus = (
            [
                [Outcome(items + effect + own + 0.3 * generator.normal(size=60))]
                for own in 0.1 * generator.normal(size=5)
            ]
            for effect in (0.2 + 0.5 * generator.normal(size=60), 0.0)
        )
        found = hierarchical(runs, minus, seed=trial)
        covered += found.low <= 0.2 <= found.high
    assert 180 <= covered <= 198


@pytest.mark.parametrize("statistic", ["mean", "mean per class", "median"])
def test_with_equal_runs_it_is_the_paired_bootstrap_of_items(statistic):
    generator = np.random.default_rng(2)
    groups = generator.integers(0, 4 if statistic == "mean per class" else 40, size=120)
    one, other = (Outcome(generator.normal(size=120) + shift, groups, statistic) for shift in (0.4, 0.0))
    found, plain = hierarchical([[one]] * 3, [[other]] * 2), metrics.estimate([one], [other])
    width = plain.high - plain.low
    assert found.value == pytest.approx(plain.value)
    assert (found.low, found.high) == pytest.approx((plain.low, plain.high), abs=0.1 * width)


def test_with_constant_items_it_has_the_variance_of_means_over_seeds():
    """Without the correction, it would be smaller by (k - 1) / k: by a third for three seeds."""
    values = (np.array([0.1, 0.5, 0.3]), np.array([0.2, 0.3, 0.5, 0.1, 0.9]))
    arms = [[[Outcome(np.full(10, value))] for value in of_arm] for of_arm in values]
    means, draws = arm_draws(arms)
    assert means == pytest.approx([of_arm.mean() for of_arm in values])
    assert draws.var(1) == pytest.approx([of_arm.var(ddof=1) / len(of_arm) for of_arm in values], rel=0.05)
    assert abs(np.corrcoef(draws)[0, 1]) < 0.05  # arms draw their seeds independently


def test_p_values_at_the_limits():
    worse, better = ([[Outcome(np.full(5, value))]] * 2 for value in (0.2, 0.4))
    assert hierarchical(better, worse).p == pytest.approx(2 / 10_001)
    assert hierarchical(worse, worse).p == 1.0
    assert hierarchical(better).p is None
