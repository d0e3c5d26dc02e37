"""The evaluation tasks: one function per kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import numpy as np

from coalign.data.scenes.source import Scenes
from coalign.data.sources.benchmarks.sugarcrepe import SugarCrepe
from coalign.data.sources.benchmarks.winoground import Winoground
from coalign.errors import UserError
from coalign.evaluation.compositionality import evaluate_foils, evaluate_pairs
from coalign.evaluation.embed import ImageEmbeds
from coalign.evaluation.guidance import bootstrapped_guidance
from coalign.evaluation.probes.accuracy import AccuracyResult, FeatureSplit
from coalign.evaluation.probes.few_shot import few_shot
from coalign.evaluation.probes.knn import knn
from coalign.evaluation.probes.sgd import sgd_probe
from coalign.evaluation.probes.tagging import tagging
from coalign.evaluation.probes.vse import vse
from coalign.evaluation.retrieval import retrieve, retrieve_in_folds
from coalign.evaluation.zero_shot import classify
from coalign.types import AugmentationPolicy
from coalign.workflows.evaluate.context import EvalContext, count_reasons, labeled_splits
from coalign.workflows.evaluate.finetune_tasks import fine_tune_classifier, fine_tune_encoders
from coalign.workflows.evaluate.linear_probe import labeled_features, probe
from coalign.workflows.evaluate.samples import captions_of, tags_of

SLIP_POLICY = AugmentationPolicy(crop_scale=(0.08, 1.0), flip_p=0.5)  # views of SLIP's linear probe


def _retrieval(context: EvalContext) -> dict[str, Any]:
    images = context.embed_images(context.indices.tolist())
    result = retrieve(context.model.encoder, images, captions_of(context.source)).result
    return {"unreadable": count_reasons(images.bad), **result.to_json()}


def _retrieval_in_folds(context: EvalContext) -> dict[str, Any]:
    images = context.embed_images(context.indices.tolist())
    result = retrieve_in_folds(context.model.encoder, images, captions_of(context.source), context.indices)
    return {"unreadable": count_reasons(images.bad), **result.to_json()}


def _zero_shot(context: EvalContext) -> dict[str, Any]:
    labels = context.labels()
    images = context.embed_images(labels.class_of)
    encoder, names, prompts = context.model.encoder, labels.classnames, context.templates()
    evaluation = classify(encoder, images, labels.class_of, names, prompts, allow_duplicates=context.is_benchmark)
    counts = {"unreadable": count_reasons(evaluation.images.bad), "unlabeled": labels.unlabeled}
    return {**counts, **evaluation.result.to_json(), **context.benchmark_info(uses_train=False)}


def _bootstrap(context: EvalContext) -> dict[str, Any]:
    encode_joint = context.model.joint_encoder()  # first, as it raises if there is none
    labels = context.labels()
    batches = list(context.batches(context.source, sorted(labels.class_of)))
    names, prompts = labels.classnames, context.templates()
    result = bootstrapped_guidance(context.model.encoder, encode_joint, batches, labels.class_of, names, prompts)
    bad = [entry for _, _, batch_bad in batches for entry in batch_bad]
    return {"unreadable": count_reasons(bad), "unlabeled": labels.unlabeled, **result.to_json()}


def _probe(context: EvalContext) -> dict[str, Any]:
    train, val, test, classnames = labeled_splits(context)
    evaluation = probe(context.features, train, val, test, classnames)
    unreadable = count_reasons(evaluation.images.bad)
    return {"unreadable": unreadable, **evaluation.result.to_json(), **context.benchmark_info()}


def _mct_probe(context: EvalContext) -> dict[str, Any]:
    def fit(train: FeatureSplit, val: FeatureSplit, test: FeatureSplit, num_classes: int) -> AccuracyResult:
        train_val = _concatenate(train, val)
        return sgd_probe("mct", lambda epoch: train_val, test, num_classes)

    return _run_on_features(context, fit)


def _slip_probe(context: EvalContext) -> dict[str, Any]:
    """Encodes random crops and flips of the train and val splits anew for every epoch."""
    train, val, test, classnames = labeled_splits(context)
    test_features, images = labeled_features(context.features, test)
    bad = list(images.bad)

    def train_features(epoch: int) -> FeatureSplit:
        features = partial(context.features, policy=SLIP_POLICY, epoch=epoch)
        splits = [labeled_features(features, labeled) for labeled in (train, val) if labeled is not None]
        if epoch == 0:
            bad.extend(entry for _, images in splits for entry in images.bad)
        return reduce(_concatenate, (split for split, _ in splits))

    result = sgd_probe("slip", train_features, test_features, len(classnames))
    return {"unreadable": count_reasons(bad), **result.to_json(), **context.benchmark_info()}


def _knn(context: EvalContext) -> dict[str, Any]:
    return _run_on_features(
        context, lambda train, val, test, num_classes: knn(_concatenate(train, val), test, num_classes)
    )


def _few_shot(context: EvalContext) -> dict[str, Any]:
    return _run_on_features(context, few_shot)


def _run_on_features(
    context: EvalContext, classify: Callable[[FeatureSplit, FeatureSplit, FeatureSplit, int], Any]
) -> dict[str, Any]:
    """Runs a classifier on the features of the train, val and test splits; without a val split, a fifth of train serves as one."""
    train, val, test, classnames = labeled_splits(context)
    train, val = (train, val) if val is not None else train.train_val_split()
    splits = [labeled_features(context.features, labeled) for labeled in (train, val, test)]
    train_features, val_features, test_features = (split for split, _ in splits)
    result = classify(train_features, val_features, test_features, len(classnames))
    unreadable = count_reasons(entry for _, images in splits for entry in images.bad)
    return {"unreadable": unreadable, **result.to_json(), **context.benchmark_info()}


def _concatenate(first: FeatureSplit, second: FeatureSplit) -> FeatureSplit:
    if not len(first[1]) or not len(second[1]):  # empty features have the wrong width
        return first if len(first[1]) else second
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def _vse(context: EvalContext) -> dict[str, Any]:
    train, test = _train_and_test_features(context)
    result = vse(train, test, captions_of(context.source)).result
    return {"unreadable": count_reasons([*train.bad, *test.bad]), **result.to_json(), "task": "vse"}


def _tagging(context: EvalContext) -> dict[str, Any]:
    splits = _train_and_test_features(context)
    train, test = ((s.embeds.numpy(), [tags_of(context.source, index) for index in s.indices]) for s in splits)
    unreadable = count_reasons(entry for split in splits for entry in split.bad)
    return {"unreadable": unreadable, **tagging(train, test).to_json()}


def _train_and_test_features(context: EvalContext) -> list[ImageEmbeds]:
    return [context.features(context.source, indices) for indices in (context.train_indices(), context.indices)]


def _foils(context: EvalContext) -> dict[str, Any]:
    if not isinstance(context.source, (Scenes, SugarCrepe)):
        raise UserError(f"{context.source.name} has no false captions; use scenes:… or sugarcrepe:FOLDER.")
    options = {"per_kind": 2000} if isinstance(context.source, Scenes) else {}
    foils = context.source.foils(context.indices, **options)
    images = context.embed_images({foil.index for foil in foils})
    result = evaluate_foils(context.model.encoder, images, foils).result
    return {"unreadable": count_reasons(images.bad), **result.to_json()}


def _pairs(context: EvalContext) -> dict[str, Any]:
    if not isinstance(context.source, Winoground):
        raise UserError(f"{context.source.name} has no pairs of images with two captions; use winoground:FOLDER.")
    images, captions = context.embed_images(context.indices.tolist()), captions_of(context.source)
    result = evaluate_pairs(context.model.encoder, images, lambda index: captions(index)[0])
    return {"unreadable": count_reasons(images.bad), **result.to_json()}


TASKS: Mapping[str, Callable[[EvalContext], dict[str, Any]]] = {
    "retrieval": _retrieval,
    "retrieval-1k": _retrieval_in_folds,
    "zeroshot": _zero_shot,
    "bootstrap": _bootstrap,
    "probe": _probe,
    "probe-mct": _mct_probe,
    "probe-slip": _slip_probe,
    "fewshot": _few_shot,
    "knn": _knn,
    "tagging": _tagging,
    "vse": _vse,
    "finetune": fine_tune_classifier,
    "finetune-retrieval": fine_tune_encoders,
    "foils": _foils,
    "pairs": _pairs,
}


# tasks that train on samples other than those they are evaluated on
TRAINING_TASKS = (
    "probe", "probe-mct", "probe-slip", "fewshot", "knn", "tagging", "vse", "finetune", "finetune-retrieval",
)  # fmt: skip
