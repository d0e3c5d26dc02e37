"""malloc settings for training on a CPU."""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # mallopt(3), glibc's malloc.h


def keep_freed_memory() -> None:
    """Stops glibc from returning freed memory to the system. Does nothing with other C libraries.

    By default glibc maps every large block and unmaps it when freed, so the activations of each step page-fault again: about a third
    of the step time of a small model.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)
