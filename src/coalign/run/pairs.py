"""The pairs that a run trains on and those it holds out, and their batches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import gettempdir

import numpy as np

from coalign.config import TrainConfig
from coalign.data.image_cache import ImageCache
from coalign.data.loader import PairLoader, tag_vocabulary
from coalign.data.randomness import stable_hash
from coalign.data.tokenizer import Tokenizer
from coalign.method import Method
from coalign.run import model as runs
from coalign.training.distributed import World
from coalign.types import Source

MAX_READ = 200_000  # training pairs that are read for a vocabulary, of words or of tags


@dataclass
class Data:
    """Training and validation pairs."""

    source: Source
    train: np.ndarray
    val_source: Source
    val: np.ndarray
    tests: Mapping[str, np.ndarray] = field(default_factory=dict)  # further splits of `source`, for the end

    def tag_ids(self, size: int) -> dict[str, int]:
        """The most frequent tags of the training pairs and their ids, from the first pairs where there are very many."""
        return tag_vocabulary(self.source, self.train[:MAX_READ], size) if size else {}


def pair_loader(
    method: Method,
    config: TrainConfig,
    source: Source,
    indices: np.ndarray,
    tokenizer: Tokenizer,
    world: World,
    batch_size: int,
    tag_ids: Mapping[str, int],
    images: Path | None = None,
) -> PairLoader:
    """The training pairs' or the validation pairs' batches, as the method wants them.

    With the folder `images`, decoded images are kept there if the configuration says so.
    """
    return PairLoader(
        source,
        indices,
        method.view_plan,
        tokenizer,
        image_size=runs.image_size(method),
        context_length=config.context_length,
        batch_size=batch_size,
        seed=config.seed,
        workers=config.workers or 0,
        rank=world.rank,
        world_size=world.size,
        tag_vocabulary=tag_ids,
        patch_grid=runs.patch_grid(method),
        cache=ImageCache(images, len(source), config.image_cache * 1e9) if images and config.image_cache else None,
        finish_on=world.device if config.device_views else None,
    )


def image_folder(out: Path, source: Source) -> Path:
    """Where the decoded images of the run in `out` are kept: on this machine, until it starts again, for all processes and for when the run
    goes on with as many samples."""
    started = Path("/proc/sys/kernel/random/boot_id")
    marks = (out.resolve(), len(source), started.read_text() if started.exists() else "")
    return Path(gettempdir()) / f"coalign-images-{stable_hash(*marks):016x}"
