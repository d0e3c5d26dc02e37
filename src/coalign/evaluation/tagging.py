"""Tagging by a small network on frozen image features, which aims at an embedding of an image's tags (MCT, "Image Tagging on Stock")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import Metric

AT = (5, 10, 15, 20)
HIDDEN, DIM = 2048, 4096
EPOCHS, BATCH_SIZE, LR = 30, 256, 1e-3  # not stated in the paper


@dataclass
class TaggingResult:
    """mIOU@K: the mean over images of the overlap of the K likeliest tags and the true ones, over their union (MCT, Table 5)."""

    miou: dict[int, Metric]
    frequent: dict[int, float]  # the same of the K most frequent tags for every image: what is to be beaten
    num_tags: int
    untagged: int  # test images without any of them, which are left out

    def to_json(self) -> dict[str, Any]:
        named = {f"miou{k}": {**metric.to_json(), "chance": self.frequent[k]} for k, metric in self.miou.items()}
        return {"task": "tagging", "tags": self.num_tags, "untagged": self.untagged, **named}


def vocabulary(tags: Iterable[Sequence[str]], most: int = 18_157) -> list[str]:
    """The most frequent tags that two images have or more, the most frequent first."""
    counts = Counter(tag for own in tags for tag in set(own))
    return [tag for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count > 1][:most]


def pmi_embeddings(ids: Sequence[Sequence[int]], num_tags: int, dim: int = DIM) -> Tensor:
    """float32 [tag, dim or fewer]: U √S of the singular value decomposition of the matrix of positive pointwise mutual information, of
    images with these tags each (Chollet 2016, §2)."""
    import scipy.sparse

    rows = np.repeat(np.arange(len(ids)), [len(own) for own in ids])
    columns = np.concatenate([np.asarray(own, np.int64) for own in ids]) if len(rows) else np.zeros(0, np.int64)
    has = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(ids), num_tags))
    both = (has.T @ has).tocoo()  # images that have both tags
    single = np.asarray(has.sum(0)).ravel()
    values = np.log(both.data * len(ids) / (single[both.row] * single[both.col]))
    pmi = scipy.sparse.coo_matrix((np.maximum(values, 0), (both.row, both.col)), shape=(num_tags, num_tags))
    dim = min(dim, num_tags)
    if num_tags <= DIM:
        left, scale, _ = np.linalg.svd(pmi.toarray())
    else:
        from scipy.sparse.linalg import svds

        left, scale, _ = svds(pmi.tocsr(), k=dim, random_state=0)
        left, scale = left[:, ::-1], scale[::-1]
    return torch.from_numpy((left[:, :dim] * np.sqrt(scale[:dim])).astype(np.float32))


def tagging(
    train: tuple[np.ndarray, Sequence[Sequence[str]]], test: tuple[np.ndarray, Sequence[Sequence[str]]], seed: int = 0
) -> TaggingResult:
    """Features [image, dim] and tags of each, to learn from and to measure on. Tags that are not in the training part's vocabulary do not
    count; images without any that is are left out. UserError where none is left."""
    words = vocabulary(train[1])
    number = {word: i for i, word in enumerate(words)}
    parts = [_tagged(features, tags, number) for features, tags in (train, test)]
    for name, (features, _) in zip(("train", "test"), parts):
        if not len(features):
            raise UserError(
                f"There is nothing to tag: no image of the {name} part has a tag that two training images have."
            )
    (features, ids), (test_features, truth) = parts
    embeddings = pmi_embeddings(ids, len(words))
    network = _train(features, torch.stack([embeddings[list(own)].mean(0) for own in ids]), seed)
    with torch.no_grad():
        aimed = torch.cat([network(rows) for rows in test_features.split(4096)])
        scores = F.normalize(aimed, dim=1) @ F.normalize(embeddings, dim=1).T  # [image, tag]
    most = min(max(AT), len(words))
    likeliest, frequent = scores.topk(most, dim=1).indices.tolist(), list(range(most))
    return TaggingResult(
        miou={k: metrics.mean(_overlaps([own[:k] for own in likeliest], truth), seed=seed) for k in AT},
        frequent={k: float(_overlaps([frequent[:k]] * len(truth), truth).mean()) for k in AT},
        num_tags=len(words),
        untagged=len(test[1]) - len(truth),
    )


def _tagged(
    features: np.ndarray, tags: Sequence[Sequence[str]], number: dict[str, int]
) -> tuple[Tensor, list[list[int]]]:
    ids = [sorted({number[tag] for tag in own if tag in number}) for own in tags]
    rows = [row for row, own in enumerate(ids) if own]
    return torch.from_numpy(features[rows]), [ids[row] for row in rows]


def _train(features: Tensor, targets: Tensor, seed: int) -> nn.Module:
    """Two layers by cosine similarity, on features that are brought to mean 0 and deviation 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(features.shape[1], affine=False, momentum=None)
        norm.running_mean, norm.running_var = features.mean(0), features.var(0, unbiased=False)
        layers = (nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, targets.shape[1]))
        network = nn.Sequential(norm, *layers).eval()
        optimiser = torch.optim.Adam(network.parameters(), lr=LR)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features)).split(BATCH_SIZE):
                loss = 1 - F.cosine_similarity(network(features[rows]), targets[rows]).mean()
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
    return network


def _overlaps(predicted: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]) -> np.ndarray:
    """|predicted ∩ true| / |predicted ∪ true| of each image."""
    return np.array([len({*one} & {*other}) / len({*one} | {*other}) for one, other in zip(predicted, truth)])
