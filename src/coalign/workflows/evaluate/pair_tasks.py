"""The tasks that compare images with texts: retrieval, zero-shot classification, foils, pairs of images, guidance."""

from __future__ import annotations

import numpy as np

from coalign.data.scenes.source import Scenes
from coalign.data.sources.benchmarks.sugarcrepe import SugarCrepe
from coalign.evaluation.compositionality import evaluate_foils, evaluate_pairs
from coalign.evaluation.guidance import bootstrapped_guidance
from coalign.evaluation.retrieval import retrieve, retrieve_in_folds
from coalign.evaluation.zero_shot import MAX_MATRIX, classify
from coalign.workflows.evaluate.context import EvalContext, TaskResult
from coalign.workflows.evaluate.samples import Labels, Samples, captions_of


def retrieval(context: EvalContext) -> TaskResult:
    images = context.embed_images()
    evaluation = retrieve(context.model.encoder, images, captions_of(context.source))
    result = evaluation.result
    return TaskResult(result.metrics(), images.bad, result.details(), evaluation=evaluation)


def retrieval_in_folds(context: EvalContext) -> TaskResult:
    images = context.embed_images()
    result = retrieve_in_folds(context.model.encoder, images, captions_of(context.source), context.indices)
    notes = [f"{result.num_images:,} images in {result.num_folds} folds"]
    if result.left_over:
        notes.append(f"skipped samples: {result.left_over:,} (beyond the last whole fold)")
    details = {"folds": result.num_folds, "images": result.num_images, "left_over": result.left_over}
    return TaskResult(result.metrics, images.bad, details, notes)


def zero_shot(context: EvalContext) -> TaskResult:
    labels = context.labels()
    images = context.embed_images(labels.class_of)
    encoder, prompts = context.model.encoder, context.class_prompts(labels)
    evaluation = classify(encoder, images, labels.class_of, labels.classnames, prompts)
    result, bad = evaluation.result, evaluation.images.bad
    details = {
        "unlabeled": labels.unlabeled,
        "per_class": result.per_class_recalls(),
        "most_confused": result.most_confused(),
    }
    if len(labels.classnames) <= MAX_MATRIX:
        details["confusion"] = result.confusion.tolist()
    answer = context.classification(result.metrics, uses_train=False, bad=bad, details=details, evaluation=evaluation)
    answer.notes = [*_unlabeled(labels), *answer.notes]
    return answer


def bootstrap(context: EvalContext) -> TaskResult:
    labels = context.labels()
    batches = list(context.batches(Samples(context.source, np.array(sorted(labels.class_of)))))
    encode_joint, prompts = context.model.joint_encoder(), context.class_prompts(labels)
    metrics = bootstrapped_guidance(context.model.encoder, encode_joint, batches, labels.class_of, prompts)
    bad = [entry for _, _, batch_bad in batches for entry in batch_bad]
    return TaskResult(metrics, bad, {"unlabeled": labels.unlabeled}, _unlabeled(labels))


def _unlabeled(labels: Labels) -> list[str]:
    return [f"skipped samples: {labels.unlabeled:,} (without one of the classes)"] if labels.unlabeled else []


def foils(context: EvalContext) -> TaskResult:
    source = context.source
    assert isinstance(source, (Scenes, SugarCrepe))  # the task needs it
    items = source.foils(context.indices)
    images = context.embed_images({foil.index for foil in items})
    evaluation = evaluate_foils(context.model.encoder, images, items)
    return TaskResult(evaluation.result, images.bad, evaluation=evaluation)


def image_pairs(context: EvalContext) -> TaskResult:
    images, captions = context.embed_images(), captions_of(context.source)
    metrics = evaluate_pairs(context.model.encoder, images, lambda index: captions(index)[0])
    return TaskResult(metrics, images.bad)
