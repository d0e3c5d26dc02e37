"""Heads on top of towers. Heads with batch statistics run in `objective`, on all local rows at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.networks.batch_norm import GlobalBatchNorm1d

HeadNorm = Literal["batch", "batch_apart", "layer"]


@torch.no_grad()
def spread(x: Float[Tensor, "batch dim"]) -> Float[Tensor, ""]:
    """Returns the standard deviation of the normalized rows, averaged over dimensions, times √dim (SimSiam, §4.1): about 1 if their
    directions are evenly distributed, 0 if they have collapsed to one direction."""
    x = F.normalize(x.float(), dim=-1)
    return x.std(0, correction=0).mean() * x.shape[1] ** 0.5


class MLP(nn.Module):
    """Linear layers of the given widths with BatchNorm and ReLU after each but the last, and with `last_norm` BatchNorm after the last.

    Batch statistics cover the rows of one call on all ranks, so views passed in separate calls are normalized separately. SimSiam's
    projector uses `last_norm`, SLIP's SSL head does not.
    """

    def __init__(self, widths: Sequence[int], last_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.norms = nn.ModuleList(GlobalBatchNorm1d(width) for width in (widths[1:] if last_norm else widths[1:-1]))

    def forward(
        self, x: Float[Tensor, "batch width"], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "batch last_width"]:
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index < len(self.norms):
                x = self.norms[index](x, sum_over_ranks)
            if index < last:
                x = F.relu(x)
        return x


class GLU(nn.Module):
    """SAIL's alignment layer, W₃(ReLU6(W₁x) ⊙ W₂x), with biases (Zhang et al. 2024, released code).

    The hidden layer is twice as wide as x, as in the first released version. Later ones have up to eight times.
    """

    def __init__(self, width: int, embed_dim: int) -> None:
        super().__init__()
        self.gate, self.value = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)
        self.out = nn.Linear(2 * width, embed_dim)

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch embed_dim"]:
        return self.out(F.relu6(self.gate(x)) * self.value(x))


class ModalityBlindMLP(nn.Module):
    """MoCo-v3's projector or predictor for several kinds of rows ("image", "text", …): linear layers without bias, a normalization after
    each (the last one without learned scale), and ReLU in between.

    norm: "batch" is one BatchNorm over the rows of all kinds and ranks. "batch_apart" has separate statistics per kind, so that kinds are
    treated differently although they share all weights. "layer" is LayerNorm.
    """

    def __init__(self, widths: Sequence[int], kinds: Sequence[str], norm: HeadNorm) -> None:
        super().__init__()
        self.norm = norm
        self.layers = nn.ModuleList(nn.Linear(*pair, bias=False) for pair in pairwise(widths))
        groups = {"batch": ["all"], "batch_apart": kinds, "layer": []}[norm]
        self.statistics = nn.ModuleList(
            nn.ModuleDict({group: GlobalBatchNorm1d(width, affine=False) for group in groups}) for width in widths[1:]
        )
        self.scales = nn.ParameterList(nn.Parameter(torch.ones(width)) for width in widths[1:-1])
        self.shifts = nn.ParameterList(nn.Parameter(torch.zeros(width)) for width in widths[1:-1])

    def forward(self, rows: dict[str, Tensor], sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Maps rows [batch, width] by kind to outputs [batch, last_width] by kind. All kinds must have the same number of rows."""
        x = torch.cat(list(rows.values()))
        for index, layer in enumerate(self.layers):
            x = self._normalize(layer(x), self.statistics[index], list(rows), sum_over_ranks)
            if index < len(self.scales):
                x = F.relu(x * self.scales[index] + self.shifts[index])
        return dict(zip(rows, x.unflatten(0, (len(rows), -1))))

    def _normalize(
        self, x: Tensor, statistics: nn.Module, kinds: list[str], sum_over_ranks: Callable[[Tensor], Tensor]
    ) -> Tensor:
        assert isinstance(statistics, nn.ModuleDict)
        if self.norm == "layer":
            return F.layer_norm(x, x.shape[-1:])
        if self.norm == "batch":
            return statistics["all"](x, sum_over_ranks)
        return torch.cat(
            [statistics[kind](part, sum_over_ranks) for kind, part in zip(kinds, x.unflatten(0, (len(kinds), -1)))]
        )


class MaskedLanguageHead(nn.Module):
    """Linear layer from token features after the tower's final norm to vocabulary logits, as in DeCLIP's released code. `vocab_size` is the
    tokenizer's and excludes the mask token, which is never a target."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, vocab_size)
        nn.init.normal_(self.decoder.weight, std=0.02)  # as in BERT; the initial loss is near ln(vocab_size)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Float[Tensor, "masked width"]) -> Float[Tensor, "masked vocabulary"]:
        return self.decoder(tokens)
