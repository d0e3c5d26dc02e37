"""Margin losses that rank a query's own key above others, as sums over the others for each row."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coalign.losses.contrastive import at_least_float32


def margin_ranking(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    others: Float[Tensor, "others dim"],
    margin: float,
    ignored: Bool[Tensor, "batch others"] | None = None,
) -> Float[Tensor, " batch"]:
    """Σ_j [α − q_i·k_i + q_i·k_j]₊ for each row i: MCT's J_ic and J_ci over the queue of the other modality (Eqs. 11 and 14), and in both
    directions over a batch, with the diagonal ignored, the sum of hinges of VSE++ (Faghri et al. 2018, Eq. 5).

    Where `ignored` is true, the other is left out. A row of each, not their sum: rows may have different numbers of others. Inputs are
    normalised by the caller; computed in at least float32.
    """
    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, others = (at_least_float32(x) for x in (queries, keys, others))
        own = (queries * keys).sum(1, keepdim=True)  # [batch, 1]
        hinges = (queries @ others.T).add_(margin - own)  # [batch, others]; in place, as it is large
        if ignored is not None:
            hinges = hinges.masked_fill_(ignored, -torch.inf)
        return hinges.relu_().sum(1)
