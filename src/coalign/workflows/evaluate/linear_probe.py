"""A linear probe of frozen image features, on samples of any source."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from coalign.data.sources.base import Source
from coalign.evaluation.embed import Evaluation, ImageEmbeds
from coalign.evaluation.probes.accuracy import FeatureSplit
from coalign.evaluation.probes.linear import linear_probe


@dataclass(frozen=True)
class Labeled:
    """Samples of a source and their classes."""

    source: Source
    class_of: Mapping[int, int]  # sample index -> class

    def subset(self, indices: np.ndarray) -> Labeled:
        return Labeled(self.source, {i: self.class_of[i] for i in indices.tolist() if i in self.class_of})

    def train_val_split(self) -> tuple[Labeled, Labeled]:
        """Splits the samples at random into four fifths and one fifth."""
        shuffled = np.random.default_rng(0).permutation(sorted(self.class_of))
        val, train = np.split(shuffled, [len(shuffled) // 5])
        return self.subset(train), self.subset(val)


def probe(
    features: Callable[[Source, np.ndarray], ImageEmbeds],
    train: Labeled,
    val: Labeled | None,
    test: Labeled,
    classnames: Sequence[str],
) -> Evaluation:
    """Trains on `train`, selects the penalty on `val` (None: on a fifth of `train`), and evaluates on `test`.

    `features` embeds samples of a source. The evaluation's images are those of `test`, with the unreadable images of all splits.
    """
    if val is None:
        train, val = train.train_val_split()
    splits = [labeled_features(features, labeled) for labeled in (train, val, test)]
    train_split, val_split, test_split = (split for split, _ in splits)
    result = linear_probe(train_split, val_split, test_split, len(classnames))
    bad = [entry for _, images in splits for entry in images.bad]
    return Evaluation(result, replace(splits[-1][1], bad=bad), list(classnames))


def labeled_features(
    features: Callable[[Source, np.ndarray], ImageEmbeds], labeled: Labeled
) -> tuple[FeatureSplit, ImageEmbeds]:
    """Returns the features and classes of the readable samples, and their images; both are empty if there are no samples."""
    if not labeled.class_of:  # the probes raise the error
        images = ImageEmbeds(torch.empty(0, 1), [])
    else:
        images = features(labeled.source, np.array(sorted(labeled.class_of)))
    labels = np.array([labeled.class_of[index] for index in images.indices], dtype=np.int64)
    return (images.embeds.numpy(), labels), images
