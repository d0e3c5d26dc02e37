"""The C library's allocator, for training on a CPU."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3), glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, where the C library is glibc.

    By default glibc maps every large block anew and gives it back when it is freed, so that each step's activations fault in page by
    page: about a third of the time of a small model's step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
