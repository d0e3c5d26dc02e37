"""Heads on top of towers. Those with batch statistics run in `objective`, on all of a rank's rows at once."""

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
    """Standard deviation of the normalised rows, mean over dimensions, times √dim (SimSiam, §4.1): about 1 where the rows point
    everywhere, 0 where they have collapsed to one direction."""
    x = F.normalize(x.float(), dim=-1)
    return x.std(0, correction=0).mean() * x.shape[1] ** 0.5


class MLP(nn.Module):
    """Linear layers of the given widths, BatchNorm and ReLU after each but the last, and if wanted BatchNorm after the last.

    The statistics are those of the rows of one call on all ranks: views that are passed apart are normalised apart. SLIP's SSL head has
    no `last_norm`, SimSiam's projector has one.
    """

    def __init__(self, widths: Sequence[int], last_norm: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))
        self.norms = nn.ModuleList(GlobalBatchNorm1d(width) for width in (widths[1:] if last_norm else widths[1:-1]))

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


class ModalityBlindMLP(nn.Module):
    """MoCo-v3's projector or predictor, for rows of several kinds ("image", "text", …): linear layers without bias, a normalisation after
    each, without a learned scale after the last, and ReLU between.

    norm: "batch" is one BatchNorm over the rows of all kinds and ranks; "batch_apart" gives each kind its own statistics, which tells the
    kinds apart though all weights are shared; "layer" is LayerNorm.
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

    def forward(self, rows: dict[str, Tensor], gather: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """kind -> [batch, width], equally many of each, to kind -> [batch, last width]."""
        x = torch.cat(list(rows.values()))
        for number, layer in enumerate(self.layers):
            x = self._normalise(layer(x), self.statistics[number], list(rows), gather)
            if number < len(self.scales):
                x = F.relu(x * self.scales[number] + self.shifts[number])
        return dict(zip(rows, x.unflatten(0, (len(rows), -1))))

    def _normalise(
        self, x: Tensor, statistics: nn.Module, kinds: list[str], gather: Callable[[Tensor], Tensor]
    ) -> Tensor:
        assert isinstance(statistics, nn.ModuleDict)
        if self.norm == "layer":
            return F.layer_norm(x, x.shape[-1:])
        if self.norm == "batch":
            return statistics["all"](x, gather)
        return torch.cat(
            [statistics[kind](part, gather) for kind, part in zip(kinds, x.unflatten(0, (len(kinds), -1)))]
        )


class MaskedLanguageHead(nn.Module):
    """Token features after the tower's final norm -> a logit for every token of the vocabulary, by one linear layer, as in the released
    code of DeCLIP. The mask token is no answer: `vocab_size` is the tokenizer's."""

    def __init__(self, width: int, vocab_size: int) -> None:
        super().__init__()
        self.decoder = nn.Linear(width, vocab_size)
        nn.init.normal_(self.decoder.weight, std=0.02)  # BERT's: the loss starts near ln(vocab_size)
        nn.init.zeros_(self.decoder.bias)

    def forward(self, tokens: Float[Tensor, "masked width"]) -> Float[Tensor, "masked vocabulary"]:
        return self.decoder(tokens)
