"""Few-shot linear probes: logistic regression on a few images of each class, drawn several times (Radford et al. 2021, §3.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coalign.evaluation import metrics
from coalign.evaluation.accuracy import Part, check_parts
from coalign.evaluation.linear_probe import best_penalty, fit, found_penalties
from coalign.evaluation.metrics import Metric

SHOTS = (1, 2, 4, 8, 16)
DRAWS = 5


@dataclass
class FewShotResult:
    """Accuracies are fractions of the test items, means over the draws. Their intervals resample items, each with all its outcomes."""

    by_shots: dict[int, Metric]
    over_draws: dict[int, float]  # standard deviation of the accuracy from draw to draw
    num_classes: int

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "few_shot_probe",
            "intervals": {f"{shots}-shot": metric.to_json() for shots, metric in self.by_shots.items()},
            "over_draws": {f"{shots}-shot": value for shots, value in self.over_draws.items()},
            "draws": DRAWS,
            "chance": 1 / self.num_classes,
        }


def few_shot(train: Part, val: Part, test: Part, num_classes: int, seed: int = 0) -> FewShotResult:
    """For each number of SHOTS, as many images of each class of `train` (all, of a class that has fewer), the penalty found on `val`, DRAWS
    times. Numbers of shots that no class has are left out. UserError where a part is empty or there is one class alone."""
    check_parts(train=train, validation=val, test=test)
    features, labels = train
    most = int(np.bincount(labels).max())
    by_shots, over_draws = {}, {}
    for shots in [number for number in SHOTS if number <= most]:
        correct = np.stack([_draw(features, labels, shots, val, test, seed + draw) for draw in range(DRAWS)])
        by_shots[shots] = metrics.mean(correct.mean(0), seed=seed)
        over_draws[shots] = float(correct.mean(1).std(ddof=1))
    return FewShotResult(by_shots, over_draws, num_classes)


def _draw(features: np.ndarray, labels: np.ndarray, shots: int, val: Part, test: Part, seed: int) -> np.ndarray:
    """Whether each test item is right, float64 [item]."""
    rng = np.random.default_rng([shots, seed])
    drawn = [rng.permutation(np.flatnonzero(labels == label))[:shots] for label in np.unique(labels)]
    rows = np.sort(np.concatenate(drawn))
    chosen = features[rows], labels[rows]
    penalty = best_penalty(found_penalties(chosen, val))
    return (fit(*chosen, penalty).predict(test[0]) == test[1]).astype(float)
