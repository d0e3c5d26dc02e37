"""Linear probe: logistic regression on frozen features, with its penalty selected by a parametric binary search (DeCLIP, App. D)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coalign.evaluation.probes.accuracy import FeatureSplit, accuracy, check_splits
from coalign.metric import Metric

MIN_EXPONENT, STEPS, STEPS_PER_DECADE = -6.0, 96, 8  # grid of λ from 1e-6 to 1e6
_FIRST_STRIDE = 16  # grid steps between the first candidates: two decades
MAX_ITERATIONS = 1000  # of L-BFGS


Score = tuple[float, float]  # accuracy, and mean log-likelihood


@dataclass
class ProbeResult:
    metrics: list[Metric]
    penalty: float  # λ
    scores: dict[float, Score]  # λ -> validation score, for all candidates


def penalty_at(step: int) -> float:
    """Returns λ at a grid step, 0 to 96."""
    return 10 ** (MIN_EXPONENT + step / STEPS_PER_DECADE)


def search_penalty(score: Callable[[float], Score]) -> dict[float, Score]:
    """Searches the grid: 1e6, 1e4, …, 1e-6, then around the best with half the stride each time. Returns λ -> score of all candidates."""
    scores: dict[int, Score] = {}

    def best() -> int:
        return max(scores, key=lambda step: scores[step])

    # strongest first: a fit can start from the solution for a stronger penalty
    candidates = list(range(STEPS, -1, -_FIRST_STRIDE))
    stride = _FIRST_STRIDE
    while True:
        scores |= {step: score(penalty_at(step)) for step in candidates if step not in scores}
        if stride == 1:
            return {penalty_at(step): scores[step] for step in sorted(scores)}
        stride //= 2
        candidates = [step for step in (best() - stride, best() + stride) if 0 <= step <= STEPS]


def best_penalty(scores: dict[float, Score]) -> float:
    return max(scores, key=lambda penalty: scores[penalty])


def validation_score(model: Any, val: FeatureSplit) -> Score:
    """Returns the accuracy and, to break ties, the log-likelihood.

    Accuracy is flat over decades of λ, and the model is worse at their ends.
    """
    from sklearn.metrics import log_loss

    # classes that only the validation split has count as errors, without likelihood
    known = np.isin(val[1], model.classes_)
    accuracy = float((model.predict(val[0]) == val[1]).mean())
    if not known.any():
        return accuracy, 0.0
    return accuracy, -float(log_loss(val[1][known], model.predict_proba(val[0][known]), labels=model.classes_))


def fit(features: np.ndarray, labels: np.ndarray, penalty: float, start: Any = None) -> Any:
    """Fits scikit-learn's logistic regression by L-BFGS: Σ cross-entropy + λ/2 ‖W‖²; features [item, dim], labels int [item].

    The weights start from zero, or from `start`, another fit with the same classes.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_ = start.coef_, start.intercept_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol limits the iterations
        return model.fit(features, labels)


def linear_probe(
    train: FeatureSplit, val: FeatureSplit, test: FeatureSplit, num_classes: int, seed: int = 0
) -> ProbeResult:
    """Selects λ on `val`, refits on `train` and `val` together, and evaluates on `test`.

    Raises UserError if a split is empty or `train` has a single class.
    """
    check_splits(train=train, validation=val, test=test)
    scores = score_penalties(train, val)
    penalty = best_penalty(scores)
    both = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    predicted = fit(*both, penalty).predict(test[0])
    return ProbeResult(accuracy("Linear probe", predicted, test[1], num_classes, seed), penalty, scores)


def score_penalties(train: FeatureSplit, val: FeatureSplit) -> dict[float, Score]:
    """Returns λ -> score on `val` after a fit on `train`, for the candidates of `search_penalty`."""
    models: dict[float, Any] = {}

    def score(penalty: float) -> Score:
        # with hardly any penalty the weights grow without bound, and a fit from zero uses up its iterations
        stronger = min((other for other in models if other > penalty), default=None)
        models[penalty] = fit(*train, penalty, models.get(stronger) if stronger is not None else None)
        return validation_score(models[penalty], val)

    return search_penalty(score)
