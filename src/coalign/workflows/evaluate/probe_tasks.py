"""The tasks that train a small model on frozen image features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from coalign.evaluation.embed import Evaluation, ImageEmbeds
from coalign.evaluation.probes.accuracy import FeatureSplit
from coalign.evaluation.probes.few_shot import DRAWS, few_shot
from coalign.evaluation.probes.knn import knn
from coalign.evaluation.probes.linear import linear_probe
from coalign.evaluation.probes.sgd import sgd_probe
from coalign.evaluation.probes.tagging import tagging
from coalign.evaluation.probes.vse import vse
from coalign.metric import Metric
from coalign.types import AugmentationPolicy
from coalign.workflows.evaluate.context import EvalContext, TaskResult
from coalign.workflows.evaluate.samples import Labels, Samples, captions_of, tags_of

SLIP_POLICY = AugmentationPolicy(crop_scale=(0.08, 1.0), flip_p=0.5)  # views of SLIP's linear probe

# (train, val, test, number of classes) -> metrics, details
Probe = Callable[[FeatureSplit, FeatureSplit, FeatureSplit, int], tuple[list[Metric], dict[str, Any]]]


def linear(context: EvalContext) -> TaskResult:
    def fit(
        train: FeatureSplit, val: FeatureSplit, test: FeatureSplit, num_classes: int
    ) -> tuple[list[Metric], dict[str, Any]]:
        result = linear_probe(train, val, test, num_classes)
        return result.metrics, {"penalty": result.penalty}

    return _probe(context, fit)


def mct_probe(context: EvalContext) -> TaskResult:
    def fit(
        train: FeatureSplit, val: FeatureSplit, test: FeatureSplit, num_classes: int
    ) -> tuple[list[Metric], dict[str, Any]]:
        train_val = _concatenate(train, val)
        return sgd_probe("mct", lambda epoch: train_val, test, num_classes), {}

    return _probe(context, fit)


def slip_probe(context: EvalContext) -> TaskResult:
    """Encodes random crops and flips of the train and val splits anew for every epoch."""
    train, val, test = context.labeled_splits()
    test_features, images = labeled_features(context.features, test)
    bad = list(images.bad)

    def train_features(epoch: int) -> FeatureSplit:
        features = partial(context.features, policy=SLIP_POLICY, epoch=epoch)
        splits = [labeled_features(features, labels) for labels in (train, val) if labels is not None]
        if epoch == 0:
            bad.extend(entry for _, images in splits for entry in images.bad)
        return reduce(_concatenate, (split for split, _ in splits))

    metrics = sgd_probe("slip", train_features, test_features, len(test.classnames))
    return context.classification(metrics, bad=bad)


def nearest_neighbors(context: EvalContext) -> TaskResult:
    return _probe(context, lambda train, val, test, num_classes: (knn(_concatenate(train, val), test, num_classes), {}))


def few_shot_probes(context: EvalContext) -> TaskResult:
    def fit(
        train: FeatureSplit, val: FeatureSplit, test: FeatureSplit, num_classes: int
    ) -> tuple[list[Metric], dict[str, Any]]:
        result = few_shot(train, val, test, num_classes)
        return result.metrics, {"draws": DRAWS, "over_draws": result.over_draws}

    return _probe(context, fit)


def _probe(context: EvalContext, fit: Probe) -> TaskResult:
    """Runs a probe on the features of the train, val and test splits; without a val split, a fifth of train serves as one."""
    train, val, test = context.labeled_splits()
    train, val = (train, val) if val is not None else train.train_val_split()
    splits = [labeled_features(context.features, labels) for labels in (train, val, test)]
    train_features, val_features, test_features = (split for split, _ in splits)
    metrics, details = fit(train_features, val_features, test_features, len(test.classnames))
    bad = [entry for _, images in splits for entry in images.bad]
    evaluation = Evaluation(metrics, splits[-1][1], test.classnames)
    return context.classification(metrics, bad=bad, details=details, evaluation=evaluation)


def labeled_features(features: Callable[[Samples], ImageEmbeds], labels: Labels) -> tuple[FeatureSplit, ImageEmbeds]:
    """Returns the features and classes of the readable samples, and their images; both are empty if there are no samples."""
    if not labels.class_of:  # the probes raise the error
        images = ImageEmbeds(torch.empty(0, 1), [])
    else:
        images = features(Samples(labels.source, np.array(sorted(labels.class_of))))
    classes = np.array([labels.class_of[index] for index in images.indices], dtype=np.int64)
    return (images.embeds.numpy(), classes), images


def _concatenate(first: FeatureSplit, second: FeatureSplit) -> FeatureSplit:
    if not len(first[1]) or not len(second[1]):  # empty features have the wrong width
        return first if len(first[1]) else second
    return np.concatenate([first[0], second[0]]), np.concatenate([first[1], second[1]])


def vse_retrieval(context: EvalContext) -> TaskResult:
    train, test = context.features(context.train), context.features(context.test)
    result = vse(train, test, captions_of(context.train.source), captions_of(context.source)).result
    return TaskResult(result.metrics(), [*train.bad, *test.bad], result.details())


def tags(context: EvalContext) -> TaskResult:
    train, test = (_with_tags(context, samples) for samples in (context.train, context.test))
    result = tagging(train[:2], test[:2])
    notes, details = [], {"tags": result.num_tags, "untagged": result.untagged}
    if result.untagged:
        reason = f"without any of the {result.num_tags:,} tags that occur on at least two training samples"
        notes.append(f"skipped samples: {result.untagged:,} ({reason})")
    return TaskResult(result.metrics, [*train[2], *test[2]], details, notes)


def _with_tags(context: EvalContext, samples: Samples) -> tuple[np.ndarray, list[Sequence[str]], list[Any]]:
    images = context.features(samples)
    return images.embeds.numpy(), [tags_of(samples.source, index) for index in images.indices], images.bad
