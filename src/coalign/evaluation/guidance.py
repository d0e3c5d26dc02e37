"""Text-guided classification, for a model that takes image and text as one input (OneR, "Text-guided Visual Reasoning")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from coalign.embeds import pair_similarities, take
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images, embed_joint, embed_texts
from coalign.evaluation.metrics import measure
from coalign.evaluation.zero_shot import class_scores, embed_classes
from coalign.metric import Metric, Outcome
from coalign.types import DualEncoder, Embeds, JointEncoder

_BATCH_SIZE = 256  # inputs per call
_ROWS = 64  # inputs compared with all prompts at a time


def _result(plain_correct: np.ndarray, guided_correct: np.ndarray, clusters: np.ndarray) -> list[Metric]:
    """Returns the accuracy by the image alone, and by the image with a text, on the same items; their difference is paired."""
    return [
        measure("plain", "Image alone", Outcome(plain_correct, clusters)),
        measure("guided", "Image with a text", Outcome(guided_correct, clusters)),
        measure(
            "difference",
            "Difference, percentage points",
            Outcome(guided_correct - plain_correct, clusters),
            kind="difference",
        ),
    ]


@torch.no_grad()
def bootstrapped_guidance(
    model: DualEncoder,
    encode_joint: JointEncoder,
    batches: Sequence[tuple[Sequence[int], Tensor, Sequence[Any]]],
    labels: Mapping[int, int],
    prompts: Sequence[Sequence[str]],
    top_k: int = 10,
) -> list[Metric]:
    """Reclassifies images jointly with the text of their own top predictions (OneR, Table 3).

    Each of an image's `top_k` predicted classes is written beside the image, as the first of its prompts, and the joint embedding is
    compared with that class; the guided prediction is the best of them. prompts: of each class. The labels serve for evaluation only.
    Raises UserError if no image has a label.
    """
    classes = embed_classes(model, prompts)
    plain, guided, image_indices = [], [], []
    for indices, pixels, _ in batches:
        labeled = [row for row, index in enumerate(indices) if index in labels]
        if not labeled:
            continue
        images = embed_images(model, [([indices[row] for row in labeled], pixels[labeled], [])])
        scores = class_scores(model.similarity, images.embeds, classes)
        top = scores.topk(min(top_k, len(prompts)), dim=1).indices  # [image, candidate]
        texts = [prompts[c][0] for candidates in top.tolist() for c in candidates]
        joint = embed_joint(model, encode_joint, pixels[labeled].repeat_interleave(top.shape[1], 0), texts)
        # each candidate's input with its own class
        own_class = [
            class_scores(model.similarity, take(joint, rows), classes).gather(1, own)
            for rows, own in zip(torch.arange(top.numel()).split(_ROWS), top.view(-1, 1).split(_ROWS))
        ]
        guided_scores = torch.cat(own_class).view_as(top)  # [image, candidate]
        targets = torch.tensor([labels[index] for index in images.indices])
        plain += (top[:, 0] == targets).tolist()
        guided += (top.gather(1, guided_scores.argmax(1, keepdim=True))[:, 0] == targets).tolist()
        image_indices += images.indices
    if not image_indices:
        raise UserError("There is nothing to classify: no image has a label that is one of the classes.")
    return _result(np.array(plain, float), np.array(guided, float), np.array(image_indices))


@dataclass(frozen=True)
class GuidedQuery:
    """A classification of one object in an image: `guide` names the object, `candidates` are the texts to choose from."""

    index: int
    guide: str
    candidates: tuple[str, ...]
    target: int  # position in `candidates`


@torch.no_grad()
def guided_classification(
    model: DualEncoder, encode_joint: JointEncoder, load_image: Callable[[int], Tensor], queries: Sequence[GuidedQuery]
) -> list[Metric]:
    """Chooses among each query's candidates, by the image alone and by the image with the guide beside it.

    `load_image`: index -> uint8 [3, side, side]. Raises UserError if there are no queries.
    """
    if not queries:
        raise UserError("There is nothing to classify: no image has an object that a text identifies uniquely.")
    candidates = embed_texts(model, [candidate for query in queries for candidate in query.candidates])
    counts = [len(query.candidates) for query in queries]
    query_rows = [row for row, count in enumerate(counts) for _ in range(count)]  # of each candidate
    pixels = torch.stack([load_image(query.index) for query in queries])
    indices = [query.index for query in queries]
    chunks = (slice(start, start + _BATCH_SIZE) for start in range(0, len(queries), _BATCH_SIZE))
    image_embeds = embed_images(model, ((indices[rows], pixels[rows], []) for rows in chunks)).embeds
    joint_embeds = embed_joint(model, encode_joint, pixels, [query.guide for query in queries])

    def correct(embeds: Embeds) -> np.ndarray:
        scores = pair_similarities(model.similarity, embeds, candidates, query_rows, range(len(query_rows)))
        predictions = [int(group.argmax()) for group in scores.split(counts)]
        return np.array([float(predicted == query.target) for predicted, query in zip(predictions, queries)])

    return _result(correct(image_embeds), correct(joint_embeds), np.array(indices))
