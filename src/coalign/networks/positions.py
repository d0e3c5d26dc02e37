"""Fixed sinusoidal position tables."""

from __future__ import annotations

import torch
from torch import Tensor


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Sines then cosines of `positions` [n] at dim/2 frequencies 10000^(−2k/dim): float64 [n, dim] (Vaswani et al. 2017)."""
    if dim % 2:
        raise ValueError(f"a sinusoidal table needs an even width, not {dim}")
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * frequencies  # [n, dim/2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """The table of a patch grid in reading order: float64 [rows·columns, dim], half for the column, half for the row (MAE, MoCo-v3)."""
    if dim % 4:
        raise ValueError(f"a two-dimensional sinusoidal table needs a width divisible by four, not {dim}")
    column = sincos_1d(torch.arange(columns).repeat(rows), dim // 2)
    row = sincos_1d(torch.arange(rows).repeat_interleave(columns), dim // 2)
    return torch.cat([column, row], dim=1)
