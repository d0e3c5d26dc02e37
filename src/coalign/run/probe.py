"""A linear probe of a model's frozen image features, on samples of any source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from coalign.data.evaluation_views import image_batches
from coalign.evaluation.embed import Evaluation, ImageEmbeds, image_features
from coalign.evaluation.linear_probe import Part, linear_probe
from coalign.types import DualEncoder, Source


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
    model: DualEncoder,
    train: Labelled,
    val: Labelled | None,
    test: Labelled,
    classnames: Sequence[str],
    workers: int = 0,
) -> Evaluation:
    """Learns from `train`, finds the penalty on `val` (None: a fifth of `train`), measures on `test`. The evaluation's images are those of
    `test`, with what could not be read of any part."""
    if val is None:
        train, val = train.fifth()

    def features(part: Labelled) -> ImageEmbeds:
        if not part.of_index:  # which the probe answers
            return ImageEmbeds(torch.empty(0, 1), [])
        batches = image_batches(part.source, np.array(sorted(part.of_index)), model.image_size, workers=workers)
        return image_features(model, batches)

    def labelled(part: Labelled, images: ImageEmbeds) -> Part:
        return images.embeds.numpy(), np.array([part.of_index[index] for index in images.indices], dtype=np.int64)

    found = [features(part) for part in (train, val, test)]
    learnt, chosen_by, asked = (labelled(part, images) for part, images in zip((train, val, test), found))
    result = linear_probe(learnt, chosen_by, asked, len(classnames))
    bad = [entry for images in found for entry in images.bad]
    return Evaluation(result, replace(found[-1], bad=bad), list(classnames))
