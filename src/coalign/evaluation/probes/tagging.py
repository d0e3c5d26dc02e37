"""Tagging: a small network on frozen image features predicts the mean embedding of an image's tags (MCT, "Image Tagging on Stock")."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.evaluation.metrics import measure
from coalign.metric import Metric, Outcome

TOP_K = (5, 10, 15, 20)
HIDDEN, DIM = 2048, 4096
EPOCHS, BATCH_SIZE, LR = 30, 256, 1e-3  # not stated in the paper


@dataclass
class TaggingResult:
    """mIOU@K: mean over images of the intersection over union of the top K predicted tags and the true tags (MCT, Table 5).

    Chance is a baseline: the K most frequent tags for every image.
    """

    metrics: list[Metric]
    num_tags: int
    untagged: int  # test images without any tag of the vocabulary, which are dropped


def vocabulary(tags: Iterable[Sequence[str]], max_size: int = 18_157) -> list[str]:
    """Returns the tags of at least two images, the most frequent first, at most `max_size`."""
    counts = Counter(tag for image_tags in tags for tag in set(image_tags))
    return [tag for tag, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])) if count > 1][:max_size]


def pmi_embeddings(ids: Sequence[Sequence[int]], num_tags: int, dim: int = DIM) -> Tensor:
    """Returns tag embeddings, float32 [tag, dim or fewer], from the images' tag ids (Chollet 2016, §2).

    They are U √S of the singular value decomposition of the positive pointwise mutual information matrix.
    """
    import scipy.sparse

    rows = np.repeat(np.arange(len(ids)), [len(image_ids) for image_ids in ids])
    columns = np.concatenate([np.asarray(i, np.int64) for i in ids]) if len(rows) else np.zeros(0, np.int64)
    has_tag = scipy.sparse.csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(ids), num_tags))
    joint = (has_tag.T @ has_tag).tocoo()  # [tag, tag], number of images with both tags
    single = np.asarray(has_tag.sum(0)).ravel()
    values = np.log(joint.data * len(ids) / (single[joint.row] * single[joint.col]))
    pmi = scipy.sparse.coo_matrix((np.maximum(values, 0), (joint.row, joint.col)), shape=(num_tags, num_tags))
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
    """Trains on the features [image, dim] and tags of `train`, and evaluates on `test`.

    The vocabulary comes from `train`. Images without any of its tags are dropped. Raises UserError if a split has none left.
    """
    tags = vocabulary(train[1])
    tag_ids = {tag: i for i, tag in enumerate(tags)}
    splits = [_with_tag_ids(features, image_tags, tag_ids) for features, image_tags in (train, test)]
    for name, (features, _) in zip(("train", "test"), splits):
        if not len(features):
            raise UserError(
                f"There is nothing to tag: no image of the {name} split has a tag that occurs on two training images."
            )
    (features, ids), (test_features, test_ids) = splits
    embeddings = pmi_embeddings(ids, len(tags))
    network = _train(features, torch.stack([embeddings[list(image_ids)].mean(0) for image_ids in ids]), seed)
    with torch.no_grad():
        predicted = torch.cat([network(rows) for rows in test_features.split(4096)])
        scores = F.normalize(predicted, dim=1) @ F.normalize(embeddings, dim=1).T  # [image, tag]
    max_k = min(max(TOP_K), len(tags))
    top, frequent = scores.topk(max_k, dim=1).indices.tolist(), list(range(max_k))
    metrics = []
    for k in TOP_K:
        baseline = float(_iou([frequent[:k]] * len(test_ids), test_ids).mean())
        outcome = Outcome(_iou([row[:k] for row in top], test_ids))
        metrics.append(measure(f"miou{k}", f"mIOU@{k}", outcome, baseline, seed=seed))
    return TaggingResult(metrics, num_tags=len(tags), untagged=len(test[1]) - len(test_ids))


def _with_tag_ids(
    features: np.ndarray, tags: Sequence[Sequence[str]], tag_ids: dict[str, int]
) -> tuple[Tensor, list[list[int]]]:
    """Returns the features and tag ids of the images that have any."""
    ids = [sorted({tag_ids[tag] for tag in image_tags if tag in tag_ids}) for image_tags in tags]
    rows = [row for row, image_ids in enumerate(ids) if image_ids]
    return torch.from_numpy(features[rows]), [ids[row] for row in rows]


def _train(features: Tensor, targets: Tensor, seed: int) -> nn.Module:
    """Trains a two-layer network on standardized features to maximize the cosine similarity with the targets."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = nn.BatchNorm1d(features.shape[1], affine=False, momentum=None)
        norm.running_mean, norm.running_var = features.mean(0), features.var(0, unbiased=False)
        layers = (nn.Linear(features.shape[1], HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, targets.shape[1]))
        network = nn.Sequential(norm, *layers).eval()
        optimizer = torch.optim.Adam(network.parameters(), lr=LR)
        for _ in range(EPOCHS):
            for rows in torch.randperm(len(features)).split(BATCH_SIZE):
                loss = 1 - F.cosine_similarity(network(features[rows]), targets[rows]).mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return network


def _iou(predicted: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns |predicted ∩ target| / |predicted ∪ target| of each image."""
    return np.array([len({*p} & {*t}) / len({*p} | {*t}) for p, t in zip(predicted, targets)])
