"""Color augmentation and blur on the device, equivalent to `colors.finish`.

Loader workers then only decode, crop, resize and flip. Colors may differ by 1 of 255 from `colors.finish`, since sums are rounded in
another order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.data.images.colors import LUMA, blur_weights, color_maps
from coalign.devices import copies_asynchronously
from coalign.types import AugmentationParams, Batch, ImageView

_CHUNK = 256  # views converted to floating point at a time


def finish_views(batch: Batch, device: torch.device) -> Batch:
    """Moves the batch to the device, and applies color and blur to its image views."""
    non_blocking = copies_asynchronously(device)
    images = {
        name: ImageView(
            finish(view.pixels, view.params, device),
            view.params.to(device, non_blocking=non_blocking),
            None if view.patch_ranks is None else view.patch_ranks.to(device, non_blocking=non_blocking),
        )
        for name, view in batch.images.items()
    }
    return replace(replace(batch, images={}).to(device), images=images)


def finish(pixels: Tensor, params: Tensor, device: torch.device) -> Tensor:
    """Applies color and blur on the device.

    pixels: uint8 [view, 3, side, side], on the host. params: float32 [view, 11], `AugmentationParams.vector` of each view, on the host.
    Returns uint8 [view, 3, side, side] on the device.
    """
    drawn = params.double().numpy()
    matrices, shifts = color_maps(drawn)
    sigmas: Any = AugmentationParams(*drawn.T).blur
    on_device = pixels.to(device, non_blocking=copies_asynchronously(device))
    finished = torch.empty_like(on_device)
    for start in range(0, len(pixels), _CHUNK):
        part = slice(start, start + _CHUNK)
        views = on_device[part].flatten(2).float()
        matrix, shift, luma = (torch.from_numpy(x).to(device) for x in (matrices[part], shifts[part], LUMA))
        # 0.5 makes the truncating cast below round.
        offset = (0.5 + shift * (views.mean(2) @ luma))[:, None, None]
        finished[part] = torch.baddbmm(offset, matrix, views).clamp_(0, 255.5).to(torch.uint8).view_as(finished[part])
        blurred = start + np.flatnonzero(sigmas[part])
        if len(blurred):
            rows = torch.from_numpy(blurred).to(device)
            finished[rows] = _blur(finished[rows], sigmas[blurred])
    return finished


def _blur(views: Tensor, sigmas: np.ndarray) -> Tensor:
    """Blurs each view with its own sigma (in pixels of a 224-pixel view), with reflected borders, rounding after each direction."""
    channels, size = views.shape[1:3]
    side = blur_weights(sigmas * size / 224, size).astype(np.float32)
    radius = side.shape[1]
    taps = np.concatenate([side[:, ::-1], 256 - 2 * side.sum(1, keepdims=True), side], axis=1)
    kernel = torch.from_numpy(taps.repeat(channels, 0)).to(views.device)[:, None, None]  # [view · channel, 1, 1, tap]
    rows = views.reshape(1, -1, size, size).float()
    for _ in range(2):  # along rows, then along columns as rows
        padded = F.pad(rows, (radius, radius, 0, 0), mode="reflect") if radius else rows
        rows = ((F.conv2d(padded, kernel, groups=len(kernel)) + 128) / 256).floor_().transpose(2, 3)
    return rows.to(torch.uint8).reshape(views.shape)
