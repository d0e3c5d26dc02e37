"""What this machine can do at most, with as many threads as torch has: products of matrices."""

from __future__ import annotations

import time

import torch

SIDE = 2048  # of square matrices, which a processor's outer caches hold


def product_flops(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Floating-point operations a second of the best of several products; on one thread, of processor time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    one, other = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        start = clock()
        one @ other
        best = min(best, clock() - start)
    return 2 * SIDE**3 / best
