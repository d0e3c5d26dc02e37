"""The fine-tuning tasks: the image encoder for classification, both encoders for retrieval."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from coalign.embeds import map_fields
from coalign.errors import UserError
from coalign.evaluation.embed import Batches
from coalign.evaluation.finetune import classification as finetune
from coalign.evaluation.finetune.classification import Classifier, evaluate_interpolated, fine_tune
from coalign.evaluation.finetune.retrieval import Retriever, evaluate_interpolated_retrieval, fine_tune_retrieval
from coalign.evaluation.zero_shot import embed_classes
from coalign.types import AugmentationPolicy
from coalign.workflows.evaluate.context import EvalContext, TaskResult
from coalign.workflows.evaluate.samples import Samples, captions_of

CLASSIFICATION_POLICY = AugmentationPolicy(crop_scale=(0.5, 1.0), flip_p=0.5)
RETRIEVAL_POLICY = AugmentationPolicy(crop_scale=(0.5, 1.0))  # no flips: captions name left and right


def fine_tune_classifier(context: EvalContext) -> TaskResult:
    """Fine-tunes from the zero-shot classifier on the train and val splits, or on all samples that are not evaluated."""
    encoder, device = context.model.encoder, context.world.device
    image, _ = _modules(context)
    train, val, test = context.labeled_splits()
    labels = {**train.class_of, **(val.class_of if val else {})}
    if not labels:
        raise UserError("There is nothing to fine-tune on: the train split has no samples with a class.")
    names = test.classnames
    classes = embed_classes(encoder, context.class_prompts(test))
    classes = replace(classes, embeds=map_fields(classes.embeds, lambda tensor: tensor.to(device)))
    scale, size = encoder.logit_scale, encoder.image_size
    classifier = Classifier(image.to(device), classes, scale, size, encoder.similarity)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    config = finetune.recipe(len(labels), context.config.epochs)
    views = _TrainViews(
        context, Samples(train.source, np.array(sorted(labels))), config.batch_size, CLASSIFICATION_POLICY
    )
    fine_tune(classifier, views, len(labels), labels, config, device)
    test_batches = list(context.batches(Samples(test.source, np.array(sorted(test.class_of)))))
    metrics = evaluate_interpolated(classifier, start, test_batches, test.class_of, len(names), device)
    bad = [*views.bad, *(entry for _, _, batch_bad in test_batches for entry in batch_bad)]
    return context.classification(metrics, bad=bad)


def fine_tune_encoders(context: EvalContext) -> TaskResult:
    """Fine-tunes both encoders for retrieval on the pairs of the train and val splits, or on all pairs that are not evaluated."""
    encoder, device = context.model.encoder, context.world.device
    image, text = _modules(context)
    source = context.train.source
    train_captions, captions = captions_of(source), captions_of(context.source)
    train_val = np.union1d(context.train.indices, context.val.indices).tolist()
    train = Samples(source, np.array([index for index in train_val if train_captions(index)], dtype=np.int64))
    if len(train.indices) < 2:
        raise UserError(f"There is nothing to fine-tune on: the train split has {len(train.indices)} pairs.")
    if not any(captions(index) for index in context.indices.tolist()):
        raise UserError("There is nothing to evaluate: the test split has no captions.")
    scale, size = encoder.logit_scale, encoder.image_size
    retriever = Retriever(image.to(device), text.to(device), scale, size, encoder.similarity).to(device)
    start = {name: value.clone() for name, value in retriever.state_dict().items()}
    config = finetune.recipe(len(train.indices), context.config.epochs)
    views = _TrainViews(context, train, config.batch_size, RETRIEVAL_POLICY)
    fine_tune_retrieval(retriever, views, len(train.indices), train_captions, config)
    result, bad = evaluate_interpolated_retrieval(retriever, start, context.batches(context.test), captions, size)
    return TaskResult(result.metrics(), [*views.bad, *bad], result.details())


def _modules(context: EvalContext) -> tuple[nn.Module, nn.Module]:
    assert context.model.encoder.modules is not None  # the tasks need them
    return context.model.encoder.modules()


class _TrainViews:
    """Epoch -> batches of augmented views of the samples in random order; `bad` collects the unreadable ones."""

    def __init__(self, context: EvalContext, samples: Samples, batch_size: int, policy: AugmentationPolicy) -> None:
        self.context, self.samples, self.batch_size, self.policy = context, samples, batch_size, policy
        self.bad: list[Any] = []

    def __call__(self, epoch: int) -> Batches:
        order = Samples(self.samples.source, np.random.default_rng(epoch).permutation(self.samples.indices))
        for batch in self.context.batches(order, self.policy, epoch, self.batch_size):
            if epoch == 0:
                self.bad.extend(batch[2])
            yield batch
