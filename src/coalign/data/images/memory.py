"""How much memory decoded images take, and how much there is."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePath

import numpy as np

from coalign.data.images.decode import jpeg_reduction, open_image
from coalign.data.images.views import draw_views
from coalign.data.sources.base import Source
from coalign.errors import BadSample
from coalign.randomness import Draws
from coalign.types import AugmentationPolicy, Preprocess

SHARE = 0.25  # of the available memory that decoded images may take
_SAMPLED = 64  # images of which the header is read
_DRAWN = 30  # views of each of them, as in so many epochs
# Of control groups, version 2 and version 1: folder of the root group, controller in /proc/self/cgroup, and names of limit and usage.
_CONTROL_GROUPS = (
    ("", "", "memory.max", "memory.current"),
    ("memory", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


def decoded_bytes(
    source: Source,
    indices: np.ndarray,
    policies: Mapping[str, AugmentationPolicy],
    output_size: int,
    preprocess: Preprocess,
) -> float:
    """Estimates the bytes of all images, decoded at every resolution that their views need, from some of them."""
    sampled = np.asarray(indices)[np.unique(np.linspace(0, len(indices) - 1, _SAMPLED).astype(int))]
    sizes: list[float] = []
    for index in sampled.tolist():
        with suppress(BadSample):
            image = open_image(source.image(index))
            draws = Draws(0, 0, np.arange(_DRAWN))
            _, scales = draw_views(policies, draws.uniform, np.tile(image.size, (_DRAWN, 1)), output_size, preprocess)
            reductions = {jpeg_reduction(scale) if image.reducible else 1 for scale in scales.tolist()}
            sizes.append(sum(3.0 * image.size[0] * image.size[1] / reduction**2 for reduction in reductions))
    return len(indices) * sum(sizes) / len(sampled)


def available_memory(root: Path = Path("/")) -> float:
    """Bytes of memory that can be used without swapping: what the system has available, within the limits of the control groups."""
    available = [float("inf")]
    with suppress(OSError, ValueError, StopIteration):
        lines = (root / "proc/meminfo").read_text().splitlines()
        available.append(1024.0 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]))
    for limit, used in _limits(root):
        with suppress(OSError, ValueError):  # "max": no limit
            available.append(float(int(limit.read_text())) - int(used.read_text()))
    if available == [float("inf")]:  # another system than Linux
        if not hasattr(os, "sysconf"):  # Windows: not known, so nothing is kept
            return 0.0
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2
    return max(0.0, min(available))


def _limits(root: Path) -> Iterator[tuple[Path, Path]]:
    """The files of limit and usage of this process's control groups, such as a Slurm job's, and of all groups around them."""
    groups: dict[str, str] = {}  # controller -> this process's group; a container may see only the root group
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups |= dict.fromkeys(controllers.split(","), path.strip("/"))
    for folder, controller, limit, used in _CONTROL_GROUPS:
        group = PurePath(groups.get(controller, ""))
        for each in (group, *group.parents):
            yield root / "sys/fs/cgroup" / folder / each / limit, root / "sys/fs/cgroup" / folder / each / used
