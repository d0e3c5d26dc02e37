"""`tiled`'s sums and their gradient as Triton kernels, in which a tile of similarities never leaves the chip.

In plain PyTorch a tile is written to memory and read again by every operation on it; here a block of rows goes through the columns and
keeps what it sums in registers, as in FlashAttention (Dao et al. 2022). Nothing is added up by atomics, so that a run can be repeated.
Products are made by three passes of TF32, which is about as exact as float32, or by one where torch allows TF32 for its own.

Run in Triton's interpreter and compiled for NVIDIA's GPUs by the tests; on a GPU it was never run, let alone measured. COALIGN_TRITON=1
asks for it.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS, CHUNK = (
    64,
    32,
    32,
)  # of a tile, and of the dimensions multiplied at once: as large as registers hold, by ptxas
MAX_OUT = 256  # dimensions of the gradient that one program sums
FLOOR = tl.constexpr(torch.finfo(torch.float32).min / 4)  # tiled.floor
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _tile(
    queries, keys, scale, row_labels, column_labels, rows, columns, num_rows, num_columns, dim,
    LABELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits to base 2 [ROWS, COLUMNS]: `FLOOR` where a label is shared, minus infinity beyond the last column."""
    products = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, dim, CHUNK):
        d = start + tl.arange(0, CHUNK)
        q = tl.load(queries + rows[:, None] * dim + d, mask=(rows[:, None] < num_rows) & (d < dim), other=0.0)
        k = tl.load(keys + columns[:, None] * dim + d, mask=(columns[:, None] < num_columns) & (d < dim), other=0.0)
        products = tl.dot(q, tl.trans(k), products, input_precision=PRECISION)
    logits = products * (tl.load(scale) * LOG2_E)
    for label in tl.static_range(LABELS):
        of_rows = tl.load(row_labels + label * num_rows + rows, mask=rows < num_rows, other=-1)
        of_columns = tl.load(column_labels + label * num_columns + columns, mask=columns < num_columns, other=-2)
        logits = tl.where(of_rows[:, None] == of_columns[None, :], FLOOR, logits)
    return tl.where(columns[None, :] < num_columns, logits, -float("inf"))


@triton.jit
def _sums_kernel(
    queries, keys, scale, row_labels, column_labels, sums, num_rows, num_columns, dim,
    LABELS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """log2 Σ_j 2^x_ij of ROWS rows."""
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
    """(G·K)_i of ROWS rows and OUT dimensions, with G_ij = g_i·2^(x_ij − s_i) of the rows, plus g_j·2^(x_ij − s_j) of the columns."""
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
        # no share is more than 1; what has no sum, and gradient 0, would be infinite
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


def sums(queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, way: str) -> Tensor:
    """`tiled.sums`, on a GPU."""
    queries, keys, rows, columns = (x.contiguous() for x in (queries, keys, rows, columns))
    scale = scale.float()
    of_rows = _sums(queries, keys, scale, rows, columns)
    return torch.cat([of_rows, _sums(keys, queries, scale, columns, rows)]) if way == "both" else of_rows


def gradient_sums(
    queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, way: str, of: Tensor, gradient: Tensor,
    keys_too: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`tiled.gradient_sums`, on a GPU."""
    queries, keys, rows, columns = (x.contiguous() for x in (queries, keys, rows, columns))
    scale = scale.float()
    by_rows = (of[: len(queries)], gradient[: len(queries)].contiguous())
    if way == "within":  # G + Gᵀ for what is row and column at once: half for each
        half = _weighted(queries, keys, scale, rows, columns, by_rows, by_rows).div_(2)
        return half, half.clone()
    by_columns = (of[-len(keys) :], gradient[-len(keys) :].contiguous()) if way == "both" else None
    of_queries = _weighted(queries, keys, scale, rows, columns, by_rows, by_columns)
    return of_queries, _weighted(keys, queries, scale, columns, rows, by_columns, by_rows) if keys_too else None


def _sums(queries: Tensor, keys: Tensor, scale: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    result = queries.new_empty(len(queries))
    _sums_kernel[(triton.cdiv(len(queries), ROWS),)](
        queries, keys, scale, rows, columns, result, len(queries), len(keys), queries.shape[1], **_constants(rows)
    )
    return result


Weights = tuple[Tensor, Tensor]  # sums s, gradients g, of rows or of columns


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
