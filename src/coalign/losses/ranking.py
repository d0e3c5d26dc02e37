"""Margin losses that rank a query's own key above others, as sums over the others for each row."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coalign.losses.tiled import at_least_float32, by_rows


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
    normalised by the caller; computed in at least float32, and without the matrix of all hinges in memory.
    """

    def of_rows(queries: Tensor, keys: Tensor, *ignored: Tensor) -> Tensor:
        own = (queries * keys).sum(1, keepdim=True)  # [row, 1]
        hinges = (queries @ others.T).add_(margin - own)  # [row, others]; in place, as it is large
        for mask in ignored:
            hinges = hinges.masked_fill_(mask, -torch.inf)
        return hinges.relu_().sum(1)

    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, others = (at_least_float32(x) for x in (queries, keys, others))
        return by_rows(of_rows, queries, keys, *([] if ignored is None else [ignored]), columns=len(others))
