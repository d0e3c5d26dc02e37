"""Losses on what was masked, for each sample apart: nothing couples samples here, so the sums can be taken slice by slice."""

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
    """Masked language modelling (Devlin et al. 2018): of each sample the sum of −log p(original token) over its masked tokens, and their
    number.

    `labels` hold the original id where a token was masked, else -100. Only masked tokens go through `head` [masked, width] ->
    [masked, vocabulary]. A sample without masked tokens has (0, 0). Computed in at least float32.
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
    """Masked image modelling (He et al. 2022): of each sample the sum over its masked patches of the mean squared error of their pixels,
    and the number of masked patches.

    `patches` hold the pixels; each patch is normalised to mean 0 and variance 1 before it is predicted. Only masked patches go through
    `head` [masked, width] -> [masked, values]. A sample without masked patches has (0, 0). Computed in at least float32.
    """
    row, position = masked.nonzero(as_tuple=True)  # [masked]
    predicted = at_least_float32(head(tokens[row, position]))
    with torch.autocast(predicted.device.type, enabled=False):
        pixels = patches[row, position].to(predicted.dtype)
        centred = pixels - pixels.mean(-1, keepdim=True)
        variance = centred.square().sum(-1, keepdim=True) / (pixels.shape[-1] - 1)
        losses = (predicted - centred * (variance + 1e-6).rsqrt()).square().mean(-1)
    return losses.new_zeros(len(masked)).index_add(0, row, losses), masked.sum(1)
