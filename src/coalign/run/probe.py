"""A linear probe of a model's frozen image features, on samples of any source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from coalign.evaluation.accuracy import Part
from coalign.evaluation.embed import Evaluation, ImageEmbeds
from coalign.evaluation.linear_probe import linear_probe
from coalign.types import Source


@dataclass(frozen=True)
class Labelled:
    """Samples of a source and their classes."""

    source: Source
    of_index: Mapping[int, int]  # sample index -> class

    def among(self, indices: np.ndarray) -> Labelled:
        return Labelled(self.source, {i: self.of_index[i] for i in indices.tolist() if i in self.of_index})

    def fifth(self) -> tuple[Labelled, Labelled]:
        """Four fifths and one, drawn at random."""
        shuffled = np.random.default_rng(0).permutation(sorted(self.of_index))
        chosen, rest = np.split(shuffled, [len(shuffled) // 5])
        return self.among(rest), self.among(chosen)


def probe(
    features: Callable[[Source, np.ndarray], ImageEmbeds],
    train: Labelled,
    val: Labelled | None,
    test: Labelled,
    classnames: Sequence[str],
) -> Evaluation:
    """Learns from `train`, finds the penalty on `val` (None: a fifth of `train`), measures on `test`; `features` embeds a source's samples.
    The evaluation's images are those of `test`, with what could not be read of any part."""
    if val is None:
        train, val = train.fifth()
    found = [labelled_features(features, part) for part in (train, val, test)]
    learnt, chosen_by, asked = (part for part, _ in found)
    result = linear_probe(learnt, chosen_by, asked, len(classnames))
    bad = [entry for _, images in found for entry in images.bad]
    return Evaluation(result, replace(found[-1][1], bad=bad), list(classnames))


def labelled_features(
    features: Callable[[Source, np.ndarray], ImageEmbeds], part: Labelled
) -> tuple[Part, ImageEmbeds]:
    """The features and classes of what could be read, and the images; nothing of an empty part."""
    if not part.of_index:  # which the protocols answer
        images = ImageEmbeds(torch.empty(0, 1), [])
    else:
        images = features(part.source, np.array(sorted(part.of_index)))
    labels = np.array([part.of_index[index] for index in images.indices], dtype=np.int64)
    return (images.embeds.numpy(), labels), images
