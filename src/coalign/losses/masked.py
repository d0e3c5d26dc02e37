"""Masked-prediction losses, summed per sample: they do not couple samples, so they can be computed on slices of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from coalign.losses.tiled import at_least_float32
from coalign.types import NOT_MASKED


def masked_language_loss(
    tokens: Float[Tensor, "batch token width"],
    labels: Int[Tensor, "batch token"],
    head: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Masked language modeling (Devlin et al. 2018). Returns, per sample, the sum of −log p(original token) over its masked tokens, and
    their number; (0, 0) for a sample without masked tokens.

    `labels` are the original ids of masked tokens, and -100 elsewhere. Only masked tokens pass through `head`: [masked, width] ->
    [masked, vocabulary]. Computed in at least float32.
    """
    masked = labels != NOT_MASKED
    row, position = masked.nonzero(as_tuple=True)  # [masked]
    logits = at_least_float32(head(tokens[row, position]))
    with torch.autocast(logits.device.type, enabled=False):
        losses = F.cross_entropy(logits, labels[row, position], reduction="none")
    return losses.new_zeros(len(labels)).index_add(0, row, losses), masked.sum(1)


def masked_image_loss(
    tokens: Float[Tensor, "batch patch width"],
    masked: Bool[Tensor, "batch patch"],
    patches: Float[Tensor, "batch patch values"],
    head: Callable[[Tensor], Tensor],
) -> tuple[Float[Tensor, " batch"], Int[Tensor, " batch"]]:
    """Masked image modeling (He et al. 2022). Returns, per sample, the sum over its masked patches of the mean squared error of the
    predicted pixels, and the number of masked patches; (0, 0) for a sample without masked patches.

    `patches` are the pixels; the targets are normalized to mean 0 and variance 1 per patch. Only masked patches pass through `head`:
    [masked, width] -> [masked, values]. Computed in at least float32.
    """
    row, position = masked.nonzero(as_tuple=True)  # [masked]
    predictions = at_least_float32(head(tokens[row, position]))
    with torch.autocast(predictions.device.type, enabled=False):
        pixels = patches[row, position].to(predictions.dtype)
        centered = pixels - pixels.mean(-1, keepdim=True)
        variance = centered.square().sum(-1, keepdim=True) / (pixels.shape[-1] - 1)
        losses = (predictions - centered * (variance + 1e-6).rsqrt()).square().mean(-1)
    return losses.new_zeros(len(masked)).index_add(0, row, losses), masked.sum(1)
