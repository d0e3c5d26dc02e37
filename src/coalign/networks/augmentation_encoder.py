"""UniCLIP's augmentation encoder f_A and the image projection heads g_I of its Table 4a, which take f_A's output."""

from __future__ import annotations

from dataclasses import fields
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.types import AugmentationParams

NUM_PARAMS = len(fields(AugmentationParams))  # 11 per view


class AugmentationEncoder(nn.Sequential):
    """f_A: the augmentation parameters of a view [batch, 11] -> its augmentation embedding [batch, dim]."""

    def __init__(self, dim: int = 256) -> None:
        super().__init__(nn.Linear(NUM_PARAMS, dim), nn.GELU(), nn.Linear(dim, dim))
        self.dim = dim


class LinearHead(nn.Module):
    """Linear layer on [x; f_A]: the tower's own projection of x plus a linear map of f_A."""

    def __init__(self, augmentation_dim: int, embed_dim: int, projection: nn.Module) -> None:
        super().__init__()
        self.projection = projection
        self.shift = nn.Linear(augmentation_dim, embed_dim, bias=False) if augmentation_dim else None

    def forward(
        self, x: Float[Tensor, "batch width"], augmentation: Float[Tensor, "batch augmentation_dim"] | None
    ) -> Float[Tensor, "batch embed_dim"]:
        projected = self.projection(x)
        return projected if self.shift is None else projected + self.shift(augmentation)


class MLPHead(nn.Module):
    """`num_layers` linear layers as wide as x, with GELU in between; the first takes [x; f_A]."""

    def __init__(self, width: int, augmentation_dim: int, embed_dim: int, num_layers: int) -> None:
        super().__init__()
        widths = [width + augmentation_dim, *[width] * (num_layers - 1), embed_dim]
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(widths))

    def forward(
        self, x: Float[Tensor, "batch width"], augmentation: Float[Tensor, "batch augmentation_dim"] | None
    ) -> Float[Tensor, "batch embed_dim"]:
        x = self.layers[0](_concat(x, augmentation))
        for layer in self.layers[1:]:
            x = layer(F.gelu(x))
        return x


class AwareBlock(nn.Module):
    """x + W₂ GELU(W₁ LayerNorm[x; f_A]). W₂ is initialized to zero, so the block starts as the identity."""

    def __init__(self, width: int, augmentation_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width + augmentation_dim)
        self.inner = nn.Linear(width + augmentation_dim, width)
        self.outer = nn.Linear(width, width)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(
        self, x: Float[Tensor, "batch width"], augmentation: Float[Tensor, "batch augmentation_dim"] | None
    ) -> Float[Tensor, "batch width"]:
        return x + self.outer(F.gelu(self.inner(self.norm(_concat(x, augmentation)))))


class ResidualHead(nn.Module):
    """Residual blocks that all take f_A, then the tower's own projection. At initialization, it equals that projection."""

    def __init__(self, width: int, augmentation_dim: int, num_blocks: int, projection: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AwareBlock(width, augmentation_dim) for _ in range(num_blocks))
        self.projection = projection

    def forward(
        self, x: Float[Tensor, "batch width"], augmentation: Float[Tensor, "batch augmentation_dim"] | None
    ) -> Float[Tensor, "batch embed_dim"]:
        for block in self.blocks:
            x = block(x, augmentation)
        return self.projection(x)


def build_head(name: str, width: int, embed_dim: int, projection: nn.Module, augmentation_dim: int = 0) -> nn.Module:
    """Builds g_I by name: `linear`, `mlp-N` with N layers, or `residual-N` with N blocks.

    `projection` is the tower's own, width -> embed_dim; an MLP does not use it. With `augmentation_dim` 0, the head is called with None
    instead of f_A.
    """
    kind, _, number = name.partition("-")
    if kind == "linear":
        return LinearHead(augmentation_dim, embed_dim, projection)
    if kind == "mlp":
        return MLPHead(width, augmentation_dim, embed_dim, int(number))
    return ResidualHead(width, augmentation_dim, int(number), projection)


def _concat(x: Tensor, augmentation: Tensor | None) -> Tensor:
    return x if augmentation is None else torch.cat([x, augmentation], dim=1)
