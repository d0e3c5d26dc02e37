"""The peak speed of matrix products on this machine, with torch's number of threads."""

from __future__ import annotations

import time

import torch

SIDE = 2048  # of square matrices, small enough for a processor's outer caches


def product_flops(dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Returns the FLOP/s of the fastest of several products; by CPU time with a single thread, else by wall-clock time."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    one, other = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    best, until = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until or best == float("inf"):
        start = clock()
        one @ other
        best = min(best, clock() - start)
    return 2 * SIDE**3 / best
