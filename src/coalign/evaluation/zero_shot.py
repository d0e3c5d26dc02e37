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

from coalign.embeds import num_samples, similarities, take
from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_texts, require_finite
from coalign.evaluation.metrics import TIE, measure
from coalign.evaluation.probes.accuracy import accuracies
from coalign.metric import Metric, Outcome
from coalign.types import DualEncoder, Embeds, Similarity, dot_product

MAX_MATRIX = 30  # classes; with more, a table of the most confused pairs is easier to read than the matrix
_CHUNK = 8_000_000  # scores in memory at a time


@dataclass
class ZeroShotResult:
    """Rates are fractions. `predictions` takes the first of tied classes; the rates count ties at their expectation."""

    # top-1, top-5 (with six classes or more, else it would be trivial), mean over the classes that occur
    metrics: list[Metric]
    per_class: list[float | None]  # None for a class without images
    confusion: np.ndarray  # int64 [true class, predicted class]
    predictions: np.ndarray  # int64 [image]
    labels: np.ndarray  # int64 [image]
    classnames: list[str]

    def per_class_recalls(self) -> dict[str, float | None]:
        """Returns the recall of each class by its name; a number is appended to a repeated name."""
        return dict(zip(_unique_names(self.classnames), self.per_class))

    def most_confused(self, count: int = 20) -> list[dict[str, Any]]:
        """Returns the most frequent mistakes: true and predicted class, number of images, and fraction of the true class's images."""
        names, wrong = _unique_names(self.classnames), self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        totals = self.confusion.sum(1)
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [(int(i), int(j)) for i, j in zip(*np.unravel_index(order, wrong.shape)) if wrong[i, j]]
        return [
            {
                "true": names[i],
                "predicted": names[j],
                "images": int(wrong[i, j]),
                "fraction": float(wrong[i, j] / totals[i]),
            }
            for i, j in pairs
        ]


def _unique_names(names: Sequence[str]) -> list[str]:
    """Returns the names with a number appended to repeated ones."""
    seen = Counter[str]()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return unique


@dataclass(frozen=True)
class ClassEmbeds:
    """Embeds of classes, with which the embeds of images are compared."""

    embeds: Any  # `Embeds`, class by class
    counts: tuple[int, ...] = ()  # of the embeds of each class; empty: one each

    @property
    def num_classes(self) -> int:
        return len(self.counts) or num_samples(self.embeds)


def embed_classes(model: DualEncoder, prompts: Sequence[Sequence[str]]) -> ClassEmbeds:
    """Returns the embeds of classes from the prompts of each.

    For cosines, it is each class's mean of normalized prompt embeddings, normalized again: float32 [class, dim]. For another similarity,
    it is all prompts, class by class.
    """
    counts = [len(each) for each in prompts]
    embeds = embed_texts(model, [prompt for each in prompts for prompt in each])
    if not model.compares_cosines:
        return ClassEmbeds(embeds, tuple(counts))
    return ClassEmbeds(F.normalize(torch.stack([part.mean(dim=0) for part in embeds.split(counts)]), dim=-1))


def class_scores(similarity: Similarity, images: Embeds, classes: ClassEmbeds) -> Tensor:
    """Returns the similarity of each image to each class, float32 [image, class]: the mean over the class's prompts (FILIP, §3.3)."""
    scores = similarities(similarity, images, classes.embeds)
    if not classes.counts:
        return scores
    return torch.stack([part.mean(dim=1) for part in scores.split(list(classes.counts), dim=1)], dim=1)


@torch.no_grad()
def zero_shot(
    image_embeds: Embeds,
    labels: Tensor,
    classes: ClassEmbeds,
    classnames: Sequence[str],
    seed: int = 0,
    similarity: Similarity = dot_product,
) -> ZeroShotResult:
    """Classifies images with true classes `labels` int64 [image] by the embeds of `embed_classes`; cosines need normalized embeds."""
    num_classes = len(classnames)
    if classes.num_classes != num_classes or len(labels) != num_samples(image_embeds):
        raise ValueError(
            f"embeds of {classes.num_classes} classes for {num_classes} names, {len(labels)} labels for {num_samples(image_embeds)} images"
        )
    if not len(labels):
        raise UserError("There is nothing to classify: no image has a label that is one of the classes.")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(
            f"labels range from {int(labels.min())} to {int(labels.max())}, but there are {num_classes} classes"
        )
    require_finite(image_embeds, "Image")
    require_finite(classes.embeds, "Class")

    better, tied, predictions = [], [], []
    step = max(1, _CHUNK // num_samples(classes.embeds))
    for start in range(0, len(labels), step):
        rows = slice(start, start + step)
        targets = labels[rows]
        scores = class_scores(similarity, take(image_embeds, rows), classes)
        target_scores = scores.gather(1, targets[:, None])
        better.append((scores > target_scores + TIE).sum(1))
        tied.append(((scores - target_scores).abs() <= TIE).sum(1) - 1)
        predictions.append(scores.argmax(1))
    better_n, tied_n, predicted = (torch.cat(part).numpy() for part in (better, tied, predictions))
    labels_n = labels.numpy()

    correct1 = metrics.hit_probability(better_n, tied_n, np.ones_like(tied_n), 1)
    correct5 = metrics.hit_probability(better_n, tied_n, np.ones_like(tied_n), 5)
    found = accuracies("Zero-shot", correct1, labels_n, num_classes, seed)
    if num_classes > 5:
        found.insert(1, measure("acc5", "Zero-shot top-5", Outcome(correct5), 5 / num_classes, seed=seed))
    by_class = metrics.per_class(correct1, labels_n, num_classes)
    confusion = np.bincount(labels_n * num_classes + predicted, minlength=num_classes**2)
    return ZeroShotResult(
        metrics=found,
        per_class=[None if np.isnan(rate) else float(rate) for rate in by_class],
        confusion=confusion.reshape(num_classes, num_classes),
        predictions=predicted,
        labels=labels_n,
        classnames=list(classnames),
    )


def classify(
    model: DualEncoder,
    images: ImageEmbeds,
    labels: Mapping[int, int],
    classnames: Sequence[str],
    prompts: Sequence[Sequence[str]],
) -> Evaluation:
    """Classifies those images of `embed_images` whose index is in `labels`, by the prompts of each class."""
    classes = embed_classes(model, prompts)
    rows = [row for row, index in enumerate(images.indices) if index in labels]
    images = ImageEmbeds(take(images.embeds, rows), [images.indices[row] for row in rows], images.bad)
    targets = torch.tensor([labels[index] for index in images.indices], dtype=torch.long)
    result = zero_shot(images.embeds, targets, classes, classnames, similarity=model.similarity)
    return Evaluation(result, images, list(classnames), classes.embeds)
