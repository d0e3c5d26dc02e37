"""Zero-shot classification: the predicted class is the one whose prompts are most similar to the image (Radford et al. 2021, §3.1)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_texts, require_finite
from coalign.evaluation.metrics import TIE, Metric
from coalign.evaluation.prompts import check_distinct, check_templates
from coalign.types import DualEncoder

_CHUNK = 8_000_000  # scores in memory at a time


@dataclass
class ZeroShotResult:
    """Rates are fractions. `predictions` takes the first of tied classes; the rates count ties at their expectation."""

    top1: Metric
    top5: Metric | None  # None with fewer than six classes, as it would be trivial
    mean_per_class: Metric  # over the classes that occur
    chance: float  # top-1 accuracy of a random guess
    per_class: list[float | None]  # None for a class without images
    confusion: np.ndarray  # int64 [true class, predicted class]
    predictions: np.ndarray  # int64 [image]
    labels: np.ndarray  # int64 [image]
    # K -> float64 [image]: whether the true class is among the top K (its probability under ties)
    correct: dict[int, np.ndarray]
    classnames: list[str]

    def to_json(self) -> dict[str, Any]:
        """Returns plain values under CLIP_benchmark's names, with intervals beside them."""
        intervals = {"acc1": self.top1.to_json(), "mean_per_class_recall": self.mean_per_class.to_json()}
        if self.top5 is not None:
            intervals["acc5"] = self.top5.to_json()
        return {
            "task": "zeroshot_classification",
            "acc1": self.top1.value,
            "acc5": None if self.top5 is None else self.top5.value,
            "mean_per_class_recall": self.mean_per_class.value,
            "chance": self.chance,
            "images": self.top1.n,
            "intervals": intervals,
            "per_class": dict(zip(_unique_names(self.classnames), self.per_class)),
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        """Returns the per-image values behind the metrics with an interval, and the images' classes."""
        top5 = {"acc5": self.correct[5]} if self.top5 is not None else {}
        return {"acc1": self.correct[1], **top5, "mean_per_class_recall": self.correct[1], "classes": self.labels}


def _unique_names(names: Sequence[str]) -> list[str]:
    """Returns the names with a number appended to repeated ones."""
    seen = Counter[str]()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


def class_weights(
    model: DualEncoder, classnames: Sequence[str], templates: Sequence[str], allow_duplicates: bool = False
) -> Tensor:
    """Returns each class's mean of normalized prompt embeddings, normalized again: float32 [class, dim].

    Raises UserError for a repeated name, unless `allow_duplicates`: ImageNet has two pairs of classes with the same name.
    """
    if not allow_duplicates:
        check_distinct(classnames)
    check_templates(templates)
    prompts = [template.replace("{}", name) for name in classnames for template in templates]
    embeds = embed_texts(model, prompts).unflatten(0, (len(classnames), len(templates)))
    return F.normalize(embeds.mean(dim=1), dim=-1)


def zero_shot(
    image_embeds: Tensor, labels: Tensor, weights: Tensor, classnames: Sequence[str], seed: int = 0
) -> ZeroShotResult:
    """Classifies image_embeds [image, dim] with true classes `labels` int64 [image] by weights [class, dim]; both are normalized."""
    num_classes = len(classnames)
    if len(weights) != num_classes or len(labels) != len(image_embeds):
        raise ValueError(
            f"{len(weights)} weights for {num_classes} classes, {len(labels)} labels for {len(image_embeds)} images"
        )
    if not len(labels):
        raise UserError("There is nothing to classify: no image has a label that is one of the classes.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())}, but there are {num_classes} classes"
        )
    require_finite(image_embeds, "Image")
    require_finite(weights, "Class")

    better, tied, predictions = [], [], []
    rows = max(1, _CHUNK // num_classes)
    for embeds, targets in zip(image_embeds.split(rows), labels.split(rows)):
        scores = embeds @ weights.T  # [image, class]
        target_scores = scores.gather(1, targets[:, None])
        better.append((scores > target_scores + TIE).sum(1))
        tied.append(((scores - target_scores).abs() <= TIE).sum(1) - 1)
        predictions.append(scores.argmax(1))
    better_n, tied_n, predicted = (torch.cat(part).numpy() for part in (better, tied, predictions))
    labels_n = labels.numpy()

    correct1 = metrics.hit_probability(better_n, tied_n, np.ones_like(tied_n), 1)
    correct5 = metrics.hit_probability(better_n, tied_n, np.ones_like(tied_n), 5)
    by_class = metrics.per_class(correct1, labels_n, num_classes)
    confusion = np.bincount(labels_n * num_classes + predicted, minlength=num_classes**2)
    return ZeroShotResult(
        top1=metrics.mean(correct1, seed=seed),
        top5=metrics.mean(correct5, seed=seed) if num_classes > 5 else None,
        mean_per_class=metrics.mean_per_class(correct1, labels_n, seed=seed),
        chance=1 / num_classes,
        per_class=[None if np.isnan(rate) else float(rate) for rate in by_class],
        confusion=confusion.reshape(num_classes, num_classes),
        predictions=predicted,
        labels=labels_n,
        correct={1: correct1, 5: correct5},
        classnames=list(classnames),
    )


def classify(
    model: DualEncoder,
    images: ImageEmbeds,
    labels: Mapping[int, int],
    classnames: Sequence[str],
    templates: Sequence[str],
    allow_duplicates: bool = False,
) -> Evaluation:
    """Classifies those images of `embed_images` whose index is in `labels`; for the other arguments see `class_weights`."""
    weights = class_weights(model, classnames, templates, allow_duplicates)
    rows = [row for row, index in enumerate(images.indices) if index in labels]
    images = ImageEmbeds(images.embeds[rows], [images.indices[row] for row in rows], images.bad)
    targets = torch.tensor([labels[index] for index in images.indices], dtype=torch.long)
    result = zero_shot(images.embeds, targets, weights, classnames)
    return Evaluation(result, images, list(classnames), weights)
