"""What this machine can do at most, with as many threads as torch has: products of matrices, and reading and writing of memory."""

from __future__ import annotations

import time

import torch

SIDE, ELEMENTS = 2048, 1 << 26  # a product's operands fit the caches' outer levels as a step's do; 256 MB fit none


def product_flops(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Floating-point operations a second of the best of several products."""
    one, other = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    return 2 * SIDE**3 / _best(lambda: one @ other, seconds)


def bandwidth(seconds: float = 2.0) -> float:
    """Bytes a second, read and written, of the best of several sums of two large arrays. The sum goes where one of them was: other memory
    would have to be read before it is written, uncounted."""
    one, other = (torch.zeros(ELEMENTS) for _ in range(2))
    return 3 * 4 * ELEMENTS / _best(lambda: one.add_(other), seconds)


def _best(work, seconds: float) -> float:  # type: ignore[no-untyped-def]
    work()
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best
