"""What a model can be asked: a function for each kind of task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any

import numpy as np

from coalign.data.scenes import Scenes
from coalign.data.sugarcrepe import SugarCrepe
from coalign.data.winoground import Winoground
from coalign.errors import UserError
from coalign.evaluation.accuracy import AccuracyResult, Part
from coalign.evaluation.compositionality import choose_captions, tell_pairs_apart
from coalign.evaluation.embed import ImageEmbeds
from coalign.evaluation.few_shot import few_shot
from coalign.evaluation.guidance import bootstrapped_guidance
from coalign.evaluation.knn import knn
from coalign.evaluation.retrieval import retrieve, retrieve_in_folds
from coalign.evaluation.sgd_probe import sgd_probe
from coalign.evaluation.tagging import tagging
from coalign.evaluation.vse import vse
from coalign.evaluation.zero_shot import classify
from coalign.run.finetune_tasks import fine_tune_classifier, fine_tune_encoders
from coalign.run.probe import labelled_features, probe
from coalign.run.question import Question, counted, parts
from coalign.run.samples import captions_of, tags_of
from coalign.types import AugmentationPolicy

CROPS = AugmentationPolicy(crop_scale=(0.08, 1.0), flip_p=0.5)  # of SLIP's probe


def _retrieval(asked: Question) -> dict[str, Any]:
    evaluation = retrieve(asked.subject.encoder, asked.images(asked.indices.tolist()), captions_of(asked.source))
    return {"unreadable": counted(evaluation.images.bad), **evaluation.result.to_json()}


def _retrieval_in_folds(asked: Question) -> dict[str, Any]:
    images = asked.images(asked.indices.tolist())
    figures = retrieve_in_folds(asked.subject.encoder, images, captions_of(asked.source), asked.indices).to_json()
    return {"unreadable": counted(images.bad), **figures}


def _zero_shot(asked: Question) -> dict[str, Any]:
    labels = asked.labels()
    images = asked.images(labels.of_index)
    model, names = asked.subject.encoder, labels.classnames
    evaluation = classify(model, images, labels.of_index, names, asked.templates(), repeated=asked.is_named)
    figures = evaluation.result.to_json()
    counts = {"unreadable": counted(evaluation.images.bad), "unlabelled": labels.unlabelled}
    return {**counts, **figures, **asked.of_data_set(learning=False)}


def _bootstrap(asked: Question) -> dict[str, Any]:
    encode_joint = asked.subject.joint_encoder()  # first: it says if there is none
    labels = asked.labels()
    batches = list(asked.batches(asked.source, sorted(labels.of_index)))
    names, prompts = labels.classnames, asked.templates()
    result = bootstrapped_guidance(asked.subject.encoder, encode_joint, batches, labels.of_index, names, prompts)
    bad = [entry for _, _, found in batches for entry in found]
    return {"unreadable": counted(bad), "unlabelled": labels.unlabelled, **result.to_json()}


def _probe(asked: Question) -> dict[str, Any]:
    train, val, test, classnames = parts(asked)
    evaluation = probe(asked.features, train, val, test, classnames)
    return {"unreadable": counted(evaluation.images.bad), **evaluation.result.to_json(), **asked.of_data_set()}


def _mct_probe(asked: Question) -> dict[str, Any]:
    def classify(train: Part, val: Part, test: Part, count: int) -> AccuracyResult:
        joined = _joined(train, val)
        return sgd_probe("mct", lambda epoch: joined, test, count)

    return _on_features(asked, classify)


def _slip_probe(asked: Question) -> dict[str, Any]:
    """Encodes the train part anew for every epoch, from random crops and flips."""
    train, val, test, classnames = parts(asked)
    measured, images = labelled_features(asked.features, test)
    bad = list(images.bad)

    def learnt(epoch: int) -> Part:
        features = partial(asked.features, policy=CROPS, epoch=epoch)
        found = [labelled_features(features, part) for part in (train, val) if part is not None]
        if epoch == 0:
            bad.extend(entry for _, images in found for entry in images.bad)
        return reduce(_joined, (part for part, _ in found))

    figures = sgd_probe("slip", learnt, measured, len(classnames)).to_json()
    return {"unreadable": counted(bad), **figures, **asked.of_data_set()}


def _knn(asked: Question) -> dict[str, Any]:
    return _on_features(asked, lambda train, val, test, count: knn(_joined(train, val), test, count))


def _few_shot(asked: Question) -> dict[str, Any]:
    return _on_features(asked, few_shot)


def _on_features(asked: Question, classify: Callable[[Part, Part, Part, int], Any]) -> dict[str, Any]:
    """What a classifier of train, validation and test features gives; without a validation part, it is a fifth of the train part."""
    train, val, test, classnames = parts(asked)
    train, val = (train, val) if val is not None else train.fifth()
    found = [labelled_features(asked.features, part) for part in (train, val, test)]
    learnt, chosen_by, measured = (part for part, _ in found)
    result = classify(learnt, chosen_by, measured, len(classnames))
    unreadable = counted(entry for _, images in found for entry in images.bad)
    return {"unreadable": unreadable, **result.to_json(), **asked.of_data_set()}


def _vse(asked: Question) -> dict[str, Any]:
    train, test = _rest_and_asked(asked)
    evaluation = vse(train, test, captions_of(asked.source))
    return {"unreadable": counted([*train.bad, *test.bad]), **evaluation.result.to_json(), "task": "vse"}


def _rest_and_asked(asked: Question) -> list[ImageEmbeds]:
    """Features to learn from, and those of the asked samples."""
    return [asked.features(asked.source, indices) for indices in (asked.rest(), asked.indices)]


def _tagging(asked: Question) -> dict[str, Any]:
    found = _rest_and_asked(asked)
    train, test = ((part.embeds.numpy(), [tags_of(asked.source, index) for index in part.indices]) for part in found)
    unreadable = counted(entry for part in found for entry in part.bad)
    return {"unreadable": unreadable, **tagging(train, test).to_json()}


def _joined(one: Part, other: Part) -> Part:
    if not len(one[1]) or not len(other[1]):  # whose features have no width
        return one if len(one[1]) else other
    return np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])


def _foils(asked: Question) -> dict[str, Any]:
    if not isinstance(asked.source, (Scenes, SugarCrepe)):
        raise UserError(
            f"{asked.source.name} has no false captions beside its true ones; scenes:… and sugarcrepe:FOLDER have."
        )
    options = {"per_kind": 2000} if isinstance(asked.source, Scenes) else {}
    foils = asked.source.foils(asked.indices, **options)
    images = asked.images({foil.index for foil in foils})
    figures = choose_captions(asked.subject.encoder, images, foils).result.to_json()
    return {"unreadable": counted(images.bad), **figures}


def _pairs(asked: Question) -> dict[str, Any]:
    if not isinstance(asked.source, Winoground):
        raise UserError(
            f"{asked.source.name} has no pairs of images that two captions tell apart; winoground:FOLDER has."
        )
    images, captions = asked.images(asked.indices.tolist()), captions_of(asked.source)
    figures = tell_pairs_apart(asked.subject.encoder, images, lambda index: captions(index)[0]).to_json()
    return {"unreadable": counted(images.bad), **figures}


TASKS: Mapping[str, Callable[[Question], dict[str, Any]]] = {
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


# tasks that learn from other samples than those that are asked for
LEARNING = ("probe", "probe-mct", "probe-slip", "fewshot", "knn", "tagging", "vse", "finetune", "finetune-retrieval")
