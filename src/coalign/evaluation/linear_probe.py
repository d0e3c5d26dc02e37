"""Linear probe: logistic regression on frozen features, its penalty found by a parametric binary search (DeCLIP, App. D)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import Metric

LEAST, STEPS, A_DECADE = -6.0, 96, 8  # λ from 1e-6 to 1e6, eight steps a decade
_FIRST = 16  # steps between the first candidates: two decades
MAX_ITERATIONS = 1000  # of L-BFGS


Score = tuple[float, float]  # accuracy, and mean log-likelihood
Part = tuple[np.ndarray, np.ndarray]  # features [item, dim] and labels int64 [item]


@dataclass
class ProbeResult:
    """Rates are fractions of the test items."""

    top1: Metric
    mean_per_class: Metric  # over the classes that occur
    penalty: float  # λ
    searched: dict[float, Score]  # λ -> what it is chosen by, on the validation part
    correct: np.ndarray  # float64 [item]
    labels: np.ndarray  # int64 [item]
    num_classes: int

    def to_json(self) -> dict[str, Any]:
        intervals = {"acc1": self.top1.to_json(), "mean_per_class_recall": self.mean_per_class.to_json()}
        return {
            "task": "linear_probe",
            "acc1": self.top1.value,
            "mean_per_class_recall": self.mean_per_class.value,
            "chance": 1 / self.num_classes,
            "penalty": self.penalty,
            "intervals": intervals,
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        """What the figures are means of, item by item, and the items' classes."""
        return {"acc1": self.correct, "mean_per_class_recall": self.correct, "classes": self.labels}


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
    for name, (features, labels) in (("train", train), ("validation", val), ("test", test)):
        if not len(labels):
            raise UserError(f"There is nothing to probe: the {name} part has no labelled image.")
        if not np.isfinite(features).all():
            raise UserError(
                f"The {name} part's features are not finite; the weights are broken or the precision is too low."
            )
    if len(np.unique(train[1])) < 2:
        raise UserError("A probe needs at least two classes among the training images, and there is one alone.")
    fitted: dict[float, Any] = {}

    def score(penalty: float) -> Score:
        # With next to no penalty the weights grow without end, and a fit from zero takes all its iterations.
        stronger = min((known for known in fitted if known > penalty), default=None)
        fitted[penalty] = fit(*train, penalty, fitted.get(stronger) if stronger is not None else None)
        return validation_score(fitted[penalty], val)

    searched = search_penalty(score)
    penalty = best_penalty(searched)
    both = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    correct = (fit(*both, penalty).predict(test[0]) == test[1]).astype(float)
    return ProbeResult(
        top1=metrics.mean(correct, seed=seed),
        mean_per_class=metrics.mean_per_class(correct, test[1], seed=seed),
        penalty=penalty,
        searched=searched,
        correct=correct,
        labels=test[1],
        num_classes=num_classes,
    )
