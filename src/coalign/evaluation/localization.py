"""Localization of the object that a text names: the pointing game and the mean IoU of a map against the object's mask.

The pointing game (Zhang et al. 2018) is the fraction of maps whose maximum lies in the mask. For IoU, a map is scaled to [0, 1] and
thresholded at one half. Two baselines ignore the text: the image's center, and the map of another text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.evaluation.metrics import measure
from coalign.metric import Metric, Outcome
from coalign.types import Localizer

_BATCH_SIZE = 64
_THRESHOLD = 0.5  # of a map scaled to [0, 1]; the object is above


@dataclass(frozen=True)
class Query:
    """One object of one image, with its name and mask. `other_text` names another object of the image, or an absent one."""

    index: int
    text: str
    other_text: str
    mask: np.ndarray  # bool [height, width] of the evaluation view


# title of each metric, by name
_TITLES = {
    "pointing": "Pointing game",
    "pointing_other_text": "Pointing game, other text",
    "pointing_center": "Pointing game, image center",
    "iou": "IoU",
    "iou_other_text": "IoU, other text",
}


def upsample(maps: Tensor, side: int) -> Tensor:
    """Resizes maps [item, row, column] bilinearly to [item, side, side]."""
    return F.interpolate(maps[:, None].float(), size=(side, side), mode="bilinear", align_corners=False)[:, 0]


def min_max_scale(maps: Tensor) -> Tensor:
    """Scales each map [item, row, column] to [0, 1] by its minimum and maximum; a map that is constant up to rounding becomes 0."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    rounding = 1e-6 * torch.maximum(low.abs(), high.abs()).clamp(min=1e-6)
    return torch.where(high - low > rounding, (maps - low) / (high - low).clamp(min=1e-12), 0.0)


def pointing_hits(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns the fraction of each map's maxima that lie in its mask: maps and masks (bool) [item, side, side] -> float64 [item]."""
    highest = maps == maps.amax((1, 2), keepdim=True)
    return (highest & masks).sum((1, 2)).double() / highest.sum((1, 2))


def intersection_over_union(maps: Tensor, masks: Tensor) -> Tensor:
    """Returns the IoU of each thresholded map with its mask: maps and masks (bool) [item, side, side] -> float64 [item]."""
    predicted = min_max_scale(maps) > _THRESHOLD
    return (predicted & masks).sum((1, 2)).double() / (predicted | masks).sum((1, 2)).clamp(min=1)


def evaluate_localization(
    localizer: Localizer, load_image: Callable[[int], Tensor], queries: Sequence[Query]
) -> list[Metric]:
    """Evaluates the localizer's maps on the queries. The bootstrap draws an image with all of its queries.

    `load_image`: index -> the evaluation view, uint8 [3, side, side], the size of the masks. Raises UserError if there are no queries.
    """
    if not queries:
        raise UserError("There is nothing to localize: no image has an object that a text identifies uniquely.")
    columns: dict[str, list[Tensor]] = {name: [] for name in _TITLES}
    for start in range(0, len(queries), _BATCH_SIZE):
        batch = queries[start : start + _BATCH_SIZE]
        pixels = torch.stack([load_image(query.index) for query in batch])
        masks = torch.from_numpy(np.stack([query.mask for query in batch]))
        side = pixels.shape[-1]
        for suffix, texts in (("", [q.text for q in batch]), ("_other_text", [q.other_text for q in batch])):
            maps = upsample(localizer(pixels, texts).cpu(), side)
            columns[f"pointing{suffix}"].append(pointing_hits(maps, masks))
            columns[f"iou{suffix}"].append(intersection_over_union(maps, masks))
        middle = slice((side - 1) // 2, side // 2 + 1)
        columns["pointing_center"].append(masks[:, middle, middle].double().mean((1, 2)))
    images = np.array([query.index for query in queries])
    return [measure(name, _TITLES[name], Outcome(torch.cat(parts).numpy(), images)) for name, parts in columns.items()]
