"""Triton kernels for `tiled.log2_sums` and `tiled.gradient_products`, in which a tile of similarities never leaves the chip.

In plain PyTorch, every operation on a tile reads it from memory and writes it back. Here a block of rows iterates over the columns and
accumulates in registers, as in FlashAttention (Dao et al. 2022). There are no atomic additions, so results are reproducible. Products use
three passes of TF32, which is about as accurate as float32, or one pass if torch allows TF32 for its own products.

The tests run the kernels in Triton's interpreter and compile them for NVIDIA GPUs; they have never been run or benchmarked on a GPU.
COALIGN_TRITON=1 enables them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# tile size, and number of dimensions multiplied at once: as large as fits into registers, according to ptxas
ROWS, COLUMNS, CHUNK = 64, 32, 32
MAX_OUT = 256  # maximum number of gradient dimensions per program
FLOOR = tl.constexpr(torch.finfo(torch.float32).min / 4)  # tiled.masked_logit
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    queries, keys, scale, row_labels, column_labels, rows, columns, num_rows, num_columns, dim,
    LABELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits [ROWS, COLUMNS]: `FLOOR` if row and column share a label, minus infinity beyond the last column."""
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, dim, CHUNK):
        d = start + tl.arange(0, CHUNK)
        q = tl.load(queries + rows[:, None] * dim + d, mask=(rows[:, None] < num_rows) & (d < dim), other=0.0)
        k = tl.load(keys + columns[:, None] * dim + d, mask=(columns[:, None] < num_columns) & (d < dim), other=0.0)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
    logits = products * (tl.load(scale) * LOG2_E)
    for label in tl.static_range(LABELS):
        of_row = tl.load(row_labels + label * num_rows + rows, mask=rows < num_rows, other=-1)
        of_column = tl.load(column_labels + label * num_columns + columns, mask=columns < num_columns, other=-2)
        logits = tl.where(of_row[:, None] == of_column[None, :], FLOOR, logits)
    return tl.where(columns[None, :] < num_columns, logits, -float("inf"))


@triton.jit
def _sums_kernel(
    queries, keys, scale, row_labels, column_labels, sums, num_rows, num_columns, dim,
    LABELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 Σ_j 2^x_ij for ROWS rows."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    largest = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for left in range(0, num_columns, COLUMNS):
        columns = (left + tl.arange(0, COLUMNS)).to(tl.int64)
        logits = _tile(
            queries, keys, scale, row_labels, column_labels, rows, columns, num_rows, num_columns, dim,
            LABELS, ROWS, COLUMNS, CHUNK, PRECISION,
        )  # fmt: skip
        larger = tl.maximum(largest, tl.max(logits, 1))
        total = total * tl.exp2(largest - larger) + tl.sum(tl.exp2(logits - larger[:, None]), 1)
        largest = larger
    tl.store(sums + rows, tl.log2(total) + largest, mask=rows < num_rows)


@triton.jit
def _weighted_kernel(
    queries, keys, scale, row_labels, column_labels, row_sums, row_gradient, column_sums, column_gradient, result,
    num_rows, num_columns, dim, BY_ROWS: tl.constexpr, BY_COLUMNS: tl.constexpr, OUT: tl.constexpr,
    LABELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """(G·K)_i for ROWS rows and OUT dimensions, with G_ij = g_i·2^(x_ij − s_i) (BY_ROWS) + g_j·2^(x_ij − s_j) (BY_COLUMNS)."""
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    out = tl.program_id(1) * OUT + tl.arange(0, OUT)
    weighted = tl.zeros([ROWS, OUT], tl.float32)
    if BY_ROWS:
        s_i = tl.load(row_sums + rows, mask=rows < num_rows, other=0.0)
        g_i = tl.load(row_gradient + rows, mask=rows < num_rows, other=0.0)
    for left in range(0, num_columns, COLUMNS):
        columns = (left + tl.arange(0, COLUMNS)).to(tl.int64)
        logits = _tile(
            queries, keys, scale, row_labels, column_labels, rows, columns, num_rows, num_columns, dim,
            LABELS, ROWS, COLUMNS, CHUNK, PRECISION,
        )  # fmt: skip
        # a softmax weight is at most 1; without the clamp, an empty sum (with gradient 0) would give infinity
        tile = tl.zeros([ROWS, COLUMNS], tl.float32)
        if BY_ROWS:
            tile += tl.exp2(tl.minimum(logits - s_i[:, None], 0.0)) * g_i[:, None]
        if BY_COLUMNS:
            s_j = tl.load(column_sums + columns, mask=columns < num_columns, other=0.0)
            g_j = tl.load(column_gradient + columns, mask=columns < num_columns, other=0.0)
            tile += tl.exp2(tl.minimum(logits - s_j[None, :], 0.0)) * g_j[None, :]
        k = tl.load(keys + columns[:, None] * dim + out, mask=(columns[:, None] < num_columns) & (out < dim), other=0.0)
        weighted = tl.dot(tile, k, weighted, input_precision=PRECISION)
    tl.store(result + rows[:, None] * dim + out, weighted, mask=(rows[:, None] < num_rows) & (out < dim))


def log2_sums(queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, direction: str) -> Tensor:
    """`tiled.log2_sums` on a GPU."""
    queries, keys, rows, columns = (x.contiguous() for x in (queries, keys, rows, columns))
    scale = scale.float()
    row_sums = _sums(queries, keys, scale, rows, columns)
    return torch.cat([row_sums, _sums(keys, queries, scale, columns, rows)]) if direction == "both" else row_sums


def gradient_products(
    queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, direction: str, sums: Tensor, gradient: Tensor,
    with_keys: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`tiled.gradient_products` on a GPU."""
    queries, keys, rows, columns = (x.contiguous() for x in (queries, keys, rows, columns))
    scale = scale.float()
    by_rows = (sums[: len(queries)], gradient[: len(queries)].contiguous())
    if direction == "within":  # G + Gᵀ, as each embedding is both a row and a column; half of it for each result
        half = _weighted(queries, keys, scale, rows, columns, by_rows, by_rows).div_(2)
        return half, half.clone()
    by_columns = (sums[-len(keys) :], gradient[-len(keys) :].contiguous()) if direction == "both" else None
    query_products = _weighted(queries, keys, scale, rows, columns, by_rows, by_columns)
    return query_products, _weighted(keys, queries, scale, columns, rows, by_columns, by_rows) if with_keys else None


def _sums(queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    result = queries.new_empty(len(queries))
    _sums_kernel[(triton.cdiv(len(queries), ROWS),)](
        queries, keys, scale, rows, columns, result, len(queries), len(keys), queries.shape[1], **_constants(rows)
    )
    return result


Weights = tuple[Tensor, Tensor]  # sums s and gradients g, of the rows or of the columns


def _weighted(
    queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, by_rows: Weights | None, by_columns: Weights | None
) -> Tensor:  # fmt: skip
    result = torch.empty_like(queries)
    dim = queries.shape[1]
    out = min(MAX_OUT, max(16, triton.next_power_of_2(dim)))
    grid = (triton.cdiv(len(queries), ROWS), triton.cdiv(dim, out))
    _weighted_kernel[grid](
        queries, keys, scale, rows, columns, *(by_rows or (queries, queries)), *(by_columns or (keys, keys)), result,
        len(queries), len(keys), dim, BY_ROWS=by_rows is not None, BY_COLUMNS=by_columns is not None, OUT=out,
        **_constants(rows), num_warps=8,
    )  # fmt: skip
    return result


def _constants(labels: Tensor) -> dict[str, Any]:
    precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    return {"LABELS": len(labels), "ROWS": ROWS, "COLUMNS": COLUMNS, "CHUNK": CHUNK, "PRECISION": precision}
