"""Few-shot linear probes: logistic regression on a few images per class, over several draws (Radford et al. 2021, §3.1)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from coalign.evaluation.metrics import measure
from coalign.evaluation.probes.accuracy import FeatureSplit, check_splits
from coalign.evaluation.probes.linear import best_penalty, fit, score_penalties
from coalign.metric import Metric, Outcome

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5


@dataclass
class FewShotResult:
    """Accuracies are fractions of the test items, averaged over the draws. Intervals resample items, each with all its draws."""

    metrics: list[Metric]  # "1-shot", "2-shot", …
    over_draws: dict[str, float]  # by metric name: standard deviation of the accuracy over the draws


def few_shot(
    train: FeatureSplit, val: FeatureSplit, test: FeatureSplit, num_classes: int, seed: int = 0
) -> FewShotResult:
    """Fits a linear probe on n images per class of `train`, for each n of SHOTS, in DRAWS random draws; `val` selects the penalty.

    Smaller classes contribute all of their images. Values of n that exceed the largest class are skipped. Raises UserError if a split is
    empty or `train` has a single class.
    """
    check_splits(train=train, validation=val, test=test)
    features, labels = train
    largest_class = int(np.bincount(labels).max())
    metrics, over_draws = [], {}
    for shots in [n for n in SHOTS if n <= largest_class]:
        correct = np.stack([_correct(features, labels, shots, val, test, seed + draw) for draw in range(DRAWS)])
        name = f"{shots}-shot"
        outcome = Outcome(correct.mean(0))
        metrics.append(measure(name, f"{name} linear probe top-1", outcome, 1 / num_classes, seed=seed))
        over_draws[name] = float(correct.mean(1).std(ddof=1))
    return FewShotResult(metrics, over_draws)


def _correct(
    features: np.ndarray, labels: np.ndarray, shots: int, val: FeatureSplit, test: FeatureSplit, seed: int
) -> np.ndarray:
    """Returns whether each test item is classified correctly after one draw, float64 [item]."""
    rng = np.random.default_rng([shots, seed])
    rows_per_class = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    rows = np.sort(np.concatenate(rows_per_class))
    train = features[rows], labels[rows]
    penalty = best_penalty(score_penalties(train, val))
    return (fit(*train, penalty).predict(test[0]) == test[1]).astype(float)
