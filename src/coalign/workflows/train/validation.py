"""Validation during training on a sample of the held-out pairs, and the final evaluation on all of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coalign.config import TrainConfig
from coalign.data.loading.eval import image_batches
from coalign.data.scenes.source import Scenes
from coalign.data.sources.base import Source
from coalign.data.text.tokenizer import Tokenizer
from coalign.evaluation.compositionality import evaluate_foils
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_images, image_features
from coalign.evaluation.prompts import templates
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.method import Method
from coalign.runs.run import dual_encoder
from coalign.training.distributed import World
from coalign.training.step import evaluate_loss
from coalign.training.trainer import ValidationResult, autocast_dtype
from coalign.types import StepInfo
from coalign.workflows.evaluate.linear_probe import Labeled, probe
from coalign.workflows.evaluate.samples import captions_of, read_labels
from coalign.workflows.train.batches import TrainingData, pair_loader

MAX_TRACKED = 2000  # validation pairs used during training; the final evaluation uses all


def validation(
    method: Method,
    config: TrainConfig,
    pairs: TrainingData,
    tokenizer: Tokenizer,
    world: World,
    tag_ids: Mapping[str, int],
) -> Callable[[StepInfo], ValidationResult] | None:
    """Returns the validation function of a run, or None if there are too few validation pairs.

    It computes loss, retrieval recalls and, if `config.classes` is set, zero-shot accuracy on a fixed sample of the validation pairs. The
    score is the mean recall. Raises UserError if no validation pair (or, for the probe, no training pair) belongs to a class.
    """
    batch_size = min(config.batch_size, len(pairs.val)) // world.size * world.size
    if len(pairs.val) < 2 or batch_size < 2:
        return None
    tracked = np.sort(np.random.default_rng(0).permutation(pairs.val)[:MAX_TRACKED])
    loader = pair_loader(method, config, pairs.val_source, tracked, tokenizer, world, batch_size, tag_ids)
    encoder = dual_encoder(method, tokenizer, config.context_length, "validation")
    autocast = autocast_dtype(config.precision, world.device)
    images: list[Any] = []  # batches of rank 0, decoded in the first validation
    labels = read_labels(pairs.val_source, tracked, config.classes) if config.classes else None
    if config.probe:
        read_labels(pairs.source, pairs.train, config.classes)  # fails before training if no pair belongs to a class

    def validate(step: StepInfo) -> ValidationResult:
        total = 0.0
        for loaded in loader.batches(0, loader.steps_per_epoch):
            total += evaluate_loss(method, loaded.batch.to(world.device), step, world, autocast)
        values = {"val/loss": total / loader.steps_per_epoch}
        recalls: list[float] = []
        if world.is_first:
            if not images:
                size = encoder.image_size
                images.extend(image_batches(pairs.val_source, tracked, size, workers=config.workers or 0))
            embeds = embed_images(encoder, images)
            result = retrieve(encoder, embeds, captions_of(pairs.val_source)).result
            for name, side in (("image_to_text", result.image_to_text), ("text_to_image", result.text_to_image)):
                recalls += [metric.value for metric in side.recall.values()]
                values |= {f"val/{name}_r{k}": metric.value for k, metric in side.recall.items()}
            if labels is not None:
                zero_shot = classify(encoder, embeds, labels.class_of, labels.classnames, templates("default")).result
                values |= {"val/zero_shot_acc1": zero_shot.top1.value}
        score = sum(recalls) / max(1, len(recalls))
        return ValidationResult(values, world.broadcast(score))

    return validate


def evaluate_held_out(
    method: Method, config: TrainConfig, pairs: TrainingData, tokenizer: Tokenizer, name: str
) -> dict[str, Evaluation]:
    """Runs the final evaluation of a run. Returns task -> evaluation.

    On the validation pairs, if there are at least two: "retrieval"; "foils" on scenes; and, if `config.classes` is set, "zero_shot" and
    (with `config.probe`) "probe", which is trained on the training pairs. On each test split NAME: "retrieval_NAME".
    """
    evaluations: dict[str, Evaluation] = {}
    encoder = dual_encoder(method, tokenizer, config.context_length, name)
    size, workers = encoder.image_size, config.workers or 0
    if len(pairs.val) >= 2:
        images = embed_images(encoder, image_batches(pairs.val_source, pairs.val, size, workers=workers))
        evaluations["retrieval"] = retrieve(encoder, images, captions_of(pairs.val_source))
        if isinstance(pairs.val_source, Scenes):
            foils = pairs.val_source.foils(pairs.val)
            evaluations["foils"] = evaluate_foils(encoder, images, foils)
        if config.classes:
            labels = read_labels(pairs.val_source, pairs.val, config.classes)
            evaluations["zero_shot"] = classify(
                encoder, images, labels.class_of, labels.classnames, templates("default")
            )
            if config.probe:
                train = read_labels(pairs.source, pairs.train, config.classes)
                train_labels = Labeled(pairs.source, train.class_of)
                test_labels = Labeled(pairs.val_source, labels.class_of)

                def features(source: Source, indices: np.ndarray) -> ImageEmbeds:
                    return image_features(encoder, image_batches(source, indices, size, workers=workers))

                evaluations["probe"] = probe(features, train_labels, None, test_labels, labels.classnames)
    for split, indices in pairs.test_splits.items():
        images = embed_images(encoder, image_batches(pairs.source, indices, size, workers=workers))
        evaluations[f"retrieval_{split}"] = retrieve(encoder, images, captions_of(pairs.source))
    return evaluations
