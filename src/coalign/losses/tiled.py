"""Log-sum-exp over negatives without materializing the similarity matrix: tiles are computed, reduced, and recomputed for the gradient.

Besides the embeddings, memory holds one tile at a time. If two sets are compared in both directions, or a set with itself, each tile is
computed once and reduced over both its rows and its columns.
"""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from coalign.errors import UserError

TILE = 512  # rows and columns per tile on a CPU: 1 MB of float32, which fits its cache
LOG2_E = math.log2(math.e)  # within a tile, logits are to base 2: 2^x costs a third of e^x

Direction = Literal["rows", "both", "within"]
# integer labels of rows and of columns, [row] or [row, label]: a row and a column that share one are not negatives of each other
Labels = tuple[Tensor, Tensor]


def negatives_logsumexp(
    queries: Float[Tensor, "row dim"],
    keys: Float[Tensor, "column dim"],
    logit_scale: Float[Tensor, ...],
    row_labels: Int[Tensor, "row label"],
    column_labels: Int[Tensor, "column label"],
) -> Float[Tensor, " row"]:
    """Returns log Σ_j e^{s·q_i·k_j} for each row i, over the columns j that share no label with it.

    The labels at each position are compared only with each other. For a row without such columns, the value is about `masked_logit` and
    the gradient is zero. Computed in at least float32, like everything in this module.
    """
    return _LogSumExp.apply(queries, keys, logit_scale, row_labels, column_labels, "rows")


def negatives_logsumexp_both_ways(
    first: Float[Tensor, "row dim"],
    second: Float[Tensor, "column dim"],
    logit_scale: Float[Tensor, ...],
    first_labels: Int[Tensor, "row label"],
    second_labels: Int[Tensor, "column label"],
) -> tuple[Float[Tensor, " row"], Float[Tensor, " column"]]:
    """Returns `negatives_logsumexp` of the first set with the second and of the second with the first, from the same products."""
    sums = _LogSumExp.apply(first, second, logit_scale, first_labels, second_labels, "both")
    return sums[: len(first)], sums[len(first) :]


def negatives_logsumexp_within(
    embeds: Float[Tensor, "row dim"], logit_scale: Float[Tensor, ...], labels: Int[Tensor, "row label"]
) -> Float[Tensor, " row"]:
    """Returns `negatives_logsumexp` of a set with itself, from half of the products. A row is not its own negative."""
    return _LogSumExp.apply(embeds, embeds, logit_scale, labels, labels, "within")


def contrast_labels(
    features: Mapping[str, Tensor], gather: Callable[[Tensor], Tensor], captions: bool
) -> Labels | None:
    """Returns the labels of the local and of all pairs, int64 [pair, label]: caption ids if `captions`, and groups in data with groups.

    None if there are neither.
    """
    names = ["caption_ids"] if captions else []
    names += ["group_ids"] if "group_ids" in features else []
    if not names:
        return None
    labels = torch.stack([features[name] for name in names], dim=1)
    return labels, gather(labels)


def labels_2d(labels: Labels) -> Labels:
    """Returns the labels as [row, label] and [column, label]."""
    rows, columns = (x if x.ndim == 2 else x[:, None] for x in labels)
    return rows, columns


def masked_logit(dtype: torch.dtype) -> float:
    """Returns the logit of a masked entry: finite, because the gradient of a sum over minus infinity alone would be NaN."""
    return torch.finfo(dtype).min / 4


def at_least_float32(tensor: Tensor) -> Tensor:
    """Casts bfloat16 and float16 to float32 (at τ = 0.01, their rounding error exceeds the loss). Leaves float32 and float64 unchanged."""
    return tensor.float() if tensor.dtype in (torch.bfloat16, torch.float16) else tensor


class _LogSumExp(torch.autograd.Function):
    """Log-sum-exp of the rows, and in direction "both" also of the columns, concatenated."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, direction: Direction
    ) -> Tensor:
        ctx.direction, ctx.dtypes = direction, (queries.dtype, keys.dtype, scale.dtype)
        with torch.autocast(queries.device.type, enabled=False):
            queries, keys = at_least_float32(queries), at_least_float32(keys)
            rows, columns = _compact(rows, columns)
            sums = _backend(queries).log2_sums(queries, keys, scale, rows, columns, direction)
            ctx.save_for_backward(queries, keys, scale, rows, columns, sums)
            return sums / LOG2_E

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, keys, scale, rows, columns, sums = ctx.saved_tensors
        with torch.autocast(queries.device.type, enabled=False):
            # an empty sum has no gradient
            gradient = gradient.to(sums).masked_fill(sums <= masked_logit(sums.dtype) / 2, 0.0)
            with_keys = ctx.needs_input_grad[1]  # false for the keys of a queue
            query_products, key_products = _backend(queries).gradient_products(
                queries, keys, scale, rows, columns, ctx.direction, sums, gradient, with_keys
            )
            scale_grad = (queries * query_products).sum().to(ctx.dtypes[2]).expand(scale.shape)
            query_grad = query_products.mul_(scale).to(ctx.dtypes[0])
            key_grad = None if key_products is None else key_products.mul_(scale).to(ctx.dtypes[1])
            return query_grad, key_grad, scale_grad, None, None, None


def _backend(tensor: Tensor) -> ModuleType:
    """Returns the module that implements `log2_sums` and `gradient_products`: this one, or the Triton one if COALIGN_TRITON=1."""
    if os.environ.get("COALIGN_TRITON") == "1" and tensor.is_cuda and tensor.dtype == torch.float32:
        try:
            return importlib.import_module("coalign.losses.tiled_triton")
        except ImportError as error:
            raise UserError(
                f"COALIGN_TRITON=1 is set, but Triton cannot be imported ({error}); install triton or unset COALIGN_TRITON."
            ) from error
    return sys.modules[__name__]


def log2_sums(
    queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, direction: Direction
) -> Tensor:
    """Returns log2 Σ 2^x with x_ij = log2(e)·s·q_i·k_j for the rows, [row], and in direction "both" also for the columns.

    `rows` and `columns` are their labels, int32 [label, row] and [label, column].
    """
    row_sums = queries.new_full([len(queries)], -torch.inf)
    column_sums = row_sums if direction == "within" else queries.new_full([len(keys)], -torch.inf)
    for i, j, logits, scratch in _tiles(queries, keys, scale, rows, columns, direction):
        _accumulate(row_sums[i], logits, 1, scratch)
        if _includes_columns(direction, i, j):
            _accumulate(column_sums[j], logits, 0, scratch)
    return torch.cat([row_sums, column_sums]) if direction == "both" else row_sums


def gradient_products(
    queries: Tensor,
    keys: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    direction: Direction,
    sums: Tensor,
    gradient: Tensor,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None]:
    """Returns G·K and, if `with_keys`, Gᵀ·Q, computing the tiles of G = ∂L/∂(s·q·k) from the `log2_sums` and their gradient.

    Multiplied by s, these are the gradients of queries and keys; Σ_i q_i·(G·K)_i is the gradient of s. In direction "within", x is
    symmetric and q = k: a tile above the diagonal also stands for its mirror image, and the gradient of q is the sum of both results.
    """
    row_sums, column_sums = sums[: len(queries)], sums[-len(keys) :]
    row_gradient, column_gradient = gradient[: len(queries)], gradient[-len(keys) :]
    query_products, key_products = torch.zeros_like(queries), torch.zeros_like(keys) if with_keys else None
    for i, j, logits, scratch in _tiles(queries, keys, scale, rows, columns, direction):
        tile = torch.sub(logits, row_sums[i, None], out=scratch).exp2_().mul_(row_gradient[i, None])
        if _includes_columns(direction, i, j):
            tile += logits.sub_(column_sums[j]).exp2_().mul_(column_gradient[j])
        query_products[i].addmm_(tile, keys[j])
        if key_products is not None:
            key_products[j].addmm_(tile.T, queries[i])
    return query_products, key_products


def _tiles(
    queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, direction: Direction
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """Yields row slice, column slice, base-2 logits and a scratch buffer of the same shape. The next tile overwrites both tensors."""
    side = _tile_side(queries.device)
    height, width = min(side, len(queries)), min(side, len(keys))
    buffers = [torch.empty(height * width, dtype=queries.dtype, device=queries.device) for _ in range(2)]
    masked = masked_logit(queries.dtype)
    for top in range(0, len(queries), side):
        i = slice(top, min(top + side, len(queries)))
        scaled = queries[i] * (scale * LOG2_E).to(queries)
        for left in range(top if direction == "within" else 0, len(keys), side):
            j = slice(left, min(left + side, len(keys)))
            shape = (i.stop - i.start, j.stop - j.start)
            logits, scratch = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            torch.mm(scaled, keys[j].T, out=logits)
            for row_labels, column_labels in zip(rows[:, i], columns[:, j]):
                # few tiles contain a shared label, so only the columns with a label of some row are compared
                shared = torch.isin(column_labels, row_labels).nonzero().squeeze(1)
                if len(shared) == shape[1]:
                    logits.masked_fill_(row_labels[:, None] == column_labels, masked)
                elif len(shared):
                    equal = row_labels[:, None] == column_labels[shared]
                    logits[:, shared] = logits[:, shared].masked_fill(equal, masked)
            yield i, j, logits, scratch


def _includes_columns(direction: Direction, rows: slice, columns: slice) -> bool:
    """Whether a tile is also reduced over its columns; in direction "within", tiles on the diagonal are not."""
    return direction == "both" or (direction == "within" and rows != columns)


def _accumulate(sums: Tensor, logits: Tensor, dim: int, scratch: Tensor) -> None:
    """Sets `sums` to log2(2^sums + Σ 2^logits over `dim`), in place."""
    largest = logits.amax(dim, keepdim=True)
    tile_sums = torch.sub(logits, largest, out=scratch).exp2_().sum(dim).log2_() + largest.squeeze(dim)
    sums.copy_(torch.logaddexp2(sums, tile_sums))


def _compact(rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the labels as int32 [label, row] and [label, column], which compare faster than 63-bit caption ids."""
    compact = [torch.cat([row, column]).unique(return_inverse=True)[1].int() for row, column in zip(rows.T, columns.T)]
    both = torch.stack(compact)
    return both[:, : len(rows)], both[:, len(rows) :]


def _tile_side(device: torch.device) -> int:
    """Returns the side of a tile; larger on a GPU, so that it is not launch-bound."""
    return TILE if device.type == "cpu" else 8 * TILE


def over_row_chunks(function: Callable[..., Tensor], *tensors: Tensor, columns: int) -> Tensor:
    """Applies `function` to chunks of the rows of all `tensors` and concatenates the results, [row].

    Each row needs memory for `columns` intermediate values. Intermediates are recomputed for the gradient, so that at most one tile's worth
    exists at a time; also those of a single chunk, so that the memory measured on a few rows extrapolates. An exported graph has no chunks,
    as their number would be fixed by its example.
    """
    if torch.compiler.is_compiling():  # also during an export
        return function(*tensors)
    size = max(1, _tile_side(tensors[0].device) ** 2 // max(1, columns))
    if len(tensors[0]) <= size and not torch.is_grad_enabled():
        return function(*tensors)
    chunks = zip(*(tensor.split(size) for tensor in tensors))
    return torch.cat([checkpoint(function, *chunk, use_reentrant=False) for chunk in chunks])
