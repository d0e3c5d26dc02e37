"""Validation during training on a sample of the held-out pairs, and the final evaluation on all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from coalign.config import TrainConfig
from coalign.data.loading.cached_views import NOTHING_CACHED
from coalign.data.loading.eval import image_batches
from coalign.data.loading.samples import BadEntry
from coalign.data.sources.base import Source
from coalign.data.splits import look_alikes_in_train
from coalign.data.text.prompts import class_prompts, templates
from coalign.data.text.tokenizer import Tokenizer
from coalign.evaluation.embed import embed_images
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.method import Method
from coalign.runs.folder import WITHOUT_LOOK_ALIKES
from coalign.runs.run import dual_encoder
from coalign.training.distributed import World
from coalign.training.step import evaluate_loss
from coalign.training.trainer import ValidationResult, autocast_dtype
from coalign.types import DualEncoder, StepInfo
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.context import EvalContext, TaskResult
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.evaluate.needs import unmet_need
from coalign.workflows.evaluate.samples import Samples, captions_of, class_labels, read_labels
from coalign.workflows.evaluate.tasks import TASKS
from coalign.workflows.train.batches import TrainingData, pair_loader
from coalign.workflows.train.caches.features import RunFeatures
from coalign.workflows.train.caches.images import RunImageCache


def validation(
    method: Method,
    config: TrainConfig,
    pairs: TrainingData,
    tokenizer: Tokenizer,
    world: World,
    tag_ids: Mapping[str, int],
    features: RunFeatures,
    kept: RunImageCache,
) -> Callable[[StepInfo], ValidationResult] | None:
    """Returns the validation function of a run, or None if there are too few validation pairs.

    It computes loss, retrieval recalls and, if there are classes, zero-shot accuracy on a fixed sample of the validation pairs. The score
    is the mean recall; if the captions are class labels, it is the accuracy. Raises UserError if no validation pair (or, for the probe,
    no training pair) belongs to a class.
    """
    batch_size = min(config.batch_size, len(pairs.val)) // world.size * world.size
    if len(pairs.val) < 2 or batch_size < 2:
        return None
    tracked = pairs.tracked
    cached = features.views("val", pairs.val_source, tracked, tag_ids) if config.evals else NOTHING_CACHED
    cache = kept.cache if pairs.has_own_val else None
    loader = pair_loader(
        method, config, pairs.val_source, tracked, tokenizer, world, batch_size, tag_ids, cache, cached
    )
    encoder = features.remembering(dual_encoder(method, tokenizer, "validation"))
    autocast = autocast_dtype(config.precision, world.device)
    images: list[Any] = []  # batches of rank 0, decoded in the first validation; of a locked tower, its features
    tracked_samples = Samples(pairs.val_source, tracked)
    labels, given = None, templates(*(config.reading.prompts or pairs.val_source.prompts))
    if config.classes:
        labels = read_labels([tracked_samples], config.classes, prompts=config.reading.prompts)[0]
    elif pairs.val_source.classes is not None:
        labels, given = class_labels(tracked_samples), list(pairs.val_source.classes.templates)
    prompts = [] if labels is None else class_prompts(labels.classnames, given, labels.own_prompts)
    if config.probe:
        # fails before training if no pair belongs to a class
        read_labels([Samples(pairs.source, pairs.train)], config.classes)

    def validate(step: StepInfo) -> ValidationResult:
        total = 0.0
        with closing(loader.batches(0, loader.steps_per_epoch)) as batches:
            for loaded in batches:
                total += evaluate_loss(method, loaded.batch.to(world.device), step, world, autocast)
        values = {"val/loss": total / loader.steps_per_epoch}
        if world.is_first:
            if not images:
                images.extend(_image_batches(encoder, tracked_samples, config, features))
            embeds = embed_images(encoder, images, total=len(tracked))
            result = retrieve(encoder, embeds, captions_of(pairs.val_source)).result
            recalls = [each for each in result.metrics() if each.kind == "rate" and each.can_beat_chance()]
            values |= {f"val/{metric.name.replace('.', '_')}": metric.value for metric in recalls}
            if labels is not None:
                zero_shot = classify(encoder, embeds, labels.class_of, labels.classnames, prompts).result
                values["val/zero_shot_acc1"] = zero_shot.metrics[0].value
        score = "val/mean_recall" if pairs.val_source.classes is None else "val/zero_shot_acc1"
        return ValidationResult(values, world.broadcast(values.get(score, 0.0)))

    return validate


def _image_batches(
    encoder: DualEncoder, samples: Samples, config: TrainConfig, features: RunFeatures
) -> Iterator[tuple[list[int], Tensor, list[BadEntry]]]:
    """Yields the batches of `image_batches`, of a cached image tower with its features instead of pixels."""
    size, workers = encoder.image_size, config.workers or 0
    batches = image_batches(samples.source, samples.indices, size, workers=workers, preprocess=encoder.preprocess)
    for indices, pixels, bad in batches:
        yield indices, features.encoded(pixels), bad


@dataclass(frozen=True)
class HeldOutResult:
    """The result of a task at the end of a run, and the source of its samples."""

    source: Source
    result: TaskResult
    split: str = "val"
    look_alikes: tuple[int, int] | None = None  # samples with an image like one in training, samples; None: not counted


def evaluate_held_out(
    method: Method, config: TrainConfig, pairs: TrainingData, tokenizer: Tokenizer, name: str
) -> dict[str, HeldOutResult]:
    """Runs the final evaluation of a run, by the tasks of `coalign eval`. Returns task -> result.

    On the validation pairs, if there are at least two: "retrieval"; "foils", if the data has them; and, if `config.classes` is set or the
    captions are class labels, "zeroshot" and (with `config.probe`) "probe", which is trained on the training pairs. On each test split
    NAME: "retrieval_NAME" and, if the captions are class labels, "zeroshot_NAME". If some of the pairs of a retrieval task have look-alikes
    in training, also "TASK_without_look_alikes", on the others.
    """
    encoder = dual_encoder(method, tokenizer, name)
    device = next(method.parameters()).device
    settings = EvalConfig(classes=config.classes, workers=config.workers or 0, reading=config.reading)
    none = np.empty(0, dtype=np.int64)

    def context(source: Source, indices: np.ndarray) -> EvalContext:
        return EvalContext(
            EvalModel(encoder), source.name, Samples(source, indices), Samples(pairs.source, pairs.train),
            Samples(pairs.source, none), settings, World(0, 1, device),
        )  # fmt: skip

    def without_look_alikes(task: str, title: str, source: Source, indices: np.ndarray) -> None:
        """Counts the look-alikes in training of a retrieval task's pairs, and evaluates it without them."""
        found = look_alikes_in_train(pairs.source, pairs.train, source, indices) if config.group_look_alikes else None
        if found is None:
            return
        results[task] = replace(results[task], look_alikes=(int(found.sum()), len(found)))
        if found.any() and np.count_nonzero(~found) >= 2:
            result = TASKS["retrieval"].load()(context(source, indices[~found]))
            result.metrics = [metric.prefixed(title) for metric in result.metrics]
            results[task + WITHOUT_LOOK_ALIKES] = HeldOutResult(source, result)

    results: dict[str, HeldOutResult] = {}
    if len(pairs.val) >= 2:
        held_out = context(pairs.val_source, pairs.val)
        names = ["retrieval", *(["foils"] if unmet_need(TASKS["foils"], held_out) is None else [])]
        if pairs.val_source.classes is not None:
            names.insert(0, "zeroshot")  # the first task is in the headline
        elif config.classes:
            names.append("zeroshot")
        names += ["probe"] if config.probe else []
        for task in (TASKS[name] for name in names):
            results[task.name] = HeldOutResult(pairs.val_source, task.load()(held_out))
        without_look_alikes("retrieval", "Without look-alikes", pairs.val_source, pairs.val)
    for split, indices in pairs.test_splits.items():
        title = split.replace("_", " ").capitalize()
        for kind in ("retrieval", *(["zeroshot"] if pairs.source.classes is not None else [])):
            result = TASKS[kind].load()(context(pairs.source, indices))
            result.metrics = [metric.prefixed(title) for metric in result.metrics]
            results[f"{kind}_{split}"] = HeldOutResult(pairs.source, result, split)
        without_look_alikes(f"retrieval_{split}", f"{title} without look-alikes", pairs.source, indices)
    return results
