"""Contrastive losses, as sums over this rank's rows: the caller divides by the number of rows of all ranks."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F


def info_nce(
    queries: Float[Tensor, "batch dim"],
    keys: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    logit_scale: Float[Tensor, 1] | float,
    ignored: Bool[Tensor, "batch global_batch"] | None = None,
) -> Float[Tensor, ""]:
    """InfoNCE: Σ_i −log( e^{s·q_i·k_p(i)} / Σ_j e^{s·q_i·k_j} ), the cross-entropy of CLIP (Radford et al. 2021, Fig. 3).

    `positives` holds the column of each row's positive, `logit_scale` multiplies (1/τ). Where `ignored` is true the column is left out of
    the row's denominator; a row's own positive must not be ignored. Inputs are normalised by the caller; computed in at least float32.
    """
    with torch.autocast(queries.device.type, enabled=False):  # which would compute the product in half precision
        logits = at_least_float32(queries) @ at_least_float32(keys).T * logit_scale  # [batch, global_batch]
        if ignored is not None:
            logits = logits.masked_fill(ignored, -torch.inf)
        return F.cross_entropy(logits, positives, reduction="sum")


def nt_xent(
    first: Float[Tensor, "batch dim"],
    second: Float[Tensor, "batch dim"],
    gathered_first: Float[Tensor, "global_batch dim"],
    gathered_second: Float[Tensor, "global_batch dim"],
    positives: Int[Tensor, " batch"],
    temperature: float,
) -> Float[Tensor, ""]:
    """NT-Xent between two views (Chen et al. 2020, Eq. 1), summed over both views of own rows: each picks its sample's other view among
    both views of all samples, itself left out. `positives` holds the global position of each row. Inputs are normalised by the caller;
    computed in at least float32.
    """
    with torch.autocast(first.device.type, enabled=False):
        views = [at_least_float32(x) for x in (first, second)]
        gathered = [at_least_float32(x) for x in (gathered_first, gathered_second)]
        total = views[0].new_zeros(())
        for own, other in ((0, 1), (1, 0)):
            across = views[own] @ gathered[other].T / temperature  # [batch, global_batch]
            within = views[own] @ gathered[own].T / temperature
            within = within.scatter(1, positives[:, None], -torch.inf)  # itself
            total = total + F.cross_entropy(torch.cat([across, within], dim=1), positives, reduction="sum")
        return total


def same_caption(
    caption_ids: Int[Tensor, " batch"], gathered_ids: Int[Tensor, " global_batch"], positives: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch global_batch"]:
    """True where another pair of the batch carries the row's very caption, which therefore is no negative. The own column stays false."""
    same = caption_ids[:, None] == gathered_ids[None, :]
    same[torch.arange(len(positives), device=same.device), positives] = False
    return same


def at_least_float32(tensor: Tensor) -> Tensor:
    """bfloat16 and float16 go to float32 (at τ = 0.01 their rounding is larger than the loss); float32 and float64 stay."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor
