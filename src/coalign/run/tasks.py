"""What a model can be asked: a function for each kind of task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.classification import ClassificationSource
from coalign.data.evaluation_views import image_batches
from coalign.data.scenes import Scenes
from coalign.data.sugarcrepe import SugarCrepe
from coalign.data.winoground import Winoground
from coalign.errors import UserError
from coalign.evaluation.accuracy import Part
from coalign.evaluation.compositionality import choose_captions, tell_pairs_apart
from coalign.evaluation.embed import Batches, ImageEmbeds, embed_images, image_features
from coalign.evaluation.few_shot import few_shot
from coalign.evaluation.finetune import Classifier, FineTuneConfig, between, fine_tune
from coalign.evaluation.guidance import bootstrapped_guidance
from coalign.evaluation.knn import knn
from coalign.evaluation.prompts import templates
from coalign.evaluation.retrieval import retrieve, retrieve_in_folds
from coalign.evaluation.sgd_probe import sgd_probe
from coalign.evaluation.tagging import tagging
from coalign.evaluation.vse import vse
from coalign.evaluation.zero_shot import class_weights, classify
from coalign.run.probe import Labelled, labelled_features, probe
from coalign.run.samples import Labels, captions_of, label_function, tags_of
from coalign.run.subject import Subject
from coalign.training.distributed import World
from coalign.types import AugmentationPolicy, Source

FINE_TUNING = AugmentationPolicy(crop_scale=(0.5, 1.0), flip_p=0.5)


@dataclass
class Question:
    """What a task is asked of: a model, and samples of a source with, for some tasks, their classes."""

    subject: Subject
    source: Source
    indices: np.ndarray
    classes: Path | None
    label: str | None
    prompts: str | None
    workers: int
    world: World
    epochs: int = 10  # of fine-tuning

    def labels(self, indices: np.ndarray | None = None) -> Labels:
        chosen = self.indices if indices is None else indices
        if isinstance(self.source, ClassificationSource) and self.is_named:
            return Labels(self.source.classnames, {i: self.source.labels[i] for i in chosen.tolist()}, 0)
        return label_function(self.source, chosen, self.classes, self.label)

    @property
    def is_named(self) -> bool:
        """Whether it is of one of the papers' data sets, with its own classes."""
        return isinstance(self.source, ClassificationSource) and self.classes is None

    def templates(self) -> list[str]:
        own = self.source.prompts if isinstance(self.source, ClassificationSource) else "default"
        return templates(self.prompts or own)

    def of_data_set(self, learning: bool = True) -> dict[str, Any]:
        """What is to be said of one of the named data sets: the papers' figure of it, and what differs from theirs."""
        if not isinstance(self.source, ClassificationSource):
            return {}
        return {"main_metric": self.source.metric, "differences": self.source.differences(learning)}

    def rest(self) -> np.ndarray:
        """What can be learnt from: the source's train part, or what was not asked for."""
        own: dict[str, np.ndarray] = getattr(self.source, "splits", None) or {}
        return np.setdiff1d(own.get("train", np.arange(len(self.source))), self.indices)

    def batches(
        self, source: Source, indices: Iterable[int]
    ) -> Generator[tuple[list[int], Tensor, list[Any]], None, None]:
        model, chosen = self.subject.encoder, np.array(list(indices), dtype=np.int64)
        return image_batches(source, chosen, model.image_size, workers=self.workers, preprocess=model.preprocess)

    def images(self, indices: Iterable[int]) -> ImageEmbeds:
        """Embeddings; every process makes its share of them, and has all."""
        own = sorted(indices)[self.world.rank :: self.world.size]
        return embed_images(self.subject.encoder, self.batches(self.source, own), self.world.gather_objects)

    def features(self, source: Source, indices: np.ndarray) -> ImageEmbeds:
        """The same of the image encoder's features."""
        own = sorted(indices.tolist())[self.world.rank :: self.world.size]
        return image_features(self.subject.encoder, self.batches(source, own), self.world.gather_objects)


def _retrieval(asked: Question) -> dict[str, Any]:
    evaluation = retrieve(asked.subject.encoder, asked.images(asked.indices.tolist()), captions_of(asked.source))
    return {"unreadable": _counted(evaluation.images.bad), **evaluation.result.to_json()}


def _retrieval_in_folds(asked: Question) -> dict[str, Any]:
    images = asked.images(asked.indices.tolist())
    figures = retrieve_in_folds(asked.subject.encoder, images, captions_of(asked.source), asked.indices).to_json()
    return {"unreadable": _counted(images.bad), **figures}


def _zero_shot(asked: Question) -> dict[str, Any]:
    labels = asked.labels()
    images = asked.images(labels.of_index)
    model, names = asked.subject.encoder, labels.classnames
    evaluation = classify(model, images, labels.of_index, names, asked.templates(), repeated=asked.is_named)
    figures = evaluation.result.to_json()
    counts = {"unreadable": _counted(evaluation.images.bad), "unlabelled": labels.unlabelled}
    return {**counts, **figures, **asked.of_data_set(learning=False)}


def _bootstrap(asked: Question) -> dict[str, Any]:
    encode_joint = asked.subject.joint_encoder()  # first: it says if there is none
    labels = asked.labels()
    batches = list(asked.batches(asked.source, sorted(labels.of_index)))
    names, prompts = labels.classnames, asked.templates()
    result = bootstrapped_guidance(asked.subject.encoder, encode_joint, batches, labels.of_index, names, prompts)
    bad = [entry for _, _, found in batches for entry in found]
    return {"unreadable": _counted(bad), "unlabelled": labels.unlabelled, **result.to_json()}


def _probe(asked: Question) -> dict[str, Any]:
    train, val, test, classnames = _parts(asked)
    evaluation = probe(asked.features, train, val, test, classnames)
    return {"unreadable": _counted(evaluation.images.bad), **evaluation.result.to_json(), **asked.of_data_set()}


def _sgd_probe(name: str) -> Callable[[Question], dict[str, Any]]:
    return lambda asked: _on_features(
        asked, lambda train, val, test, count: sgd_probe(name, _joined(train, val), test, count)
    )


def _knn(asked: Question) -> dict[str, Any]:
    return _on_features(asked, lambda train, val, test, count: knn(_joined(train, val), test, count))


def _few_shot(asked: Question) -> dict[str, Any]:
    return _on_features(asked, few_shot)


def _on_features(asked: Question, classify: Callable[[Part, Part, Part, int], Any]) -> dict[str, Any]:
    """What a classifier of train, validation and test features gives; without a validation part, it is a fifth of the train part."""
    train, val, test, classnames = _parts(asked)
    train, val = (train, val) if val is not None else train.fifth()
    found = [labelled_features(asked.features, part) for part in (train, val, test)]
    learnt, chosen_by, measured = (part for part, _ in found)
    result = classify(learnt, chosen_by, measured, len(classnames))
    unreadable = _counted(entry for _, images in found for entry in images.bad)
    return {"unreadable": unreadable, **result.to_json(), **asked.of_data_set()}


def _fine_tune(asked: Question) -> dict[str, Any]:
    """From the zero-shot classifier, on the source's train part and its validation part, or what was not asked for."""
    encoder = asked.subject.encoder
    if encoder.image_module is None:
        raise UserError(f"{encoder.name} does not give its image encoder, which fine-tuning trains.")
    train, val, test, classnames = _parts(asked)
    labels = {**train.of_index, **(val.of_index if val else {})}
    if not labels or not test.of_index:
        raise UserError(f"There is nothing to fine-tune on: the {'test' if labels else 'train'} part has no class.")
    device = asked.world.device
    weights = class_weights(encoder, classnames, asked.templates(), repeated=asked.is_named).to(device)
    classifier = Classifier(encoder.image_module().to(device), weights, encoder.logit_scale, encoder.image_size)
    start = {name: value.clone() for name, value in classifier.state_dict().items()}
    config = FineTuneConfig(epochs=asked.epochs)

    bad: list[Any] = []

    def batches(epoch: int) -> Batches:
        order = np.random.default_rng(epoch).permutation(sorted(labels))
        size, rows = encoder.image_size, config.batch_size
        for batch in image_batches(asked.source, order, size, rows, asked.workers, policy=FINE_TUNING, epoch=epoch):
            if epoch == 0:
                bad.extend(batch[2])
            yield batch

    fine_tune(classifier, batches, len(labels), labels, config, device)
    measured = list(asked.batches(asked.source, sorted(test.of_index)))
    figures = between(classifier, start, measured, test.of_index, len(classnames), device).to_json()
    bad += [entry for _, _, found in measured for entry in found]
    return {"unreadable": _counted(bad), **figures, **asked.of_data_set()}


def _vse(asked: Question) -> dict[str, Any]:
    train, test = _rest_and_asked(asked)
    evaluation = vse(train, test, captions_of(asked.source))
    return {"unreadable": _counted([*train.bad, *test.bad]), **evaluation.result.to_json(), "task": "vse"}


def _rest_and_asked(asked: Question) -> list[ImageEmbeds]:
    """Features to learn from, and those of the asked samples."""
    return [asked.features(asked.source, indices) for indices in (asked.rest(), asked.indices)]


def _tagging(asked: Question) -> dict[str, Any]:
    parts = _rest_and_asked(asked)
    train, test = ((part.embeds.numpy(), [tags_of(asked.source, index) for index in part.indices]) for part in parts)
    unreadable = _counted(entry for part in parts for entry in part.bad)
    return {"unreadable": unreadable, **tagging(train, test).to_json()}


def _joined(one: Part, other: Part) -> Part:
    if not len(one[1]) or not len(other[1]):  # whose features have no width
        return one if len(one[1]) else other
    return np.concatenate([one[0], other[0]]), np.concatenate([one[1], other[1]])


def _parts(asked: Question) -> tuple[Labelled, Labelled | None, Labelled, list[str]]:
    """The asked samples are the test part; what a classifier learns from is the source's train part, or what was not asked for; its
    validation part, if it has one, is for choosing. And the names of the classes."""
    own: dict[str, np.ndarray] = getattr(asked.source, "splits", None) or {}
    rest = asked.rest()
    val = np.setdiff1d(own.get("val", rest[:0]), asked.indices)
    labels = asked.labels(np.concatenate([asked.indices, rest, val]))
    found = Labelled(asked.source, labels.of_index)
    train, held_out, test = (found.among(indices) for indices in (rest, val, asked.indices))
    return train, held_out if len(val) else None, test, labels.classnames


def _foils(asked: Question) -> dict[str, Any]:
    if not isinstance(asked.source, (Scenes, SugarCrepe)):
        raise UserError(
            f"{asked.source.name} has no false captions beside its true ones; scenes:… and sugarcrepe:FOLDER have."
        )
    options = {"per_kind": 2000} if isinstance(asked.source, Scenes) else {}
    foils = asked.source.foils(asked.indices, **options)
    images = asked.images({foil.index for foil in foils})
    figures = choose_captions(asked.subject.encoder, images, foils).result.to_json()
    return {"unreadable": _counted(images.bad), **figures}


def _pairs(asked: Question) -> dict[str, Any]:
    if not isinstance(asked.source, Winoground):
        raise UserError(
            f"{asked.source.name} has no pairs of images that two captions tell apart; winoground:FOLDER has."
        )
    images, captions = asked.images(asked.indices.tolist()), captions_of(asked.source)
    figures = tell_pairs_apart(asked.subject.encoder, images, lambda index: captions(index)[0]).to_json()
    return {"unreadable": _counted(images.bad), **figures}


TASKS: Mapping[str, Callable[[Question], dict[str, Any]]] = {
    "retrieval": _retrieval,
    "retrieval-1k": _retrieval_in_folds,
    "zeroshot": _zero_shot,
    "bootstrap": _bootstrap,
    "probe": _probe,
    "probe-mct": _sgd_probe("mct"),
    "probe-slip": _sgd_probe("slip"),
    "fewshot": _few_shot,
    "knn": _knn,
    "tagging": _tagging,
    "vse": _vse,
    "finetune": _fine_tune,
    "foils": _foils,
    "pairs": _pairs,
}


# tasks that learn from other samples than those that are asked for
LEARNING = ("probe", "probe-mct", "probe-slip", "fewshot", "knn", "tagging", "vse", "finetune")


def _counted(bad: Iterable[Any]) -> dict[str, int]:
    return dict(Counter(entry.reason for entry in bad))
