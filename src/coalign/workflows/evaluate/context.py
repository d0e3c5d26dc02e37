"""The input of an evaluation task: a model, and samples of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.loading.eval import image_batches
from coalign.data.sources.base import Source
from coalign.data.sources.benchmarks.classification import ClassificationSource
from coalign.evaluation.embed import ImageEmbeds, embed_images, image_features
from coalign.evaluation.prompts import templates
from coalign.training.distributed import World
from coalign.types import EVALUATION, AugmentationPolicy
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.evaluate.linear_probe import Labeled
from coalign.workflows.evaluate.samples import Labels, read_labels


@dataclass
class EvalContext:
    """A model, the samples of a source to evaluate it on, and options of the tasks."""

    model: EvalModel
    source: Source
    indices: np.ndarray  # of the samples to evaluate
    classes: Path | None
    label: str | None
    prompts: str | None
    workers: int
    world: World
    epochs: int = 10  # of fine-tuning

    def labels(self, indices: np.ndarray | None = None) -> Labels:
        """Returns the classes of the given samples (default: those to evaluate)."""
        if indices is None:
            indices = self.indices
        if isinstance(self.source, ClassificationSource) and self.is_benchmark:
            return Labels(self.source.classnames, {i: self.source.labels[i] for i in indices.tolist()}, 0)
        return read_labels(self.source, indices, self.classes, self.label)

    @property
    def is_benchmark(self) -> bool:
        """Whether the source is one of the papers' datasets, with its own classes."""
        return isinstance(self.source, ClassificationSource) and self.classes is None

    def templates(self) -> list[str]:
        default = self.source.prompts if isinstance(self.source, ClassificationSource) else "default"
        return templates(self.prompts or default)

    def benchmark_info(self, uses_train: bool = True) -> dict[str, Any]:
        """Returns a benchmark dataset's main metric in the papers, and how the data differs from theirs; empty for other sources."""
        if not isinstance(self.source, ClassificationSource):
            return {}
        return {"main_metric": self.source.metric, "differences": self.source.differences(uses_train)}

    def train_indices(self) -> np.ndarray:
        """Returns the samples to train on: the source's train split, or all samples that are not evaluated."""
        splits = self.source.splits or {}
        return np.setdiff1d(splits.get("train", np.arange(len(self.source))), self.indices)

    def val_indices(self) -> np.ndarray:
        """Returns the source's val split without the samples to evaluate; empty if it has none."""
        splits = self.source.splits or {}
        return np.setdiff1d(splits.get("val", np.empty(0, np.int64)), self.indices)

    def batches(
        self,
        source: Source,
        indices: Iterable[int],
        policy: AugmentationPolicy | None = None,
        epoch: int = 0,
        batch_size: int = 256,
    ) -> Generator[tuple[list[int], Tensor, list[Any]], None, None]:
        """Returns batches of preprocessed images or, with a `policy`, of augmented views for the given epoch."""
        encoder, array = self.model.encoder, np.array(list(indices), dtype=np.int64)
        size, preprocess = encoder.image_size, None if policy else encoder.preprocess
        return image_batches(
            source, array, size, batch_size, self.workers, preprocess, policy=policy or EVALUATION, epoch=epoch
        )

    def embed_images(self, indices: Iterable[int]) -> ImageEmbeds:
        """Returns the image embeddings of samples; each process computes its shard of them, and returns all."""
        shard = sorted(indices)[self.world.rank :: self.world.size]
        return embed_images(self.model.encoder, self.batches(self.source, shard), self.world.gather_objects)

    def features(
        self, source: Source, indices: np.ndarray, policy: AugmentationPolicy | None = None, epoch: int = 0
    ) -> ImageEmbeds:
        """Returns the image encoder's features of samples, before the projection; sharded as in `embed_images`."""
        shard = sorted(indices.tolist())[self.world.rank :: self.world.size]
        batches = self.batches(source, shard, policy, epoch)
        return image_features(self.model.encoder, batches, self.world.gather_objects)


def labeled_splits(context: EvalContext) -> tuple[Labeled, Labeled | None, Labeled, list[str]]:
    """Returns the train, val (None if empty) and test split of a task that trains, and the class names.

    The test split holds the samples to evaluate.
    """
    train_indices, val_indices = context.train_indices(), context.val_indices()
    labels = context.labels(np.concatenate([context.indices, train_indices, val_indices]))
    labeled = Labeled(context.source, labels.class_of)
    train, val, test = (labeled.subset(indices) for indices in (train_indices, val_indices, context.indices))
    return train, val if len(val_indices) else None, test, labels.classnames


def count_reasons(bad: Iterable[Any]) -> dict[str, int]:
    """Returns the number of bad samples by reason."""
    return dict(Counter(entry.reason for entry in bad))
