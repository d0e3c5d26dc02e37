"""Where in an image is what a text names? The pointing game and mean IoU of a map against the object's mask.

The pointing game (Zhang et al. 2018) asks whether the map's highest point lies in the mask. For IoU, a map is scaled to 0 … 1 and cut at
one half. Both are measured beside two maps that know nothing of the text: the image's centre, and the map of another text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import Metric
from coalign.types import Localizer

_BATCH = 64
_CUT = 0.5  # of a map scaled to 0 … 1: what is above is the object


@dataclass(frozen=True)
class Query:
    """One object of one image: what names it, and where it is. `other` names another object of the image, or something absent."""

    index: int
    text: str
    other: str
    mask: np.ndarray  # bool [height, width] of the evaluation view


@dataclass
class LocalizationResult:
    """Rates are fractions of the queries."""

    pointing: Metric
    pointing_other_text: Metric
    pointing_centre: Metric
    iou: Metric
    iou_other_text: Metric
    images: np.ndarray  # int64 [query]: the bootstrap draws an image with all of its queries
    hits: np.ndarray  # float64 [query]
    ious: np.ndarray  # float64 [query]

    def to_json(self) -> dict[str, Any]:
        named = {name: value.to_json() for name, value in vars(self).items() if isinstance(value, Metric)}
        return {"task": "localization", "queries": len(self.hits), **named}


def upsample(maps: Tensor, side: int) -> Tensor:
    """[item, row, column] -> [item, side, side], bilinear."""
    return F.interpolate(maps[:, None].float(), size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def scaled(maps: Tensor) -> Tensor:
    """Each map [item, row, column] from its least to its greatest value as 0 … 1; a constant map is 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return (maps - low) / (high - low).clamp(min=1e-12)


def pointing_hits(maps: Tensor, masks: Tensor) -> Tensor:
    """maps [item, side, side], masks bool [item, side, side] -> float64 [item]: the share of the highest points that lie in the mask."""
    highest = maps == maps.amax((1, 2), keepdim=True)
    return (highest & masks).sum((1, 2)).double() / highest.sum((1, 2))


def intersection_over_union(maps: Tensor, masks: Tensor) -> Tensor:
    """maps [item, side, side], masks bool [item, side, side] -> float64 [item]."""
    found = scaled(maps) > _CUT
    return (found & masks).sum((1, 2)).double() / (found | masks).sum((1, 2)).clamp(min=1)


def localize(localizer: Localizer, image_of: Callable[[int], Tensor], queries: Sequence[Query]) -> LocalizationResult:
    """Scores the queries. `image_of`: index -> the evaluation view, uint8 [3, side, side]; masks have its size."""
    if not queries:
        raise UserError("There is nothing to localise: no image has an object that a text alone can name.")
    columns: dict[str, list[Tensor]] = {"hits": [], "ious": [], "other_hits": [], "other_ious": [], "centre": []}
    for start in range(0, len(queries), _BATCH):
        batch = queries[start : start + _BATCH]
        pixels = torch.stack([image_of(query.index) for query in batch])
        masks = torch.from_numpy(np.stack([query.mask for query in batch]))
        side = pixels.shape[-1]
        for prefix, texts in (("", [q.text for q in batch]), ("other_", [q.other for q in batch])):
            maps = upsample(localizer(pixels, texts).cpu(), side)
            columns[f"{prefix}hits"].append(pointing_hits(maps, masks))
            columns[f"{prefix}ious"].append(intersection_over_union(maps, masks))
        middle = slice((side - 1) // 2, side // 2 + 1)
        columns["centre"].append(masks[:, middle, middle].double().mean((1, 2)))
    images = np.array([query.index for query in queries])
    values = {name: torch.cat(parts).numpy() for name, parts in columns.items()}
    means = {name: metrics.mean(column, images) for name, column in values.items()}
    return LocalizationResult(
        pointing=means["hits"],
        pointing_other_text=means["other_hits"],
        pointing_centre=means["centre"],
        iou=means["ious"],
        iou_other_text=means["other_ious"],
        images=images,
        hits=values["hits"],
        ious=values["ious"],
    )
