"""Two-way choices: does an image lie nearer to its true caption than to a false one that differs in one thing (SugarCrepe's question)?"""

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
    """Accuracies are fractions; a tie counts one half, so that chance is 1/2."""

    overall: Metric  # the mean of the kinds' accuracies
    by_kind: dict[str, Metric]
    by_how: dict[str, Metric]  # of what was replaced, swapped or added: the mean of the kinds' accuracies
    correct: np.ndarray  # float64 [item]: 1, 0, or 1/2 for a tie
    kinds: np.ndarray  # int64 [item], the position in `by_kind`
    images: np.ndarray  # int64 [item], the image's index: the bootstrap draws an image with all of its items

    def to_json(self) -> dict[str, Any]:
        return {
            "task": "compositionality",
            "accuracy": self.overall.to_json(),
            "by_kind": {kind: metric.to_json() for kind, metric in self.by_kind.items()},
            "by_how": {how: metric.to_json() for how, metric in self.by_how.items()},
            "chance": 0.5,
        }

    def outcomes(self) -> dict[str, np.ndarray]:
        """What the accuracies are means of, item by item; each kind's after its name."""
        found = {"mean_per_kind": self.correct, "classes": self.kinds}
        for number, kind in enumerate(self.by_kind):
            rows = self.kinds == number
            found |= {f"{kind}.accuracy": self.correct[rows], f"{kind}.clusters": self.images[rows]}
        return found


def choose_captions(
    model: DualEncoder, images: ImageEmbeds, foils: Sequence[Foil], batch_size: int = 256
) -> Evaluation:
    """Scores the foils whose images could be read. UserError if there are none."""
    row = {index: number for number, index in enumerate(images.indices)}
    foils = [foil for foil in foils if foil.index in row]
    if not foils:
        raise UserError("There is nothing to choose between: no image with a false caption could be read.")
    true, false = (
        embed_texts(model, [getattr(foil, side) for foil in foils], batch_size) for side in ("true", "false")
    )
    embeds = images.embeds[[row[foil.index] for foil in foils]]
    margins = ((embeds * true).sum(1) - (embeds * false).sum(1)).double().numpy()  # [item]
    correct = np.where(np.abs(margins) <= TIE, 0.5, margins > 0)
    names = list(dict.fromkeys(foil.kind for foil in foils))
    kinds = np.array([names.index(foil.kind) for foil in foils])
    owners = np.array([foil.index for foil in foils])
    hows = np.array([foil.how for foil in foils])
    result = CompositionalityResult(
        overall=metrics.mean_per_class(correct, kinds),
        by_kind={name: metrics.mean(correct[kinds == k], owners[kinds == k]) for k, name in enumerate(names)},
        by_how={
            how: metrics.mean_per_class(correct[hows == how], kinds[hows == how])
            for how in dict.fromkeys(hows.tolist())
        },
        correct=correct,
        kinds=kinds,
        images=owners,
    )
    texts = [text for foil in foils for text in (foil.true, foil.false)]
    return Evaluation(result, images, texts, true)


@dataclass
class PairsResult:
    """Shares of the examples (Winoground's scores): a tie is wrong, as it is there."""

    text: Metric  # each image lies nearer to its own caption than to the other
    image: Metric  # each caption lies nearer to its own image than to the other
    group: Metric  # both

    def to_json(self) -> dict[str, Any]:
        chances = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}  # of four random similarities
        named = {name: {**metric.to_json(), "chance": chances[name]} for name, metric in vars(self).items()}
        return {"task": "image_caption_selection", **named}


def tell_pairs_apart(model: DualEncoder, images: ImageEmbeds, captions: Callable[[int], str]) -> PairsResult:
    """Scores examples of two images, of the indices 2 i and 2 i + 1; those of which an image could not be read are left out. UserError if
    none is left."""
    row = {index: number for number, index in enumerate(images.indices)}
    firsts = [index for index in row if index % 2 == 0 and index + 1 in row]
    if not firsts:
        raise UserError("There is nothing to tell apart: no pair of images could be read.")
    pairs = [index for first in firsts for index in (first, first + 1)]
    texts = embed_texts(model, [captions(index) for index in pairs])
    embeds = images.embeds[[row[index] for index in pairs]]
    # [example, image, caption]
    cosines = torch.bmm(embeds.view(len(firsts), 2, -1), texts.view(len(firsts), 2, -1).mT)
    own = cosines.diagonal(dim1=1, dim2=2)  # of image i and caption i
    crossed = cosines.flip(2).diagonal(dim1=1, dim2=2)  # of image i and the other caption
    text, image = (own > crossed + TIE).all(1), (own > crossed.flip(1) + TIE).all(1)
    scores = {"text": text, "image": image, "group": text & image}
    return PairsResult(**{name: metrics.mean(score.double().numpy()) for name, score in scores.items()})
