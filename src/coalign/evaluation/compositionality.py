"""Compositionality: choices between a true and a false caption that differ in one fact (SugarCrepe), and Winoground's pairs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from coalign.embeds import pair_similarities
from coalign.errors import UserError
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_texts
from coalign.evaluation.metrics import TIE, measure
from coalign.formatting import foil_kind
from coalign.metric import Metric, Outcome
from coalign.types import DualEncoder, Foil

CHANCE = 1 / 2


@torch.no_grad()
def evaluate_foils(model: DualEncoder, images: ImageEmbeds, foils: Sequence[Foil], batch_size: int = 256) -> Evaluation:
    """Evaluates whether each foil's image is more similar to the true caption than to the false one; a tie counts one half.

    The evaluation's result is a list of metrics.

    Foils of unreadable images are dropped. Raises UserError if none is left.
    """
    row = {index: number for number, index in enumerate(images.indices)}
    foils = [foil for foil in foils if foil.index in row]
    if not foils:
        raise UserError("There is nothing to evaluate: no image with a false caption could be read.")
    true, false = (
        embed_texts(model, [getattr(foil, side) for foil in foils], batch_size) for side in ("true", "false")
    )
    image_rows = [row[foil.index] for foil in foils]
    to_true, to_false = (
        pair_similarities(model.similarity, images.embeds, texts, image_rows, range(len(foils)))
        for texts in (true, false)
    )
    margins = (to_true - to_false).double().numpy()  # [item]
    correct = np.where(np.abs(margins) <= TIE, 0.5, margins > 0)
    found = _accuracies(correct, foils)
    texts = [text for foil in foils for text in (foil.true, foil.false)]
    return Evaluation(found, images, texts)


def _accuracies(correct: np.ndarray, foils: Sequence[Foil]) -> list[Metric]:
    """Returns the accuracy over the kinds, of each kind, and of each edit: the mean over its kinds. correct: float64 [item].

    The bootstrap draws an image with all of its items of a kind.
    """
    names = list(dict.fromkeys(foil.kind for foil in foils))
    kinds, hows = np.array([names.index(foil.kind) for foil in foils]), np.array([foil.how for foil in foils])
    image_indices = np.array([foil.index for foil in foils])
    by_kind = Outcome(correct, kinds, "mean per class")
    found = [measure("mean_per_kind", "Foils: all kinds", by_kind, CHANCE)]
    for number, name in enumerate(names):
        rows = kinds == number
        outcome = Outcome(correct[rows], image_indices[rows])
        found.append(measure(f"{name}.accuracy", f"Foils: {foil_kind(name)}", outcome, CHANCE))
    for how in dict.fromkeys(hows.tolist()):
        rows = hows == how
        outcome = Outcome(correct[rows], kinds[rows], "mean per class")
        found.append(measure(f"{how}.mean_per_kind", f"Foils: {how}, all kinds", outcome, CHANCE))
    return found


# for four random similarities
_PAIR_CHANCE = {"text": 1 / 4, "image": 1 / 4, "group": 1 / 6}


@torch.no_grad()
def evaluate_pairs(model: DualEncoder, images: ImageEmbeds, captions: Callable[[int], str]) -> list[Metric]:
    """Returns Winoground's scores, as fractions of the examples; a tie counts as wrong, as in the paper.

    text: each image is more similar to its own caption than to the other. image: each caption is more similar to its own image than to
    the other. group: both. Examples of two images each, with indices 2 i and 2 i + 1.

    Examples with an unreadable image are dropped. Raises UserError if none is left.
    """
    row = {index: number for number, index in enumerate(images.indices)}
    firsts = [index for index in row if index % 2 == 0 and index + 1 in row]
    if not firsts:
        raise UserError("There is nothing to evaluate: no pair of images could be read.")
    pairs = [index for first in firsts for index in (first, first + 1)]
    texts = embed_texts(model, [captions(index) for index in pairs])
    image_rows = [row[index] for index in pairs]
    # [example, image]: each image with its own caption, and with the other
    matched, crossed = (
        pair_similarities(model.similarity, images.embeds, texts, image_rows, text_rows).view(-1, 2)
        for text_rows in (range(len(pairs)), [i ^ 1 for i in range(len(pairs))])
    )
    text, image = (matched > crossed + TIE).all(1), (matched > crossed.flip(1) + TIE).all(1)
    scores = {"text": text, "image": image, "group": text & image}
    return [
        measure(name, f"Winoground {name} score", Outcome(score.double().numpy()), _PAIR_CHANCE[name])
        for name, score in scores.items()
    ]
