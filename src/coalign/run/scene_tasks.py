"""What a run is asked of scenes, whose pictures are known to the last pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.evaluation_views import image_batches
from coalign.data.scene_drawing import masks
from coalign.data.scene_layout import SIZES
from coalign.data.scenes import Scenes
from coalign.evaluation.guidance import GuidedQuery, guided_answers
from coalign.evaluation.localization import Query, localize
from coalign.run.subject import Subject


def _localization(subject: Subject, source: Scenes, indices: np.ndarray) -> dict[str, Any]:
    views, side = _views(subject, source, indices)
    make, how = subject.localizer()
    result = localize(make, views.__getitem__, scene_queries(source, indices, side))
    return {**result.to_json(), "maps": how}


def _guided(subject: Subject, source: Scenes, indices: np.ndarray) -> dict[str, Any]:
    encode_joint = subject.joint_encoder()  # first: it says if there is none
    views, _ = _views(subject, source, indices)
    queries = guided_queries(source, indices)
    return guided_answers(subject.encoder, encode_joint, views.__getitem__, queries).to_json()


SCENE_TASKS: Mapping[str, Callable[[Subject, Scenes, np.ndarray], dict[str, Any]]] = {
    "localization": _localization,
    "guided": _guided,
}


def _views(subject: Subject, source: Scenes, indices: np.ndarray) -> tuple[dict[int, Tensor], int]:
    side = subject.encoder.image_size
    views: dict[int, Tensor] = {}
    for batch, pixels, _ in image_batches(source, indices, side, preprocess=subject.encoder.preprocess):
        views |= dict(zip(batch, pixels))
    return views, side


def scene_queries(source: Scenes, indices: np.ndarray, side: int) -> list[Query]:
    """Every object of the pictures that its colour and shape name alone; the other text is that of another object of the picture, or, where
    there is none, of the next picture's."""
    queries: list[Query] = []
    names = {int(index): [_name(item) for item in _objects(source, index)] for index in indices}
    order = list(names)
    for position, index in enumerate(order):
        own, where = names[index], masks(source.scene(index), side)
        following = names[order[(position + 1) % len(order)]]
        for number, name in enumerate(own):
            others = [other for other in (*own, *following) if other != name]
            if own.count(name) == 1 and others:
                queries.append(Query(index, name, others[0], where[number]))
    return queries


def guided_queries(source: Scenes, indices: np.ndarray) -> list[GuidedQuery]:
    """Every object that its colour and shape name alone, in pictures whose objects differ in size: the guide names it, and the answers say
    that something of a size is there, so that the image alone does not tell which is meant."""
    queries: list[GuidedQuery] = []
    answers = tuple(f"a {size} object" for size in SIZES)
    for index in map(int, indices):
        objects = _objects(source, index)
        names = [_name(item) for item in objects]
        if len({item["size"] for item in objects}) > 1:
            queries += [
                GuidedQuery(index, name, answers, list(SIZES).index(item["size"]))
                for name, item in zip(names, objects)
                if names.count(name) == 1
            ]
    return queries


def _objects(source: Scenes, index: int) -> list[dict[str, Any]]:
    return source.record(int(index)).facts["objects"]


def _name(item: Mapping[str, Any]) -> str:
    return f"a {item['colour']} {item['shape']}"
