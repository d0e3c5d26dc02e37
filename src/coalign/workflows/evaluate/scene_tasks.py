"""The tasks on scenes, which have the ground truth of every pixel."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.loading.eval import image_batches
from coalign.data.scenes.drawing import masks
from coalign.data.scenes.layout import SIZES
from coalign.data.scenes.source import Scenes
from coalign.evaluation.guidance import GuidedQuery, guided_classification
from coalign.evaluation.localization import Query, evaluate_localization
from coalign.workflows.evaluate.eval_model import EvalModel


def _localization(model: EvalModel, source: Scenes, indices: np.ndarray) -> dict[str, Any]:
    views, side = _load_views(model, source, indices)
    localizer, technique = model.localizer()
    result = evaluate_localization(localizer, views.__getitem__, scene_queries(source, indices, side))
    return {**result.to_json(), "maps": technique}


def _guided(model: EvalModel, source: Scenes, indices: np.ndarray) -> dict[str, Any]:
    encode_joint = model.joint_encoder()  # first, as it raises if there is none
    views, _ = _load_views(model, source, indices)
    queries = guided_queries(source, indices)
    return guided_classification(model.encoder, encode_joint, views.__getitem__, queries).to_json()


SCENE_TASKS: Mapping[str, Callable[[EvalModel, Scenes, np.ndarray], dict[str, Any]]] = {
    "localization": _localization,
    "guided": _guided,
}


def _load_views(model: EvalModel, source: Scenes, indices: np.ndarray) -> tuple[dict[int, Tensor], int]:
    """Returns index -> preprocessed image, uint8 [3, side, side], and the side."""
    side = model.encoder.image_size
    views: dict[int, Tensor] = {}
    for batch, pixels, _ in image_batches(source, indices, side, preprocess=model.encoder.preprocess):
        views |= dict(zip(batch, pixels))
    return views, side


def scene_queries(source: Scenes, indices: np.ndarray, side: int) -> list[Query]:
    """Returns a query for every object that its color and shape identify within the image.

    The other text names another object of the image if there is one, else an object of the next image.
    """
    queries: list[Query] = []
    names = {int(index): [_name(item) for item in _objects(source, index)] for index in indices}
    order = list(names)
    for position, index in enumerate(order):
        image_names, image_masks = names[index], masks(source.scene(index), side)
        next_names = names[order[(position + 1) % len(order)]]
        for number, name in enumerate(image_names):
            others = [other for other in (*image_names, *next_names) if other != name]
            if image_names.count(name) == 1 and others:
                queries.append(Query(index, name, others[0], image_masks[number]))
    return queries


def guided_queries(source: Scenes, indices: np.ndarray) -> list[GuidedQuery]:
    """Returns a query for every object that its color and shape identify, in images whose objects differ in size.

    The guide names the object, and the candidates state a size, which the image alone leaves ambiguous.
    """
    queries: list[GuidedQuery] = []
    candidates = tuple(f"a {size} object" for size in SIZES)
    for index in map(int, indices):
        objects = _objects(source, index)
        names = [_name(item) for item in objects]
        if len({item["size"] for item in objects}) > 1:
            queries += [
                GuidedQuery(index, name, candidates, list(SIZES).index(item["size"]))
                for name, item in zip(names, objects)
                if names.count(name) == 1
            ]
    return queries


def _objects(source: Scenes, index: int) -> list[dict[str, Any]]:
    return source.record(int(index)).facts["objects"]


def _name(item: Mapping[str, Any]) -> str:
    return f"a {item['colour']} {item['shape']}"
