"""The cache of decoded images of a run: in memory if they fit, or on disk."""

from __future__ import annotations

import os
from pathlib import Path
from shutil import rmtree
from tempfile import gettempdir

import numpy as np

from coalign.config import TrainConfig
from coalign.data.images.cache import ImageCache
from coalign.data.images.memory import SHARE, available_memory, decoded_bytes
from coalign.data.sources.base import Source
from coalign.formatting import data_size
from coalign.method import Method
from coalign.randomness import stable_hash
from coalign.runs.run import image_size, preprocess
from coalign.training.distributed import World
from coalign.workflows.train.batches import TrainingData


class RunImageCache:
    """The image cache of a run, shared by its processes on this machine.

    Attributes:
        cache: None if nothing is kept.
        decodes_once: Whether decoded images, or their features, are kept for later epochs.
        description: A sentence on what is kept where; "" if there is nothing to say.
        folder: The folder of a cache on disk.
    """

    def __init__(
        self, config: TrainConfig, method: Method, pairs: TrainingData, out: Path, world: World, once: bool = False
    ) -> None:
        """`once`: images are decoded only once, because their features are cached."""
        self.cache: ImageCache | None = None
        self.description = ""
        self.folder = _folder(out, pairs.source)
        self.decodes_once = True
        if once:
            return
        if config.image_cache is None:
            if config.epochs > 1:
                self._keep_in_memory(config, method, pairs, world)
        elif config.image_cache:
            self.cache = ImageCache(len(pairs.source), config.image_cache * 1e9, self.folder / "images")
            self.description = f"Decoded images are kept in {self.folder}, up to {data_size(config.image_cache * 1e9)}."
        self.decodes_once = self.cache is not None

    def remove(self) -> None:
        """Removes the files of a cache on disk, if there are any."""
        rmtree(self.folder, ignore_errors=True)

    def _keep_in_memory(self, config: TrainConfig, method: Method, pairs: TrainingData, world: World) -> None:
        source = pairs.source
        machines = world.gather_objects(_machine())
        is_first = machines.index(machines[world.rank]) == world.rank  # of this machine's processes
        if is_first:
            tracked = pairs.tracked if pairs.has_own_val and config.evals else pairs.tracked[:0]
            indices = np.unique(np.concatenate([pairs.train % len(source), tracked]))
            needed = decoded_bytes(source, indices, method.view_plan.images, image_size(method), preprocess(method))
            available = available_memory()
            if needed <= SHARE * available:
                self.cache = ImageCache(len(source), SHARE * available)
                self.description = f"Decoded images are kept in memory: about {data_size(needed)} of the {data_size(available)} available."
            else:
                self.description = (
                    f"Images are decoded in every epoch: together they would take about {data_size(needed)} of memory, and "
                    f"{data_size(available)} are available. --image-cache GB keeps them on disk."
                )
        caches = world.gather_objects(self.cache)  # equal limits too: a process cannot read beyond its own
        if not is_first:
            self.cache = caches[machines.index(machines[world.rank])]


def _machine() -> tuple[str, str]:
    """Equal in processes that can open each other's files in /proc: of one machine and one container."""
    boot_id, namespace = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")
    if not (boot_id.exists() and namespace.is_symlink()):
        return "", str(os.getpid())
    return boot_id.read_text(), os.readlink(namespace)


def _folder(out: Path, source: Source) -> Path:
    """Returns the folder for decoded images of the run in `out`.

    It is the same for all processes of this machine, and for a resumed run on a source of the same size, until the machine reboots.
    """
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    key = (out.resolve(), len(source), boot_id.read_text() if boot_id.exists() else "")
    return Path(gettempdir()) / f"coalign-images-{stable_hash(*key):016x}"
