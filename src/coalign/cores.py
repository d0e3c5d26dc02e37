"""The CPU cores that this process may use, and settings of torch's threads that must be made before torch is loaded."""

from __future__ import annotations

import os
import sys
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")


def num_cores() -> int:
    """Returns the number of CPU cores of this process: by its affinity and its container's CPU limit, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, int(min(cores, _container_limit())))


def set_up_threads() -> None:
    """Sets OpenMP's environment variables that are unset.

    Threads that wait for long sleep instead of spinning: beside other programs, spinning threads take the time that working ones need.
    They spin for a few microseconds (GNU's OpenMP, which PyTorch has on Linux), because operations of small models follow each other
    faster than a thread wakes up. OpenMP respects the affinity, but not the container's limit, so that sets the number of threads.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if _container_limit() < (os.cpu_count() or 1):
        os.environ.setdefault("OMP_NUM_THREADS", str(num_cores()))


def set_up_apple_gpu() -> None:
    """Lets operations that PyTorch lacks on Apple GPUs run on the CPU, with a warning, instead of failing."""
    if sys.platform == "darwin":
        os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")


def _container_limit() -> float:
    """Returns the CPU limit of this process's control groups (Linux's cgroup v2), in cores; infinity without one."""
    own = Path("/proc/self/cgroup")
    paths = [line.removeprefix("0::/") for line in _lines(own) if line.startswith("0::/")]
    group = _CGROUPS / paths[0] if paths else _CGROUPS
    limits = [float("inf")]
    for folder in (group, *group.parents):
        for line in _lines(folder / "cpu.max"):  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
            quota, period = line.split()
            if quota != "max":
                limits.append(int(quota) / int(period))
    return min(limits)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:  # another system, or no such controller
        return []
