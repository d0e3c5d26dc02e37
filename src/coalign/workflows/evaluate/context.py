"""The input and the result of an evaluation task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.loading.eval import image_batches
from coalign.data.loading.samples import sample_key
from coalign.data.sources.base import Source
from coalign.data.sources.benchmarks.classification import ClassificationSource
from coalign.data.text.prompts import class_prompts, templates
from coalign.embeds import take
from coalign.errors import UserError
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_images, image_features, no_readable_image
from coalign.metric import Metric
from coalign.training.distributed import World
from coalign.types import CLIP_PREPROCESS, EVALUATION, AugmentationPolicy
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.evaluate.samples import Labels, Samples, class_labels, read_labels


@dataclass
class TaskResult:
    """The result of a task. Metrics that no model can beat chance on are left out, with a note."""

    metrics: Sequence[Metric]
    bad: Iterable[Any] = ()  # the loader's entry for each unreadable sample
    details: Mapping[str, Any] = field(default_factory=dict)  # what else there is to store, as JSON values
    notes: Sequence[str] = ()  # sentences, such as what was skipped
    main_metric: str | None = None  # the paper's, for its datasets; None: the first that is not a distance
    evaluation: Evaluation | None = None  # the embeddings, which a run's report shows

    def __post_init__(self) -> None:
        if trivial := [metric.title for metric in self.metrics if not metric.can_beat_chance()]:
            self.metrics = [metric for metric in self.metrics if metric.can_beat_chance()]
            reason = "on these samples, a random order already has the best value"
            self.notes = [*self.notes, f"not reported: {', '.join(trivial)} ({reason})"]

    def to_json(self) -> dict[str, Any]:
        unreadable = Counter(entry.reason for entry in self.bad)
        skipped = [f"skipped samples: {count:,} ({reason})" for reason, count in unreadable.items()]
        names = [metric.name for metric in self.metrics if metric.kind != "distance"]
        main_metric = self.main_metric if self.main_metric in names else next(iter(names), None)
        return {
            "main_metric": main_metric,
            "metrics": {metric.name: metric.to_json() for metric in self.metrics},
            "unreadable": dict(unreadable),
            **self.details,
            "notes": [*skipped, *self.notes],
        }


@dataclass
class EvalContext:
    """A model, the samples to evaluate it on, and those that a task may train on."""

    model: EvalModel
    data: str  # as given by the user
    test: Samples  # evaluated
    train: Samples  # for tasks that learn; may be empty
    val: Samples  # to select their settings; may be empty
    config: EvalConfig
    world: World
    _embedded: ImageEmbeds | None = None
    _labels: Labels | None = None

    @property
    def source(self) -> Source:
        return self.test.source

    @property
    def indices(self) -> np.ndarray:
        return self.test.indices

    @property
    def is_benchmark(self) -> bool:
        """Whether the source is one of the papers' datasets, with its own classes."""
        return isinstance(self.source, ClassificationSource) and self.config.classes is None

    @property
    def _has_class_captions(self) -> bool:
        """Whether the captions of the source give the classes, and not the settings."""
        return self.source.classes is not None and self.config.classes is None and self.config.label is None

    def labels(self) -> Labels:
        """Returns the classes of the samples to evaluate."""
        if self._labels is None:
            self._labels = self._read_labels([self.test])[0]
        return self._labels

    def labeled_splits(self) -> tuple[Labels, Labels | None, Labels]:
        """Returns the train, val (None if empty) and test samples with their classes, for a task that trains."""
        test, train, val = self._read_labels([self.test, self.train, self.val])
        if train.classnames != test.classnames or not {*train.class_of.values()} & {*test.class_of.values()}:
            raise UserError(
                f"No training sample of {train.source.name} has one of the classes of {test.source.name}; train on data with these classes."
            )
        return train, val if len(self.val.indices) else None, test

    def _read_labels(self, parts: Sequence[Samples]) -> list[Labels]:
        if self._has_class_captions and all(part.source.classes is not None for part in parts):
            return [class_labels(part) for part in parts]
        if not self.is_benchmark or not all(isinstance(part.source, ClassificationSource) for part in parts):
            return read_labels(parts, self.config.classes, self.config.label, self.config.reading.prompts)
        return [
            Labels(part.source, part.source.classnames, {i: part.source.labels[i] for i in part.indices.tolist()})
            for part in parts
            if isinstance(part.source, ClassificationSource)
        ]

    def templates(self) -> list[str]:
        """Returns the prompts for class names: as set, else those of the captions, else the source's."""
        if self.config.reading.prompts:
            return templates(*self.config.reading.prompts)
        if self._has_class_captions and self.source.classes is not None:
            return list(self.source.classes.templates)
        return templates(*self.source.prompts)

    def class_prompts(self, labels: Labels) -> list[list[str]]:
        """Returns the prompts of each class: its own, else those of `templates` with its name."""
        return class_prompts(labels.classnames, self.templates(), labels.own_prompts, self.is_benchmark)

    def classification(self, metrics: Sequence[Metric], uses_train: bool = True, **values: Any) -> TaskResult:
        """Returns the result of a classification. For the papers' datasets, their metric is the main one, and differences are noted."""
        if not isinstance(self.source, ClassificationSource):
            return TaskResult(metrics, **values)
        differences = self.source.differences(uses_train and self.train.source is self.source)
        notes = [f"differs from the papers' data: {'; '.join(differences)}"] if differences else []
        main_metric = self.source.metric if self.source.metric in {metric.name for metric in metrics} else None
        result = TaskResult(metrics, **values, notes=notes, main_metric=main_metric)
        result.details = {**result.details, "differences": differences}
        return result

    def batches(
        self,
        samples: Samples,
        policy: AugmentationPolicy | None = None,
        epoch: int = 0,
        batch_size: int = 256,
    ) -> Generator[tuple[list[int], Tensor, list[Any]], None, None]:
        """Returns batches of preprocessed images or, with a `policy`, of augmented views for the given epoch."""
        encoder, workers = self.model.encoder, self.config.workers
        preprocess = CLIP_PREPROCESS if policy else encoder.preprocess
        return image_batches(
            samples.source, samples.indices, encoder.image_size, batch_size, workers, preprocess,
            policy=policy or EVALUATION, epoch=epoch,
        )  # fmt: skip

    def embed_images(self, indices: Iterable[int] | None = None) -> ImageEmbeds:
        """Returns the image embeddings of samples to evaluate (default: all, which are embedded once).

        Each process computes its shard of them, and returns all.
        """
        chosen = sorted(self.indices.tolist() if indices is None else indices)
        if self._embedded is None:
            batches = self.batches(self._shard(self.source, chosen))
            own = len(chosen[self.world.rank :: self.world.size])
            images = embed_images(self.model.encoder, batches, self.world.gather_objects, own)
            if len(chosen) == len(self.indices):
                self._embedded = images
            return images
        return self._embedded if len(chosen) == len(self.indices) else self._subset(self._embedded, chosen)

    def _subset(self, images: ImageEmbeds, indices: Sequence[int]) -> ImageEmbeds:
        """Returns the images with the given indices, as if only these had been embedded."""
        kept = set(indices)
        keys = {sample_key(self.source, index) for index in indices} if images.bad else set()
        rows = [row for row, index in enumerate(images.indices) if index in kept]
        bad = [entry for entry in images.bad if entry.key in keys]
        if not rows:
            raise no_readable_image(len(bad))
        return ImageEmbeds(take(images.embeds, rows), [images.indices[row] for row in rows], bad)

    def features(self, samples: Samples, policy: AugmentationPolicy | None = None, epoch: int = 0) -> ImageEmbeds:
        """Returns the image encoder's features of samples, before the projection; sharded as in `embed_images`."""
        shard = self._shard(samples.source, sorted(samples.indices.tolist()))
        batches = self.batches(shard, policy, epoch)
        return image_features(self.model.encoder, batches, self.world.gather_objects, len(shard.indices))

    def _shard(self, source: Source, indices: Sequence[int]) -> Samples:
        return Samples(source, np.array(indices[self.world.rank :: self.world.size], dtype=np.int64))
