"""What a task is asked: a model, and samples of a source."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.classification import ClassificationSource
from coalign.data.evaluation_views import image_batches
from coalign.evaluation.embed import ImageEmbeds, embed_images, image_features
from coalign.evaluation.prompts import templates
from coalign.run.probe import Labelled
from coalign.run.samples import Labels, label_function
from coalign.run.subject import Subject
from coalign.training.distributed import World
from coalign.types import EVALUATION, AugmentationPolicy, Source


@dataclass
class Question:
    """What a task is asked of: a model, and samples of a source with, for some tasks, their classes."""

    subject: Subject
    source: Source
    indices: np.ndarray
    classes: Path | None
    label: str | None
    prompts: str | None
    workers: int
    world: World
    epochs: int = 10  # of fine-tuning

    def labels(self, indices: np.ndarray | None = None) -> Labels:
        chosen = self.indices if indices is None else indices
        if isinstance(self.source, ClassificationSource) and self.is_named:
            return Labels(self.source.classnames, {i: self.source.labels[i] for i in chosen.tolist()}, 0)
        return label_function(self.source, chosen, self.classes, self.label)

    @property
    def is_named(self) -> bool:
        """Whether it is of one of the papers' data sets, with its own classes."""
        return isinstance(self.source, ClassificationSource) and self.classes is None

    def templates(self) -> list[str]:
        own = self.source.prompts if isinstance(self.source, ClassificationSource) else "default"
        return templates(self.prompts or own)

    def of_data_set(self, learning: bool = True) -> dict[str, Any]:
        """What is to be said of one of the named data sets: the papers' figure of it, and what differs from theirs."""
        if not isinstance(self.source, ClassificationSource):
            return {}
        return {"main_metric": self.source.metric, "differences": self.source.differences(learning)}

    def rest(self) -> np.ndarray:
        """What can be learnt from: the source's train part, or what was not asked for."""
        own: dict[str, np.ndarray] = getattr(self.source, "splits", None) or {}
        return np.setdiff1d(own.get("train", np.arange(len(self.source))), self.indices)

    def val(self) -> np.ndarray:
        """The source's validation part, without what is asked for; none where it has none."""
        own: dict[str, np.ndarray] = getattr(self.source, "splits", None) or {}
        return np.setdiff1d(own.get("val", np.empty(0, np.int64)), self.indices)

    def batches(
        self,
        source: Source,
        indices: Iterable[int],
        policy: AugmentationPolicy | None = None,
        epoch: int = 0,
        batch_size: int = 256,
    ) -> Generator[tuple[list[int], Tensor, list[Any]], None, None]:
        """The images as the model is to see them, or the views of a policy and epoch."""
        model, chosen = self.subject.encoder, np.array(list(indices), dtype=np.int64)
        size, preprocess = model.image_size, None if policy else model.preprocess
        return image_batches(
            source, chosen, size, batch_size, self.workers, preprocess, policy=policy or EVALUATION, epoch=epoch
        )

    def images(self, indices: Iterable[int]) -> ImageEmbeds:
        """Embeddings; every process makes its share of them, and has all."""
        own = sorted(indices)[self.world.rank :: self.world.size]
        return embed_images(self.subject.encoder, self.batches(self.source, own), self.world.gather_objects)

    def features(
        self, source: Source, indices: np.ndarray, policy: AugmentationPolicy | None = None, epoch: int = 0
    ) -> ImageEmbeds:
        """The same of the image encoder's features."""
        own = sorted(indices.tolist())[self.world.rank :: self.world.size]
        batches = self.batches(source, own, policy, epoch)
        return image_features(self.subject.encoder, batches, self.world.gather_objects)


def parts(asked: Question) -> tuple[Labelled, Labelled | None, Labelled, list[str]]:
    """The asked samples are the test part; what a classifier learns from is the source's train part, or what was not asked for; its
    validation part, if it has one, is for choosing. And the names of the classes."""
    rest, val = asked.rest(), asked.val()
    labels = asked.labels(np.concatenate([asked.indices, rest, val]))
    found = Labelled(asked.source, labels.of_index)
    train, held_out, test = (found.among(indices) for indices in (rest, val, asked.indices))
    return train, held_out if len(val) else None, test, labels.classnames


def counted(bad: Iterable[Any]) -> dict[str, int]:
    """Bad samples by reason."""
    return dict(Counter(entry.reason for entry in bad))
