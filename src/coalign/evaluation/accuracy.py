"""Accuracy of a classifier on frozen features, and what its parts must be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import Metric

Part = tuple[np.ndarray, np.ndarray]  # features [item, dim] and labels int64 [item]


@dataclass
class AccuracyResult:
    """Rates are fractions of the test items."""

    task: str
    top1: Metric
    mean_per_class: Metric  # over the classes that occur
    correct: np.ndarray  # float64 [item]
    labels: np.ndarray  # int64 [item]
    num_classes: int

    def to_json(self) -> dict[str, Any]:
        intervals = {"acc1": self.top1.to_json(), "mean_per_class_recall": self.mean_per_class.to_json()}
        return {
            "task": self.task,
            "acc1": self.top1.value,
            "mean_per_class_recall": self.mean_per_class.value,
            "chance": 1 / self.num_classes,
            "intervals": intervals,
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        """What the figures are means of, item by item, and the items' classes."""
        return {"acc1": self.correct, "mean_per_class_recall": self.correct, "classes": self.labels}


def accuracy(task: str, predicted: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0) -> AccuracyResult:
    """Of predicted classes int64 [item] for items of the classes `labels`."""
    correct = (predicted == labels).astype(float)
    top1, mean_per_class = metrics.mean(correct, seed=seed), metrics.mean_per_class(correct, labels, seed=seed)
    return AccuracyResult(task, top1, mean_per_class, correct, labels, num_classes)


def check_parts(**parts: Part) -> None:
    """UserError where a part is empty or its features are not finite, or where the training part has one class alone."""
    for name, (features, labels) in parts.items():
        if not len(labels):
            raise UserError(f"There is nothing to probe: the {name} part has no labelled image.")
        if not np.isfinite(features).all():
            raise UserError(
                f"The {name} part's features are not finite; the weights are broken or the precision is too low."
            )
    if len(np.unique(parts["train"][1])) < 2:
        raise UserError("A probe needs at least two classes among the training images, and there is one alone.")
