"""Compositionality: choices between a true and a false caption that differ in one fact (SugarCrepe), and Winoground's pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_texts
from coalign.evaluation.metrics import TIE, Metric
from coalign.types import DualEncoder, Foil


@dataclass
class CompositionalityResult:
    """Accuracies are fractions; a tie counts one half, so chance is 1/2."""

    overall: Metric  # mean over the kinds
    by_kind: dict[str, Metric]
    by_how: dict[str, Metric]  # "replace", "swap" or "add" -> mean over its kinds
    correct: np.ndarray  # float64 [item]: 1, 0, or 1/2 for a tie
    kinds: np.ndarray  # int64 [item], position in `by_kind`
    images: np.ndarray  # int64 [item], image index: the bootstrap draws an image with all of its items

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "compositionality",
            "accuracy": self.overall.to_json(),
            "by_kind": {kind: metric.to_json() for kind, metric in self.by_kind.items()},
            "by_how": {how: metric.to_json() for how, metric in self.by_how.items()},
            "chance": 0.5,
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        """Returns the per-item values behind the accuracies, overall and for each kind."""
        outcomes = {"mean_per_kind": self.correct, "classes": self.kinds}
        for number, kind in enumerate(self.by_kind):
            rows = self.kinds == number
            outcomes |= {f"{kind}.accuracy": self.correct[rows], f"{kind}.clusters": self.images[rows]}
        return outcomes


def evaluate_foils(model: DualEncoder, images: ImageEmbeds, foils: Sequence[Foil], batch_size: int = 256) -> Evaluation:
    """Evaluates whether each foil's image is more similar to the true caption than to the false one.

    Foils of unreadable images are dropped. Raises UserError if none is left.
    """
    row = {index: number for number, index in enumerate(images.indices)}
    foils = [foil for foil in foils if foil.index in row]
    if not foils:
        raise UserError("There is nothing to evaluate: no image with a false caption could be read.")
    true, false = (
        embed_texts(model, [getattr(foil, side) for foil in foils], batch_size) for side in ("true", "false")
    )
    embeds = images.embeds[[row[foil.index] for foil in foils]]
    margins = ((embeds * true).sum(1) - (embeds * false).sum(1)).double().numpy()  # [item]
    correct = np.where(np.abs(margins) <= TIE, 0.5, margins > 0)
    names = list(dict.fromkeys(foil.kind for foil in foils))
    kinds = np.array([names.index(foil.kind) for foil in foils])
    image_indices = np.array([foil.index for foil in foils])
    hows = np.array([foil.how for foil in foils])
    result = CompositionalityResult(
        overall=metrics.mean_per_class(correct, kinds),
        by_kind={name: metrics.mean(correct[kinds == k], image_indices[kinds == k]) for k, name in enumerate(names)},
        by_how={
            how: metrics.mean_per_class(correct[hows == how], kinds[hows == how])
            for how in dict.fromkeys(hows.tolist())
        },
        correct=correct,
        kinds=kinds,
        images=image_indices,
    )
    texts = [text for foil in foils for text in (foil.true, foil.false)]
    return Evaluation(result, images, texts, true)


@dataclass
class PairsResult:
    """Winoground's scores, as fractions of the examples; a tie counts as wrong, as in the paper."""

    text: Metric  # each image is more similar to its own caption than to the other
    image: Metric  # each caption is more similar to its own image than to the other
    group: Metric  # both

    def to_json(self) -> dict[str, Any]:
        chances = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}  # for four random similarities
        scores = {name: {**metric.to_json(), "chance": chances[name]} for name, metric in vars(self).items()}
        return {"task": "image_caption_selection", **scores}


def evaluate_pairs(model: DualEncoder, images: ImageEmbeds, captions: Callable[[int], str]) -> PairsResult:
    """Computes Winoground's scores on examples of two images each, with indices 2 i and 2 i + 1.

    Examples with an unreadable image are dropped. Raises UserError if none is left.
    """
    row = {index: number for number, index in enumerate(images.indices)}
    firsts = [index for index in row if index % 2 == 0 and index + 1 in row]
    if not firsts:
        raise UserError("There is nothing to evaluate: no pair of images could be read.")
    pairs = [index for first in firsts for index in (first, first + 1)]
    texts = embed_texts(model, [captions(index) for index in pairs])
    embeds = images.embeds[[row[index] for index in pairs]]
    # [example, image, caption]
    cosines = torch.bmm(embeds.view(len(firsts), 2, -1), texts.view(len(firsts), 2, -1).mT)
    matched = cosines.diagonal(dim1=1, dim2=2)  # image i with caption i
    crossed = cosines.flip(2).diagonal(dim1=1, dim2=2)  # image i with the other caption
    text, image = (matched > crossed + TIE).all(1), (matched > crossed.flip(1) + TIE).all(1)
    scores = {"text": text, "image": image, "group": text & image}
    return PairsResult(**{name: metrics.mean(score.double().numpy()) for name, score in scores.items()})
