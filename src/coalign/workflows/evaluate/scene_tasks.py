"""The tasks on scenes, which have the ground truth of every pixel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from coalign.data.scenes.drawing import masks
from coalign.data.scenes.layout import SIZES
from coalign.data.scenes.source import Scenes
from coalign.evaluation.guidance import GuidedQuery, guided_classification
from coalign.evaluation.localization import Query, evaluate_localization
from coalign.workflows.evaluate.context import EvalContext, TaskResult


def localization(context: EvalContext) -> TaskResult:
    source, views = _load_views(context)
    localizer, technique = context.model.localizer()
    queries = scene_queries(source, context.indices, context.model.encoder.image_size)
    metrics = evaluate_localization(localizer, views.__getitem__, queries)
    return TaskResult(metrics, details={"queries": len(queries), "maps": technique})


def guided(context: EvalContext) -> TaskResult:
    source, views = _load_views(context)
    queries = guided_queries(source, context.indices)
    encode_joint = context.model.joint_encoder()
    return TaskResult(guided_classification(context.model.encoder, encode_joint, views.__getitem__, queries))


def _load_views(context: EvalContext) -> tuple[Scenes, dict[int, Tensor]]:
    """Returns the scenes, and index -> preprocessed image, uint8 [3, side, side]."""
    assert isinstance(context.source, Scenes)  # the tasks need it
    views: dict[int, Tensor] = {}
    for batch, pixels, _ in context.batches(context.test):
        views |= dict(zip(batch, pixels))
    return context.source, views


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
