"""Position tables: fixed sinusoids, and interpolation of learned tables."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def sincos_1d(positions: Tensor, dim: int) -> Tensor:
    """Returns sines, then cosines of `positions` [n] at the dim/2 frequencies 10000^(−2k/dim): float64 [n, dim] (Vaswani et al. 2017).
    Raises ValueError for an odd `dim`."""
    if dim % 2:
        raise ValueError(f"dim is {dim}, but must be even for a sinusoidal table.")
    frequencies = 10000.0 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim / 2))
    angles = positions.double()[:, None] * frequencies  # [n, dim/2]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(rows: int, columns: int, dim: int) -> Tensor:
    """Returns the table of a patch grid in row-major order: float64 [rows·columns, dim], half for the column, half for the row (MAE,
    MoCo-v3). Raises ValueError if `dim` is not a multiple of 4."""
    if dim % 4:
        raise ValueError(f"dim is {dim}, but must be a multiple of 4 for a two-dimensional sinusoidal table.")
    column = sincos_1d(torch.arange(columns).repeat(rows), dim // 2)
    row = sincos_1d(torch.arange(rows).repeat_interleave(columns), dim // 2)
    return torch.cat([column, row], dim=1)


def stretch_positions(table: Tensor, length: int) -> Tensor:
    """Returns the learned table of a text encoder [old, dim] for `length` positions: its first rows, or, if it has fewer, the first quarter
    unchanged and the others interpolated linearly. The first positions are trained best, as most texts are short; of CLIP's 77, Long-CLIP
    keeps 20 as well (Zhang et al. 2024, §3.2)."""
    old = len(table)
    if length <= old:
        return table[:length].clone()
    kept = num_kept(old)
    rest = F.interpolate(table[kept:].T[None].float(), size=length - kept, mode="linear", align_corners=True)
    return torch.cat([table[:kept], rest[0].T.to(table.dtype)])


def num_kept(length: int) -> int:
    """Returns how many of `length` positions `stretch_positions` leaves unchanged."""
    return math.ceil(length / 4)


def resize_positions(table: Tensor, length: int) -> Tensor:
    """Interpolates the learned table of a class token and a square patch grid, [1 + old², dim], to another grid: [length, dim]. Bicubic, as
    for fine-tuning ViTs at higher resolution (Dosovitskiy et al. 2021, §3.2)."""
    if len(table) == length:
        return table
    cls, grid = table[:1], table[1:]
    old, new = round(len(grid) ** 0.5), round((length - 1) ** 0.5)
    planes = grid.T.unflatten(1, (old, old))[None].float()  # [1, dim, row, column]
    planes = F.interpolate(planes, size=(new, new), mode="bicubic", antialias=True, align_corners=False)
    return torch.cat([cls, planes[0].flatten(1).T.to(table.dtype)])
