"""What a run is evaluated on: its held-out pairs, a part of them during training, all of them at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from coalign.config import TrainConfig
from coalign.data.evaluation_views import image_batches
from coalign.data.scenes import Scenes
from coalign.data.tokenizer import Tokenizer
from coalign.evaluation.compositionality import choose_captions
from coalign.evaluation.embed import Evaluation, ImageEmbeds, embed_images, image_features
from coalign.evaluation.prompts import templates
from coalign.evaluation.retrieval import retrieve
from coalign.evaluation.zero_shot import classify
from coalign.method import Method
from coalign.run import model as runs
from coalign.run.pairs import Data, pair_loader
from coalign.run.probe import Labelled, probe
from coalign.run.samples import captions_of, label_function
from coalign.training.distributed import World
from coalign.training.step import evaluate_loss
from coalign.training.trainer import Score, autocast_dtype
from coalign.types import Source, StepInfo

MAX_TRACKED = 2000  # validation pairs that are followed during training; the final evaluation takes all


def validation(
    method: Method, config: TrainConfig, pairs: Data, tokenizer: Tokenizer, world: World, tag_ids: Mapping[str, int]
) -> Callable[[StepInfo], Score] | None:
    """Loss, retrieval, and zero-shot on the user's classes, over the first validation pairs in a fixed order. None if there are too few."""
    batch_size = min(config.batch_size, len(pairs.val)) // world.size * world.size
    if len(pairs.val) < 2 or batch_size < 2:
        return None
    tracked = np.sort(np.random.default_rng(0).permutation(pairs.val)[:MAX_TRACKED])
    losses = pair_loader(method, config, pairs.val_source, tracked, tokenizer, world, batch_size, tag_ids)
    encoder = runs.dual_encoder(method, tokenizer, config.context_length, "validation")
    autocast = autocast_dtype(config.precision, world.device)
    images: list[Any] = []  # of the first rank, decoded at the first validation
    labels = label_function(pairs.val_source, tracked, config.classes) if config.classes else None
    if config.probe:
        label_function(pairs.source, pairs.train, config.classes)  # says so before the training if there are none

    def validate(step: StepInfo) -> Score:
        total = 0.0
        for loaded in losses.batches(0, losses.steps_per_epoch):
            total += evaluate_loss(method, loaded.batch.to(world.device), step, world, autocast)
        values = {"val/loss": total / losses.steps_per_epoch}
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
                zero_shot = classify(encoder, embeds, labels.of_index, labels.classnames, templates("default")).result
                values |= {"val/zero_shot_acc1": zero_shot.top1.value}
        score = sum(recalls) / max(1, len(recalls))
        return Score(values, world.broadcast(score))

    return validate


def evaluate_held_out(
    method: Method, config: TrainConfig, pairs: Data, tokenizer: Tokenizer, name: str
) -> dict[str, Evaluation]:
    """Retrieval among all held-out pairs, and in each of the test splits ("retrieval_" and its name); scenes' foils; on the user's classes
    zero-shot and a probe that learns from the training pairs. Nothing of less than two pairs."""
    evaluations: dict[str, Evaluation] = {}
    encoder = runs.dual_encoder(method, tokenizer, config.context_length, name)
    size, workers = encoder.image_size, config.workers or 0
    if len(pairs.val) >= 2:
        images = embed_images(encoder, image_batches(pairs.val_source, pairs.val, size, workers=workers))
        evaluations["retrieval"] = retrieve(encoder, images, captions_of(pairs.val_source))
        if isinstance(pairs.val_source, Scenes):
            foils = pairs.val_source.foils(pairs.val)
            evaluations["foils"] = choose_captions(encoder, images, foils)
        if config.classes:
            labels = label_function(pairs.val_source, pairs.val, config.classes)
            evaluations["zero_shot"] = classify(
                encoder, images, labels.of_index, labels.classnames, templates("default")
            )
            if config.probe:
                train = label_function(pairs.source, pairs.train, config.classes)
                learnt, test = Labelled(pairs.source, train.of_index), Labelled(pairs.val_source, labels.of_index)

                def features(source: Source, indices: np.ndarray) -> ImageEmbeds:
                    return image_features(encoder, image_batches(source, indices, size, workers=workers))

                evaluations["probe"] = probe(features, learnt, None, test, labels.classnames)
    for split, indices in pairs.tests.items():
        images = embed_images(encoder, image_batches(pairs.source, indices, size, workers=workers))
        evaluations[f"retrieval_{split}"] = retrieve(encoder, images, captions_of(pairs.source))
    return evaluations
