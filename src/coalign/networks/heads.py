"""Heads with batch statistics: they run in `objective`, on all of a rank's rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.networks.batch_norm import GlobalBatchNorm1d


@torch.no_grad()
def spread(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Standard deviation of the normalised rows, mean over dimensions, times √dim (SimSiam, §4.1): about 1 where the rows point
    everywhere, 0 where they have collapsed to one direction."""
    x = F.normalize(x.float(), dim=-1)
    return x.std(0, correction=0).mean() * x.shape[1] ** 0.5


class MLP(nn.Module):
    """Linear layers of the given widths, BatchNorm and ReLU after each but the last, and if wanted BatchNorm after the last.

    The statistics are those of the rows of one call on all ranks: views that are passed apart are normalised apart. SLIP's SSL head has
    no `last_norm`; SimSiam's and MoCo-v3's projectors have one, "plain" without a learned scale and shift or "affine" with them.
    """

    def __init__(
        self, widths: Sequence[int], last_norm: Literal["none", "plain", "affine"] = "none", bias: bool = True
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=bias) for pair in pairwise(widths))
        self.norms = nn.ModuleList(GlobalBatchNorm1d(width) for width in widths[1:-1])
        if last_norm != "none":
            self.norms.append(GlobalBatchNorm1d(widths[-1], affine=last_norm == "affine"))

    def forward(
        self, x: Float[Tensor, "batch width"], gather: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch last_width"]:
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number < len(self.norms):
                x = self.norms[number](x, gather)
            if number < last:
                x = F.relu(x)
        return x
