"""Accuracy of a classifier on frozen features, and checks of its train, validation and test splits."""

from __future__ import annotations

import numpy as np

from coalign.errors import UserError
from coalign.evaluation.metrics import measure
from coalign.metric import Metric, Outcome

# features [item, dim] and labels int64 [item] of a train, val or test split
FeatureSplit = tuple[np.ndarray, np.ndarray]


def accuracy(title: str, predicted: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0) -> list[Metric]:
    """Returns the accuracy of predicted classes for true classes `labels`, both int64 [item]: over items, and per class.

    The mean per class covers the classes that occur. title: of the classifier, such as "Linear probe".
    """
    correct = (predicted == labels).astype(float)
    return accuracies(title, correct, labels, num_classes, seed)


def accuracies(title: str, correct: np.ndarray, labels: np.ndarray, num_classes: int, seed: int = 0) -> list[Metric]:
    """Returns the metrics of `accuracy` from `correct`, float64 [item]: 1, 0, or the probability under ties."""
    by_class = Outcome(correct, labels, "mean per class")
    return [
        measure("acc1", f"{title} top-1", Outcome(correct), 1 / num_classes, seed=seed),
        measure("mean_per_class_recall", f"{title} mean per class", by_class, 1 / num_classes, seed=seed),
    ]


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
