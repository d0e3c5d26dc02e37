"""Nearest-neighbour classification of frozen features: the votes of the k nearest training images, weighted by exp(cosine / τ) (Wu et al.
2018, §3.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from coalign.evaluation.accuracy import AccuracyResult, Part, accuracy, check_parts

K, TEMPERATURE = 20, 0.07
_CHUNK = 8_000_000  # cosines held at a time


def knn(train: Part, test: Part, num_classes: int, k: int = K, seed: int = 0) -> AccuracyResult:
    """Features [item, dim] need not be normalised. UserError where a part is empty or there is one class alone."""
    check_parts(train=train, test=test)
    bank = F.normalize(torch.from_numpy(train[0]), dim=1)
    labels = torch.from_numpy(train[1])
    k = min(k, len(labels))
    predicted = []
    for queries in torch.from_numpy(test[0]).split(max(1, _CHUNK // len(bank))):
        cosines, nearest = (F.normalize(queries, dim=1) @ bank.T).topk(k, dim=1)  # [query, k]
        votes = torch.zeros(len(queries), num_classes, dtype=torch.float64)
        votes.scatter_add_(1, labels[nearest], (cosines.double() / TEMPERATURE).exp())
        predicted.append(votes.argmax(1))
    return accuracy("knn", torch.cat(predicted).numpy(), test[1], num_classes, seed)
