"""Batched color augmentation and blur on the device, equivalent to `views.apply`.

Loader workers then only decode, crop, resize and flip. Colors may differ by 1 of 255 from `views.apply`, since sums are rounded in another
order.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.data.images.views import LUMA, blur_weights, color_matrix, gray_matrix
from coalign.types import AugmentationParams, Batch, ImageView

_CHUNK = 256  # views converted to floating point at a time


def finish_views(batch: Batch, device: torch.device) -> Batch:
    """Moves the batch to the device, and applies color and blur to its image views."""
    images = {
        name: ImageView(
            finish(view.pixels, view.params, device),
            view.params.to(device, non_blocking=True),
            None if view.patch_ranks is None else view.patch_ranks.to(device, non_blocking=True),
        )
        for name, view in batch.images.items()
    }
    return replace(replace(batch, images={}).to(device), images=images)


def finish(pixels: Tensor, params: Tensor, device: torch.device) -> Tensor:
    """Applies color and blur on the device.

    pixels: uint8 [view, 3, side, side], on the host. params: float32 [view, 11], `AugmentationParams.vector` of each view, on the host.
    Returns uint8 [view, 3, side, side] on the device.
    """
    drawn: Any = AugmentationParams(*params.double().numpy().T[:, :, None, None])  # each [view, 1, 1]
    matrices = np.where(drawn.grayed, gray_matrix(drawn), color_matrix(drawn)).astype(np.float32)
    shifts = (-drawn.contrast * (1 + drawn.brightness)).astype(np.float32)
    on_device = pixels.to(device, non_blocking=True)
    finished = torch.empty_like(on_device)
    for start in range(0, len(pixels), _CHUNK):
        part = slice(start, start + _CHUNK)
        views = on_device[part].flatten(2).float()
        matrix, shift, luma = (torch.from_numpy(x).to(device) for x in (matrices[part], shifts[part], LUMA))
        # 0.5 makes the truncating cast below round.
        offset = 0.5 + shift * (views.mean(2) @ luma)[:, None, None]
        finished[part] = torch.baddbmm(offset, matrix, views).clamp_(0, 255.5).to(torch.uint8).view_as(finished[part])
        blurred = start + np.flatnonzero(drawn.blur[part])
        if len(blurred):
            rows = torch.from_numpy(blurred).to(device)
            finished[rows] = _blur(finished[rows], drawn.blur[blurred, 0, 0])
    return finished


def _blur(views: Tensor, sigmas: np.ndarray) -> Tensor:
    """Blurs each view with its own sigma (in pixels of a 224-pixel view), with reflected borders, rounding after each direction."""
    num_views, channels, size, _ = views.shape
    weights = [blur_weights(sigma * size / 224, size).astype(np.float32) for sigma in sigmas]
    radius = max(map(len, weights))
    taps = np.zeros((num_views, 2 * radius + 1), np.float32)
    for row, side in zip(taps, weights):
        row[radius] = 256 - 2 * side.sum()
        row[radius + 1 : radius + 1 + len(side)] = row[radius - len(side) : radius][::-1] = side
    kernel = torch.from_numpy(taps.repeat(channels, 0)).to(views.device)[:, None, None]  # [view · channel, 1, 1, tap]
    rows = views.reshape(1, -1, size, size).float()
    for _ in range(2):  # along rows, then along columns as rows
        padded = F.pad(rows, (radius, radius, 0, 0), mode="reflect") if radius else rows
        rows = ((F.conv2d(padded, kernel, groups=len(kernel)) + 128) / 256).floor_().transpose(2, 3)
    return rows.to(torch.uint8).reshape(views.shape)
