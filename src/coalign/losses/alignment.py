"""Losses that align two views of a sample without negatives, as sums over the local rows."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from coalign.losses.tiled import at_least_float32


def negative_cosine(predictions: Float[Tensor, "batch dim"], targets: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Returns Σ_i −cos(p_i, sg(z_i)), without gradient to the targets (SimSiam: Chen and He 2021, Eq. 1). Computed in at least float32."""
    return -F.cosine_similarity(at_least_float32(predictions), at_least_float32(targets.detach()), dim=-1).sum()


def simsiam_loss(
    p1: Float[Tensor, "batch dim"],
    z1: Float[Tensor, "batch dim"],
    p2: Float[Tensor, "batch dim"],
    z2: Float[Tensor, "batch dim"],
) -> Float[Tensor, ""]:
    """Returns Σ_i ½[D(p1, sg z2) + D(p2, sg z1)] with D the negative cosine, for the predictor outputs p and projector outputs z of two
    views (SimSiam, Eqs. 2 and 4)."""
    return (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
