"""k-nearest-neighbor classification of frozen features, with votes weighted by exp(cosine / τ) (Wu et al. 2018, §3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coalign.evaluation.probes.accuracy import FeatureSplit, accuracy, check_splits
from coalign.metric import Metric

K, TEMPERATURE = 20, 0.07
_CHUNK = 8_000_000  # cosines in memory at a time


def knn(train: FeatureSplit, test: FeatureSplit, num_classes: int, k: int = K, seed: int = 0) -> list[Metric]:
    """Classifies `test` by its k nearest neighbors in `train`; features [item, dim] need not be normalized.

    Raises UserError if a split is empty or `train` has a single class.
    """
    check_splits(train=train, test=test)
    keys = F.normalize(torch.from_numpy(train[0]), dim=1)
    labels = torch.from_numpy(train[1])
    k = min(k, len(labels))
    predicted = []
    for queries in torch.from_numpy(test[0]).split(max(1, _CHUNK // len(keys))):
        cosines, nearest = (F.normalize(queries, dim=1) @ keys.T).topk(k, dim=1)  # [query, k]
        votes = torch.zeros(len(queries), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[nearest], (cosines.double() / TEMPERATURE).exp())
        predicted.append(votes.argmax(1))
    return accuracy("k-NN", torch.cat(predicted).numpy(), test[1], num_classes, seed)
