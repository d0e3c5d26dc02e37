"""Linear probe: logistic regression on frozen features, its penalty found by a parametric binary search (DeCLIP, App. D)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coalign.evaluation.accuracy import AccuracyResult, Part, accuracy, check_parts

LEAST, STEPS, A_DECADE = -6.0, 96, 8  # λ from 1e-6 to 1e6, eight steps a decade
_FIRST = 16  # steps between the first candidates: two decades
MAX_ITERATIONS = 1000  # of L-BFGS


Score = tuple[float, float]  # accuracy, and mean log-likelihood


@dataclass
class ProbeResult(AccuracyResult):
    penalty: float = 0.0  # λ
    searched: dict[float, Score] = field(default_factory=dict)  # λ -> what it is chosen by, on the validation part

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "penalty": self.penalty}


def penalty_of(step: int) -> float:
    """λ of a step of the grid, 0 … 96."""
    return 10 ** (LEAST + step / A_DECADE)


def search_penalty(score: Callable[[float], Score]) -> dict[float, Score]:
    """λ -> score of those that were tried: 1e6, 1e4, …, 1e-6, then ever nearer to the best, to eight steps a decade."""
    tried: dict[int, Score] = {}

    def best() -> int:
        return max(tried, key=lambda step: tried[step])

    wanted = list(range(STEPS, -1, -_FIRST))  # from the strongest: a weaker one can begin where a stronger one ended
    distance = _FIRST
    while True:
        tried |= {step: score(penalty_of(step)) for step in wanted if step not in tried}
        if distance == 1:
            return {penalty_of(step): tried[step] for step in sorted(tried)}
        distance //= 2
        wanted = [step for step in (best() - distance, best() + distance) if 0 <= step <= STEPS]


def best_penalty(searched: dict[float, Score]) -> float:
    return max(searched, key=lambda penalty: searched[penalty])


def validation_score(model: Any, val: Part) -> Score:
    """Accuracy, and among equal ones the log-likelihood: accuracy is flat over decades of λ, at whose ends the model is worse."""
    from sklearn.metrics import log_loss

    known = np.isin(val[1], model.classes_)  # a class that only the validation part has is wrong, and has no likelihood
    accuracy = float((model.predict(val[0]) == val[1]).mean())
    if not known.any():
        return accuracy, 0.0
    return accuracy, -float(log_loss(val[1][known], model.predict_proba(val[0][known]), labels=model.classes_))


def fit(features: np.ndarray, labels: np.ndarray, penalty: float, start: Any = None) -> Any:
    """scikit-learn's logistic regression by L-BFGS: Σ cross-entropy + λ/2 ‖W‖², from zero or from the weights of another fit of the same
    classes. features [item, dim], labels int [item]."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(C=1 / penalty, max_iter=MAX_ITERATIONS, warm_start=start is not None)
    if start is not None:
        model.coef_, model.intercept_ = start.coef_, start.intercept_
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the protocol's limit of iterations, not a fault
        return model.fit(features, labels)


def linear_probe(train: Part, val: Part, test: Part, num_classes: int, seed: int = 0) -> ProbeResult:
    """Finds λ on `val`, fits once more on `train` and `val` together, and measures on `test`. UserError where a part is empty or there is
    one class alone."""
    check_parts(train=train, validation=val, test=test)
    searched = found_penalties(train, val)
    penalty = best_penalty(searched)
    both = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    predicted = fit(*both, penalty).predict(test[0])
    found = accuracy("linear_probe", predicted, test[1], num_classes, seed)
    return ProbeResult(**vars(found), penalty=penalty, searched=searched)


def found_penalties(train: Part, val: Part) -> dict[float, Score]:
    """λ -> its score on `val` after a fit on `train`, of those that the search tries."""
    fitted: dict[float, Any] = {}

    def score(penalty: float) -> Score:
        # With next to no penalty the weights grow without end, and a fit from zero takes all its iterations.
        stronger = min((known for known in fitted if known > penalty), default=None)
        fitted[penalty] = fit(*train, penalty, fitted.get(stronger) if stronger is not None else None)
        return validation_score(fitted[penalty], val)

    return search_penalty(score)
