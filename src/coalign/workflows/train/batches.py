"""The training and validation pairs of a run, and their loaders."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from coalign.config import TrainConfig
from coalign.data.account import account_lines, class_lines
from coalign.data.images.cache import ImageCache
from coalign.data.loading.cached_views import NOTHING_CACHED, CachedViews
from coalign.data.loading.train import PairLoader, tag_vocabulary
from coalign.data.sources.base import Source
from coalign.data.text.tokenizer import Tokenizer
from coalign.method import Method
from coalign.runs.run import context_length, image_size, patch_grid, preprocess
from coalign.training.distributed import World

MAX_TRACKED = 2000  # validation pairs used during training; the final evaluation uses all
MAX_VOCABULARY_PAIRS = 200_000  # training pairs to build a tokenizer or a tag vocabulary from


@dataclass
class TrainingData:
    """The train and val splits of a run."""

    source: Source
    train: np.ndarray  # indices of `source`
    val_source: Source
    val: np.ndarray  # indices of `val_source`
    test_splits: Mapping[str, np.ndarray] = field(default_factory=dict)  # splits of `source` for the final evaluation

    @property
    def has_own_val(self) -> bool:
        """Whether the validation pairs are samples of `source`, with the same indices."""
        return self.val_source.name == self.source.name

    @property
    def tracked(self) -> np.ndarray:
        """The indices of the validation pairs that are used during training: a fixed sample."""
        return np.sort(np.random.default_rng(0).permutation(self.val)[:MAX_TRACKED])

    def account(self) -> list[str]:
        """Returns a sentence each on what opening the data left out, on its classes, and on a single held-out pair."""
        same = self.has_own_val
        lines = [*account_lines(self.source), *class_lines(self.source, self.train, self.val if same else self.val[:0])]
        if len(self.val) == 1:
            lines.append("Only one pair is held out, so nothing is evaluated; set a larger --val-fraction.")
        return lines if same else [*lines, *(f"Validation data: {line}" for line in account_lines(self.val_source))]

    def tag_ids(self, size: int) -> dict[str, int]:
        """Returns the `size` most frequent tags of the training pairs (of the first `MAX_VOCABULARY_PAIRS`) and their ids."""
        return tag_vocabulary(self.source, self.train[:MAX_VOCABULARY_PAIRS], size) if size else {}


def pair_loader(
    method: Method,
    config: TrainConfig,
    source: Source,
    indices: np.ndarray,
    tokenizer: Tokenizer,
    world: World,
    batch_size: int,
    tag_ids: Mapping[str, int],
    cache: ImageCache | None = None,
    cached: CachedViews = NOTHING_CACHED,
) -> PairLoader:
    """Returns a loader of the pairs with the method's views."""
    return PairLoader(
        source,
        indices,
        method.view_plan,
        tokenizer,
        image_size=image_size(method),
        preprocess=preprocess(method),
        context_length=context_length(method),
        batch_size=batch_size,
        seed=config.seed,
        workers=0 if cached.images else config.workers or 0,
        rank=world.rank,
        world_size=world.size,
        tag_vocabulary=tag_ids,
        patch_grid=patch_grid(method),
        cache=cache,
        group_column=config.reading.group_column,
        finish_on=world.device if config.device_views else None,
        cached=cached,
    )
