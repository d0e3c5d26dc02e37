"""Zero-shot classification: an image belongs to the class whose prompts lie nearest (Radford et al. 2021, §3.1)."""

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
from coalign.evaluation.prompts import check_distinct, checked_templates
from coalign.types import DualEncoder

_CHUNK = 8_000_000  # scores held at a time


@dataclass
class ZeroShotResult:
    """Rates are fractions. `predictions` takes the first of tied classes; the rates count ties at their expectation."""

    top1: Metric
    top5: Metric | None  # None with fewer than six classes, where it says nothing
    mean_per_class: Metric  # over the classes that occur
    chance: float  # top-1 of a guess
    per_class: list[float | None]  # None: no item of the class
    confusion: np.ndarray  # int64 [true class, predicted class]
    predictions: np.ndarray  # int64 [image]
    labels: np.ndarray  # int64 [image]
    correct: dict[
        int, np.ndarray
    ]  # float64 [image]: whether the class is among the first K (its probability under ties)
    classnames: list[str]

    def to_json(self) -> dict[str, Any]:
        """Plain values under CLIP_benchmark's names, and the intervals beside them."""
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
            "per_class": dict(zip(_told_apart(self.classnames), self.per_class)),
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        """What the figures with an interval are means of, image by image, and the images' classes."""
        top5 = {"acc5": self.correct[5]} if self.top5 is not None else {}
        return {"acc1": self.correct[1], **top5, "mean_per_class_recall": self.correct[1], "classes": self.labels}


def _told_apart(names: Sequence[str]) -> list[str]:
    """The names with a number after one that came before."""
    seen = Counter[str]()
    apart = []
    for name in names:
        seen[name] += 1
        apart.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return apart


def class_weights(
    model: DualEncoder, classnames: Sequence[str], templates: Sequence[str], repeated: bool = False
) -> Tensor:
    """float32 [class, dim]: the mean of the normalised embeddings of a class's prompts, normalised again. UserError for a name that comes
    twice, unless `repeated`: two pairs of ImageNet's classes have one name each."""
    if not repeated:
        check_distinct(classnames)
    templates = checked_templates(templates)
    prompts = [template.replace("{}", name) for name in classnames for template in templates]
    embeds = embed_texts(model, prompts).unflatten(0, (len(classnames), len(templates)))
    return F.normalize(embeds.mean(dim=1), dim=-1)


def zero_shot(
    image_embeds: Tensor, labels: Tensor, weights: Tensor, classnames: Sequence[str], seed: int = 0
) -> ZeroShotResult:
    """Scores image_embeds [image, dim] of classes `labels` int64 [image] against weights [class, dim], normalised."""
    num_classes = len(classnames)
    if len(weights) != num_classes or len(labels) != len(image_embeds):
        raise ValueError(
            f"{len(weights)} weights for {num_classes} classes, {len(labels)} labels for {len(image_embeds)} images"
        )
    if not len(labels):
        raise UserError("There is nothing to classify: no image has one of the classes as its label.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels lie in {int(labels.min())} … {int(labels.max())}, with {num_classes} classes")
    require_finite(image_embeds, "Image")
    require_finite(weights, "Class")

    better, tied, predictions = [], [], []
    rows = max(1, _CHUNK // num_classes)
    for embeds, truth in zip(image_embeds.split(rows), labels.split(rows)):
        scores = embeds @ weights.T  # [image, class]
        own = scores.gather(1, truth[:, None])
        better.append((scores > own + TIE).sum(1))
        tied.append(((scores - own).abs() <= TIE).sum(1) - 1)
        predictions.append(scores.argmax(1))
    better_n, tied_n, predicted = (torch.cat(part).numpy() for part in (better, tied, predictions))
    truth_n = labels.numpy()

    correct = metrics.hit_probability(better_n, tied_n, np.ones_like(tied_n), 1)
    correct5 = metrics.hit_probability(better_n, tied_n, np.ones_like(tied_n), 5)
    by_class = metrics.per_class(correct, truth_n, num_classes)
    pairs = np.bincount(truth_n * num_classes + predicted, minlength=num_classes**2)
    return ZeroShotResult(
        top1=metrics.mean(correct, seed=seed),
        top5=metrics.mean(correct5, seed=seed) if num_classes > 5 else None,
        mean_per_class=metrics.mean_per_class(correct, truth_n, seed=seed),
        chance=1 / num_classes,
        per_class=[None if np.isnan(rate) else float(rate) for rate in by_class],
        confusion=pairs.reshape(num_classes, num_classes),
        predictions=predicted,
        labels=truth_n,
        correct={1: correct, 5: correct5},
        classnames=list(classnames),
    )


def classify(
    model: DualEncoder,
    images: ImageEmbeds,
    labels: Mapping[int, int],
    classnames: Sequence[str],
    templates: Sequence[str],
    repeated: bool = False,
) -> Evaluation:
    """Scores the images of `embed_images`: those whose index has a class in `labels`. Names as `class_weights` takes them."""
    weights = class_weights(model, classnames, templates, repeated)
    rows = [row for row, index in enumerate(images.indices) if index in labels]
    images = ImageEmbeds(images.embeds[rows], [images.indices[row] for row in rows], images.bad)
    truth = torch.tensor([labels[index] for index in images.indices], dtype=torch.long)
    result = zero_shot(images.embeds, truth, weights, classnames)
    return Evaluation(result, images, list(classnames), weights)
