"""What every contrastive loss sums over, without the matrix of all similarities: its tiles are made, used, and made again for the gradient.

Memory is that of one tile beside the embeddings. A tile of two sets that are compared both ways, or of a set with itself, is made once
for its rows and its columns.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from coalign.errors import UserError

TILE = 512  # rows and columns that are compared at once on a CPU: 1 MB of float32, which its cache holds
LOG2_E = math.log2(math.e)  # logits are to base 2 within a tile: 2^x costs a third of e^x

Direction = Literal["rows", "both", "within"]
# of rows and of columns, integers [row] or [row, label]: a row and a column that share one are not each other's negatives
Labels = tuple[Tensor, Tensor]


def sum_over_others(
    queries: Float[Tensor, "row dim"],
    keys: Float[Tensor, "column dim"],
    logit_scale: Float[Tensor, ...],
    row_labels: Int[Tensor, "row label"],
    column_labels: Int[Tensor, "column label"],
) -> Float[Tensor, " row"]:
    """log Σ_j e^{s·q_i·k_j} of each row, over the columns with which it shares no label.

    Labels are compared place by place. Where a row has no such column, the value is `floor`'s and the gradient zero. Computed in at least
    float32, as all in this module.
    """
    return _Sums.apply(queries, keys, logit_scale, row_labels, column_labels, "rows")


def sum_over_others_both_ways(
    first: Float[Tensor, "row dim"],
    second: Float[Tensor, "column dim"],
    logit_scale: Float[Tensor, ...],
    first_labels: Int[Tensor, "row label"],
    second_labels: Int[Tensor, "column label"],
) -> tuple[Float[Tensor, " row"], Float[Tensor, " column"]]:
    """`sum_over_others` of the first with the second, and of the second with the first, from the same products."""
    sums = _Sums.apply(first, second, logit_scale, first_labels, second_labels, "both")
    return sums[: len(first)], sums[len(first) :]


def sum_over_others_within(
    embeds: Float[Tensor, "row dim"], logit_scale: Float[Tensor, ...], labels: Int[Tensor, "row label"]
) -> Float[Tensor, " row"]:
    """`sum_over_others` of a set with itself, from half of the products. A row is none of its others."""
    return _Sums.apply(embeds, embeds, logit_scale, labels, labels, "within")


def as_rows(labels: Labels) -> Labels:
    """[row, label] and [column, label]."""
    rows, columns = (x if x.ndim == 2 else x[:, None] for x in labels)
    return rows, columns


def floor(dtype: torch.dtype) -> float:
    """In place of minus infinity, of which the gradient of a sum of nothing else is NaN."""
    return torch.finfo(dtype).min / 4


def at_least_float32(tensor: Tensor) -> Tensor:
    """bfloat16 and float16 go to float32 (at τ = 0.01 their rounding is larger than the loss); float32 and float64 stay."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _Sums(torch.autograd.Function):
    """Rows' sums, followed by columns' sums in the direction "both"."""

    @staticmethod
    def forward(
        context: Any, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, way: Direction
    ) -> Tensor:
        context.way, context.dtypes = way, (queries.dtype, keys.dtype, scale.dtype)
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = at_least_float32(queries), at_least_float32(keys)
            rows, columns = _compact(rows, columns)
            found = _made_by(queries).sums(queries, keys, scale, rows, columns, way)
            context.save_for_backward(queries, keys, scale, rows, columns, found)
            return found / LOG2_E

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, rows, columns, found = context.saved_tensors
        with torch.autocast(queries.device.type, enabled=False):
            # a sum over nothing has no gradient
            gradient = gradient.to(found).masked_fill(found <= floor(found.dtype) / 2, 0.0)
            keys_too = context.needs_input_grad[1]  # a queue's have no gradient
            query_sums, key_sums = _made_by(queries).gradient_sums(
                queries, keys, scale, rows, columns, context.way, found, gradient, keys_too
            )
            of_scale = (queries * query_sums).sum().to(context.dtypes[2]).expand(scale.shape)
            of_queries = query_sums.mul_(scale).to(context.dtypes[0])
            of_keys = None if key_sums is None else key_sums.mul_(scale).to(context.dtypes[1])
            return of_queries, of_keys, of_scale, None, None, None


def _made_by(tensor: Tensor) -> ModuleType:
    """The module whose `sums` and `gradient_sums` are for this tensor: this one, or on request the one in Triton."""
    if os.environ.get("COALIGN_TRITON") == "1" and tensor.is_cuda and tensor.dtype == torch.float32:
        try:
            return importlib.import_module("coalign.losses.tiled_triton")
        except ImportError as error:
            raise UserError(
                f"COALIGN_TRITON=1 needs Triton, which cannot be imported ({error}): install triton, or unset COALIGN_TRITON."
            ) from error
    return sys.modules[__name__]


def sums(queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, way: Direction) -> Tensor:
    """log2 Σ 2^x with x_ij = log2(e)·s·q_i·k_j, of the rows [row], and in the direction "both" then of the columns."""
    found = queries.new_full([len(queries)], -torch.inf)
    of_columns = found if way == "within" else queries.new_full([len(keys)], -torch.inf)
    for i, j, logits, spare in _tiles(queries, keys, scale, rows, columns, way):
        _add(found[i], logits, 1, spare)
        if _counts_columns(way, i, j):
            _add(of_columns[j], logits, 0, spare)
    return torch.cat([found, of_columns]) if way == "both" else found


def gradient_sums(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    way: Direction,
    of: Tensor,
    gradient: Tensor,
    keys_too: bool,
) -> tuple[Tensor, Tensor | None]:
    """G·K, and on request Gᵀ·Q, with the tiles of G = ∂L/∂(s·q·k) from the sums `of` and their gradient.

    Times s they are the gradients of queries and keys, and Σ_i q_i·(G·K)_i is that of s. "within", x is symmetric and q = k: a tile above
    the diagonal stands for its mirror image too, and both results together are the gradient of q.
    """
    of_rows, of_columns = of[: len(queries)], of[-len(keys) :]
    row_gradient, column_gradient = gradient[: len(queries)], gradient[-len(keys) :]
    query_sums, key_sums = torch.zeros_like(queries), torch.zeros_like(keys) if keys_too else None
    for i, j, logits, spare in _tiles(queries, keys, scale, rows, columns, way):
        tile = torch.sub(logits, of_rows[i, None], out=spare).exp2_().mul_(row_gradient[i, None])
        if _counts_columns(way, i, j):
            tile += logits.sub_(of_columns[j]).exp2_().mul_(column_gradient[j])
        query_sums[i].addmm_(tile, keys[j])
        if key_sums is not None:
            key_sums[j].addmm_(tile.T, queries[i])
    return query_sums, key_sums


def _tiles(
    queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, way: Direction
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Rows, columns, their logits to base 2, and as much memory for the caller to use; both are used again for the next tile."""
    side = _side(queries.device)
    height, width = min(side, len(queries)), min(side, len(keys))
    memory, spare = (torch.empty(height * width, dtype=queries.dtype, device=queries.device) for _ in range(2))
    nothing = floor(queries.dtype)
    for top in range(0, len(queries), side):
        i = slice(top, min(top + side, len(queries)))
        scaled = queries[i] * (scale * LOG2_E).to(queries)
        for left in range(top if way == "within" else 0, len(keys), side):
            j = slice(left, min(left + side, len(keys)))
            shape = (i.stop - i.start, j.stop - j.start)
            logits, other = (x[: shape[0] * shape[1]].view(shape) for x in (memory, spare))
            torch.mm(scaled, keys[j].T, out=logits)
            for of_rows, of_columns in zip(rows[:, i], columns[:, j]):
                # most tiles have no label in common: only those columns are looked at that have one of the rows'
                shared = torch.isin(of_columns, of_rows).nonzero().squeeze(1)
                if len(shared) == shape[1]:
                    logits.masked_fill_(of_rows[:, None] == of_columns, nothing)
                elif len(shared):
                    logits[:, shared] = logits[:, shared].masked_fill(of_rows[:, None] == of_columns[shared], nothing)
            yield i, j, logits, other


def _counts_columns(way: Direction, rows: slice, columns: slice) -> bool:
    return way == "both" or (way == "within" and rows != columns)


def _add(sums: Tensor, logits: Tensor, dim: int, spare: Tensor) -> None:
    """log2(2^sums + Σ 2^logits over `dim`), in place."""
    largest = logits.amax(dim, keepdim=True)
    of_tile = torch.sub(logits, largest, out=spare).exp2_().sum(dim).log2_() + largest.squeeze(dim)
    sums.copy_(torch.logaddexp2(sums, of_tile))


def _compact(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Labels as int32 [label, row] and [label, column], which compare faster: a caption's id has 63 bits."""
    compact = [torch.cat([row, column]).unique(return_inverse=True)[1].int() for row, column in zip(rows.T, columns.T)]
    both = torch.stack(compact)
    return both[:, : len(rows)], both[:, len(rows) :]


def _side(device: torch.device) -> int:
    """Of a tile. A GPU is handed more at once, so that it does not wait for the next."""
    return TILE if device.type == "cpu" else 8 * TILE


def by_rows(function: Callable[..., Tensor], *tensors: Tensor, columns: int) -> Tensor:
    """`function` on a part of the rows of all `tensors` at a time, [row], each part with `columns` columns: made again for the gradient,
    so that no more than a tile's worth of what it makes on the way exists."""
    size = max(1, _side(tensors[0].device) ** 2 // max(1, columns))
    if len(tensors[0]) <= size:
        return function(*tensors)
    parts = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([checkpoint(function, *part, use_reentrant=False) for part in parts])
