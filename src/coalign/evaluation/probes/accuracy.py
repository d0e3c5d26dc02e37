"""Accuracy of a classifier on frozen features, and checks of its train, validation and test splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import Metric

# features [item, dim] and labels int64 [item] of a train, val or test split
FeatureSplit = tuple[np.ndarray, np.ndarray]


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
        """Returns the per-item values behind the metrics, and the items' classes."""
        return {"acc1": self.correct, "mean_per_class_recall": self.correct, "classes": self.labels}


def accuracy(task: str, predicted: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0) -> AccuracyResult:
    """Returns the accuracy of predicted classes for true classes `labels`, both int64 [item]."""
    correct = (predicted == labels).astype(float)
    top1, mean_per_class = metrics.mean(correct, seed=seed), metrics.mean_per_class(correct, labels, seed=seed)
    return AccuracyResult(task, top1, mean_per_class, correct, labels, num_classes)


def check_splits(**splits: FeatureSplit) -> None:
    """Raises UserError if a split is empty or has features that are not finite, or `train` has a single class."""
    for name, (features, labels) in splits.items():
        if not len(labels):
            raise UserError(f"There is nothing to probe: the {name} split has no labeled image.")
        if not np.isfinite(features).all():
            raise UserError(
                f"The {name} split's features are not finite; the weights are corrupt or the precision is too low."
            )
    if len(np.unique(splits["train"][1])) < 2:
        raise UserError("A probe needs at least two classes among the training images, but there is only one.")
