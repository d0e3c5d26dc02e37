"""What a text beside the image does for a model that takes both as one input (OneR, "Text-guided Visual Reasoning")."""

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

_ROWS = 256  # inputs a call


@dataclass
class GuidanceResult:
    """Accuracies are fractions of the same items, so that their differences are paired."""

    plain: Metric  # by the image alone
    guided: Metric  # by the image with a text
    difference: Metric
    plain_correct: np.ndarray  # float64 [item]
    guided_correct: np.ndarray  # float64 [item]

    def to_json(self) -> dict[str, Any]:
        named = {name: value.to_json() for name, value in vars(self).items() if isinstance(value, Metric)}
        return {"task": "guidance", "items": len(self.plain_correct), **named}


def _result(plain: np.ndarray, guided: np.ndarray, clusters: np.ndarray) -> GuidanceResult:
    one, other, difference = (metrics.mean(values, clusters) for values in (plain, guided, guided - plain))
    return GuidanceResult(one, other, difference, plain, guided)


@torch.no_grad()
def _embed_joint(encode_joint: JointEncoder, pixels: Tensor, texts: Sequence[str]) -> Tensor:
    parts = [
        encode_joint(pixels[start : start + _ROWS], texts[start : start + _ROWS]).float().cpu()
        for start in range(0, len(texts), _ROWS)
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
    """OneR's Table 3: an image's `top_k` likeliest classes are each put beside the image, and that input is compared with the class once
    more; the likeliest then is the guided answer. No label is shown to the model. Batches as for `classify`."""
    weights = class_weights(model, classnames, templates)
    plain, guided, rows = [], [], []
    for indices, pixels, _ in batches:
        kept = [row for row, index in enumerate(indices) if index in labels]
        if not kept:
            continue
        images = embed_images(model, [([indices[row] for row in kept], pixels[kept], [])])
        top = (images.embeds @ weights.T).topk(min(top_k, len(classnames)), dim=1).indices  # [image, candidate]
        texts = [templates[0].replace("{}", classnames[c]) for row in top.tolist() for c in row]
        joint = _embed_joint(encode_joint, pixels[kept].repeat_interleave(top.shape[1], 0), texts)
        again = (joint.view(*top.shape, -1) * weights[top]).sum(-1)  # [image, candidate]
        truth = torch.tensor([labels[index] for index in images.indices])
        plain += (top[:, 0] == truth).tolist()
        guided += (top.gather(1, again.argmax(1, keepdim=True))[:, 0] == truth).tolist()
        rows += images.indices
    if not rows:
        raise UserError("There is nothing to classify: no image has one of the classes as its label.")
    return _result(np.array(plain, float), np.array(guided, float), np.array(rows))


@dataclass(frozen=True)
class GuidedQuery:
    """What is to be said of one thing in an image: `guide` names the thing, `answers` are the texts to choose from."""

    index: int
    guide: str
    answers: tuple[str, ...]
    right: int  # position in `answers`


def guided_answers(
    model: DualEncoder, encode_joint: JointEncoder, image_of: Callable[[int], Tensor], queries: Sequence[GuidedQuery]
) -> GuidanceResult:
    """Text-guided classification: the answer nearest to the image alone, and to the image with the guide beside it. `image_of`: index ->
    uint8 [3, side, side]."""
    if not queries:
        raise UserError("There is nothing to ask: no image shows a thing that a text alone can name.")
    answers = embed_texts(model, [answer for query in queries for answer in query.answers])
    groups = answers.split([len(query.answers) for query in queries])
    pixels = torch.stack([image_of(query.index) for query in queries])
    indices = [query.index for query in queries]
    chunks = (slice(start, start + _ROWS) for start in range(0, len(queries), _ROWS))
    alone = embed_images(model, ((indices[rows], pixels[rows], []) for rows in chunks)).embeds
    joint = _embed_joint(encode_joint, pixels, [query.guide for query in queries])

    def correct(embeds: Tensor) -> np.ndarray:
        chosen = [int((group @ embed).argmax()) for group, embed in zip(groups, embeds)]
        return np.array([float(choice == query.right) for choice, query in zip(chosen, queries)])

    return _result(correct(alone), correct(joint), np.array(indices))
