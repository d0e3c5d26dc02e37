"""Text-guided classification, for a model that takes image and text as one input (OneR, "Text-guided Visual Reasoning")."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.evaluation.metrics import Metric
from coalign.evaluation.zero_shot import class_weights
from coalign.types import DualEncoder, JointEncoder

_BATCH_SIZE = 256  # inputs per call


@dataclass
class GuidanceResult:
    """Accuracies are fractions of the same items, so their difference is paired."""

    plain: Metric  # of the image alone
    guided: Metric  # of the image with a text
    difference: Metric
    plain_correct: np.ndarray  # float64 [item]
    guided_correct: np.ndarray  # float64 [item]

    def to_json(self) -> dict[str, Any]:
        named = {name: value.to_json() for name, value in vars(self).items() if isinstance(value, Metric)}
        return {"task": "guidance", "items": len(self.plain_correct), **named}


def _result(plain_correct: np.ndarray, guided_correct: np.ndarray, clusters: np.ndarray) -> GuidanceResult:
    plain, guided, difference = (
        metrics.mean(values, clusters) for values in (plain_correct, guided_correct, guided_correct - plain_correct)
    )
    return GuidanceResult(plain, guided, difference, plain_correct, guided_correct)


@torch.no_grad()
def _embed_joint(encode_joint: JointEncoder, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    parts = [
        encode_joint(pixels[start : start + _BATCH_SIZE], texts[start : start + _BATCH_SIZE]).float().cpu()
        for start in range(0, len(texts), _BATCH_SIZE)
    ]
    return F.normalize(torch.cat(parts), dim=-1)


def bootstrapped_guidance(
    model: DualEncoder,
    encode_joint: JointEncoder,
    batches: Sequence[tuple[Sequence[int], Tensor, Sequence[Any]]],
    labels: Mapping[int, int],
    classnames: Sequence[str],
    templates: Sequence[str],
    top_k: int = 10,
) -> GuidanceResult:
    """Reclassifies images jointly with the text of their own top predictions (OneR, Table 3).

    Each of an image's `top_k` predicted classes is written beside the image, and the joint embedding is compared with that class; the
    guided prediction is the best of them. The labels serve for evaluation only. Raises UserError if no image has a label.
    """
    weights = class_weights(model, classnames, templates)
    plain, guided, image_indices = [], [], []
    for indices, pixels, _ in batches:
        labeled = [row for row, index in enumerate(indices) if index in labels]
        if not labeled:
            continue
        images = embed_images(model, [([indices[row] for row in labeled], pixels[labeled], [])])
        top = (images.embeds @ weights.T).topk(min(top_k, len(classnames)), dim=1).indices  # [image, candidate]
        texts = [templates[0].replace("{}", classnames[c]) for candidates in top.tolist() for c in candidates]
        joint = _embed_joint(encode_joint, pixels[labeled].repeat_interleave(top.shape[1], 0), texts)
        guided_scores = (joint.view(*top.shape, -1) * weights[top]).sum(-1)  # [image, candidate]
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


def guided_classification(
    model: DualEncoder, encode_joint: JointEncoder, load_image: Callable[[int], Tensor], queries: Sequence[GuidedQuery]
) -> GuidanceResult:
    """Chooses among each query's candidates, by the image alone and by the image with the guide beside it.

    `load_image`: index -> uint8 [3, side, side]. Raises UserError if there are no queries.
    """
    if not queries:
        raise UserError("There is nothing to classify: no image has an object that a text identifies uniquely.")
    candidates = embed_texts(model, [candidate for query in queries for candidate in query.candidates])
    groups = candidates.split([len(query.candidates) for query in queries])
    pixels = torch.stack([load_image(query.index) for query in queries])
    indices = [query.index for query in queries]
    chunks = (slice(start, start + _BATCH_SIZE) for start in range(0, len(queries), _BATCH_SIZE))
    image_embeds = embed_images(model, ((indices[rows], pixels[rows], []) for rows in chunks)).embeds
    joint_embeds = _embed_joint(encode_joint, pixels, [query.guide for query in queries])

    def correct(embeds: Tensor) -> np.ndarray:
        predictions = [int((group @ embed).argmax()) for group, embed in zip(groups, embeds)]
        return np.array([float(predicted == query.target) for predicted, query in zip(predictions, queries)])

    return _result(correct(image_embeds), correct(joint_embeds), np.array(indices))
