"""The fine-tuning tasks: the image encoder for classification, both encoders for retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from coalign.errors import UserError
from coalign.evaluation.embed import Batches
from coalign.evaluation.finetune import classification as finetune
from coalign.evaluation.finetune.classification import Classifier, evaluate_interpolated, fine_tune
from coalign.evaluation.finetune.retrieval import Retriever, evaluate_interpolated_retrieval, fine_tune_retrieval
from coalign.evaluation.zero_shot import class_weights
from coalign.types import AugmentationPolicy
from coalign.workflows.evaluate.context import EvalContext, count_reasons, labeled_splits
from coalign.workflows.evaluate.samples import captions_of

CLASSIFICATION_POLICY = AugmentationPolicy(crop_scale=(0.5, 1.0), flip_p=0.5)
RETRIEVAL_POLICY = AugmentationPolicy(crop_scale=(0.5, 1.0))  # no flips: captions name left and right


def fine_tune_classifier(context: EvalContext) -> dict[str, Any]:
    """Fine-tunes from the zero-shot classifier on the train and val splits, or on all samples that are not evaluated."""
    encoder, device = context.model.encoder, context.world.device
    image, _ = _modules(context)
    train, val, test, classnames = labeled_splits(context)
    labels = {**train.class_of, **(val.class_of if val else {})}
    if not labels or not test.class_of:
        split = "test" if labels else "train"
        raise UserError(f"There is nothing to fine-tune on: the {split} split has no samples with a class.")
    weights = class_weights(encoder, classnames, context.templates(), allow_duplicates=context.is_benchmark).to(device)
    classifier = Classifier(image.to(device), weights, encoder.logit_scale, encoder.image_size)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    config = finetune.recipe(len(labels), context.epochs)
    views = _TrainViews(context, sorted(labels), config.batch_size, CLASSIFICATION_POLICY)
    fine_tune(classifier, views, len(labels), labels, config, device)
    test_batches = list(context.batches(context.source, sorted(test.class_of)))
    result = evaluate_interpolated(classifier, start, test_batches, test.class_of, len(classnames), device)
    bad = [*views.bad, *(entry for _, _, batch_bad in test_batches for entry in batch_bad)]
    return {"unreadable": count_reasons(bad), **result.to_json(), **context.benchmark_info()}


def fine_tune_encoders(context: EvalContext) -> dict[str, Any]:
    """Fine-tunes both encoders for retrieval on the pairs of the train and val splits, or on all pairs that are not evaluated."""
    encoder, device = context.model.encoder, context.world.device
    image, text = _modules(context)
    captions = captions_of(context.source)
    train_val = np.union1d(context.train_indices(), context.val_indices()).tolist()
    train_indices = [index for index in train_val if captions(index)]
    if len(train_indices) < 2:
        raise UserError(f"There is nothing to fine-tune on: the train split has {len(train_indices)} pairs.")
    if not any(captions(index) for index in context.indices.tolist()):
        raise UserError("There is nothing to evaluate: the test split has no captions.")
    retriever = Retriever(image.to(device), text.to(device), encoder.logit_scale, encoder.image_size).to(device)
    start = {name: value.clone() for name, value in retriever.state_dict().items()}
    config = finetune.recipe(len(train_indices), context.epochs)
    views = _TrainViews(context, train_indices, config.batch_size, RETRIEVAL_POLICY)
    fine_tune_retrieval(retriever, views, len(train_indices), captions, config)
    test_batches = context.batches(context.source, context.indices.tolist())
    result, bad = evaluate_interpolated_retrieval(retriever, start, test_batches, captions, encoder.image_size)
    return {"unreadable": count_reasons([*views.bad, *bad]), **result.to_json()}


def _modules(context: EvalContext) -> tuple[nn.Module, nn.Module]:
    encoder = context.model.encoder
    if encoder.modules is None:
        raise UserError(f"{encoder.name} does not expose its encoders, which fine-tuning needs.")
    return encoder.modules()


class _TrainViews:
    """Epoch -> batches of augmented views of the samples in random order; `bad` collects the unreadable ones."""

    def __init__(
        self, context: EvalContext, indices: Sequence[int], batch_size: int, policy: AugmentationPolicy
    ) -> None:
        self.context, self.indices, self.batch_size, self.policy = context, indices, batch_size, policy
        self.bad: list[Any] = []

    def __call__(self, epoch: int) -> Batches:
        order = np.random.default_rng(epoch).permutation(self.indices)
        for batch in self.context.batches(self.context.source, order, self.policy, epoch, self.batch_size):
            if epoch == 0:
                self.bad.extend(batch[2])
            yield batch
