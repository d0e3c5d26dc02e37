"""Margin losses that rank a query's own key above other keys, summed per row."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from coalign.losses.tiled import at_least_float32, over_row_chunks


def margin_ranking(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "batch dim"],
    others: Float[Tensor, "others dim"],
    margin: float,
    ignored: Bool[Tensor, "batch others"] | None = None,
) -> Float[Tensor, " batch"]:
    """Returns Σ_j [α − q_i·k_i + q_i·k_j]₊ for each row i.

    With the queue of the other modality as `others`, these are MCT's J_ic and J_ci (Eqs. 11 and 14). In both directions over a batch, with
    the diagonal ignored, it is the sum of hinges of VSE++ (Faghri et al. 2018, Eq. 5). `ignored` marks others to omit; sums are per row
    because rows may have different numbers of others. Inputs must be normalized. Computed in at least float32, without materializing the
    matrix of hinges.
    """

    def row_sums(queries: Tensor, keys: Tensor, *ignored: Tensor) -> Tensor:
        positive = (queries * keys).sum(1, keepdim=True)  # [row, 1]
        hinges = (queries @ others.T).add_(margin - positive)  # [row, others]; in place, as it is large
        for mask in ignored:
            hinges = hinges.masked_fill_(mask, -torch.inf)
        return hinges.relu_().sum(1)

    with torch.autocast(queries.device.type, enabled=False):
        queries, keys, others = (at_least_float32(x) for x in (queries, keys, others))
        return over_row_chunks(row_sums, queries, keys, *([] if ignored is None else [ignored]), columns=len(others))
