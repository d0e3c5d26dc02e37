"""Fine-tuning as tasks: of the image encoder for classification, of both encoders for retrieval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import nn

from coalign.errors import UserError
from coalign.evaluation import finetune
from coalign.evaluation.embed import Batches
from coalign.evaluation.finetune import Classifier, between, fine_tune
from coalign.evaluation.finetune_retrieval import Retriever, fine_tune_retrieval, retrieval_between
from coalign.evaluation.zero_shot import class_weights
from coalign.run.question import Question, counted, parts
from coalign.run.samples import captions_of
from coalign.types import AugmentationPolicy

FOR_CLASSES = AugmentationPolicy(crop_scale=(0.5, 1.0), flip_p=0.5)
FOR_CAPTIONS = AugmentationPolicy(crop_scale=(0.5, 1.0))  # a flip would exchange left and right


def fine_tune_classifier(asked: Question) -> dict[str, Any]:
    """From the zero-shot classifier, on the source's train part and its validation part, or what was not asked for."""
    encoder, device = asked.subject.encoder, asked.world.device
    image, _ = _modules(asked)
    train, val, test, classnames = parts(asked)
    labels = {**train.of_index, **(val.of_index if val else {})}
    if not labels or not test.of_index:
        raise UserError(f"There is nothing to fine-tune on: the {'test' if labels else 'train'} part has no class.")
    weights = class_weights(encoder, classnames, asked.templates(), repeated=asked.is_named).to(device)
    classifier = Classifier(image.to(device), weights, encoder.logit_scale, encoder.image_size)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    config = finetune.recipe(len(labels), asked.epochs)
    views = _Views(asked, sorted(labels), config.batch_size, FOR_CLASSES)
    fine_tune(classifier, views, len(labels), labels, config, device)
    measured = list(asked.batches(asked.source, sorted(test.of_index)))
    figures = between(classifier, start, measured, test.of_index, len(classnames), device).to_json()
    bad = [*views.bad, *(entry for _, _, found in measured for entry in found)]
    return {"unreadable": counted(bad), **figures, **asked.of_data_set()}


def fine_tune_encoders(asked: Question) -> dict[str, Any]:
    """For retrieval, on the pairs of the source's train part and its validation part, or what was not asked for."""
    encoder, device = asked.subject.encoder, asked.world.device
    image, text = _modules(asked)
    captions = captions_of(asked.source)
    learnt_from = [index for index in np.union1d(asked.rest(), asked.val()).tolist() if captions(index)]
    if len(learnt_from) < 2:
        raise UserError(f"There is nothing to fine-tune on: the train part has {len(learnt_from)} pairs.")
    if not any(captions(index) for index in asked.indices.tolist()):
        raise UserError("There is nothing to evaluate: the test part has no caption.")
    retriever = Retriever(image.to(device), text.to(device), encoder.logit_scale, encoder.image_size).to(device)
    start = {name: value.clone() for name, value in retriever.state_dict().items()}
    config = finetune.recipe(len(learnt_from), asked.epochs)
    views = _Views(asked, learnt_from, config.batch_size, FOR_CAPTIONS)
    fine_tune_retrieval(retriever, views, len(learnt_from), captions, config)
    measured = asked.batches(asked.source, asked.indices.tolist())
    result, bad = retrieval_between(retriever, start, measured, captions, encoder.image_size)
    return {"unreadable": counted([*views.bad, *bad]), **result.to_json()}


def _modules(asked: Question) -> tuple[nn.Module, nn.Module]:
    encoder = asked.subject.encoder
    if encoder.modules is None:
        raise UserError(f"{encoder.name} does not give its encoders, which fine-tuning trains.")
    return encoder.modules()


class _Views:
    """Epoch -> batches of views of the samples, in an order of its own; `bad` are those that could not be read."""

    def __init__(self, asked: Question, indices: Sequence[int], batch_size: int, policy: AugmentationPolicy) -> None:
        self.asked, self.indices, self.batch_size, self.policy = asked, indices, batch_size, policy
        self.bad: list[Any] = []

    def __call__(self, epoch: int) -> Batches:
        order = np.random.default_rng(epoch).permutation(self.indices)
        for batch in self.asked.batches(self.asked.source, order, self.policy, epoch, self.batch_size):
            if epoch == 0:
                self.bad.extend(batch[2])
            yield batch
