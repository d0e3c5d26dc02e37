"""Color augmentation and blur of many views at once, with NumPy, in one thread.

A view's result does not depend on the others. Views are processed in blocks that fit in a core's cache.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from coalign.types import AugmentationParams

LUMA = np.array([0.299, 0.587, 0.114], np.float32)
_GRAY = np.tile(LUMA, (3, 1))  # projects a color onto its gray value
_CHROMA = np.eye(3) - _GRAY  # the remaining chroma, which a hue shift rotates in the I-Q plane of YIQ color space
_YIQ = np.array([LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
# Rotates hue by a quarter turn, from red toward yellow as in HSV.
_QUARTER_TURN = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, 1], [0, -1, 0]]) @ _YIQ
_BLOCK = 1 << 15  # pixels processed at a time
_COLUMNS = 1 << 14  # of a matrix product; a larger one would start threads in every loader worker


def finish(views: np.ndarray, params: np.ndarray) -> None:
    """Applies color and blur in place.

    views: uint8 [view, 3, size, size]. params: float64 [view, 11], the fields of `AugmentationParams` in order.

    Color is one affine map in the fixed order brightness, contrast (about the view's mean gray), saturation, hue, grayscale, clipped
    once at the end. torchvision draws the order at random, clips after every operation and rotates hue in HSV; here, hue rotates in
    YIQ, which preserves luma. For a rotation by 0.1 turns, the results differ by 22 of 255 on average over all colors and by about 125
    at most; over muted colors (channels from 90 to 165), by 3.5 on average.
    """
    fields: Any = AugmentationParams(*params.T)  # each [view]
    size = views.shape[-1]
    colored = fields.brightness, fields.contrast, fields.saturation, fields.hue, fields.grayed
    for block in _blocks(np.flatnonzero(np.any(colored, axis=0)), size * size):
        views[block] = _color(views[block], params[block])
    for block in _blocks(np.flatnonzero(fields.blur), size * size):
        views[block] = _blur(views[block], fields.blur[block] * size / 224)


def _blocks(rows: np.ndarray, pixels: int) -> list[np.ndarray]:
    count = max(1, _BLOCK // pixels)
    return [rows[start : start + count] for start in range(0, len(rows), count)]


# ---------------------------------------------------------------- color


def _color(views: np.ndarray, params: np.ndarray) -> np.ndarray:
    """uint8 [view, 3, size, size] -> uint8 of the same shape."""
    pixels = views.reshape(len(views), 3, -1).astype(np.float32)
    matrices, shifts = color_maps(params)
    # 0.5 makes the truncating cast below round. Not a matrix product, which could round by the number of views.
    offsets = 0.5 + shifts * (pixels.mean(2) * LUMA).sum(1)
    changed = np.empty_like(pixels)
    for start in range(0, pixels.shape[2], _COLUMNS):
        np.matmul(matrices, pixels[:, :, start : start + _COLUMNS], out=changed[:, :, start : start + _COLUMNS])
    changed += offsets[:, None, None]
    return np.clip(changed, 0, 255.5, out=changed).astype(np.uint8).reshape(views.shape)


def color_maps(params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The affine color map of each view: its matrix, float32 [view, 3, 3], and the shift along the gray axis per mean gray, [view].

    The form is simple because saturation and hue preserve gray and luma.
    """
    fields: Any = AugmentationParams(*params.T[:, :, None, None])  # each [view, 1, 1]
    angle = 2 * math.pi * fields.hue
    colorful = (1 + fields.saturation) * (np.cos(angle) * _CHROMA + np.sin(angle) * _QUARTER_TURN)
    gain = (1 + fields.brightness) * (1 + fields.contrast)
    matrices = gain * (_GRAY + np.where(fields.grayed, 0.0, colorful))
    shifts = -fields.contrast * (1 + fields.brightness)
    return matrices.astype(np.float32), shifts[:, 0, 0].astype(np.float32)


# ---------------------------------------------------------------- blur


def blur_weights(sigmas: np.ndarray, size: int) -> np.ndarray:
    """Blur weights of the neighbors at distance 1, 2, … of each view, in units of 1/256: uint16 [view, distance].

    The center's weight completes the sum to 256. sigmas: in pixels of the view, positive.
    """
    reach = np.minimum(size - 1, np.ceil(3 * sigmas))[:, None]
    taps = np.arange(1, int(reach.max()) + 1)
    half = np.where(taps <= reach, np.exp(-0.5 * (taps / sigmas[:, None]) ** 2), 0.0)
    # Rounding cumulative sums instead of weights keeps the total at 256 for any sigma.
    sums = np.rint(np.cumsum(256 * half / (1 + 2 * half.sum(1, keepdims=True)), axis=1))
    weights = np.diff(sums, axis=1, prepend=0).astype(np.uint16)
    used = np.flatnonzero(weights.any(0))
    return weights[:, : used[-1] + 1 if len(used) else 0]


def _blur(views: np.ndarray, sigmas: np.ndarray) -> np.ndarray:
    """Gaussian blur with reflected borders, in 16-bit fixed point: uint8 [view, 3, size, size] -> uint8 of the same shape.

    Weights are multiples of 1/256, so that sums fit in 16 bits.
    """
    size = views.shape[-1]
    weights = blur_weights(sigmas, size)
    radius = weights.shape[1]
    if radius == 0:
        return views
    padded = size + 2 * radius
    source, blurred, pair = np.empty((3, len(views), padded * padded), np.uint16)
    image = source.reshape(len(views), padded, padded)
    result = np.empty_like(views)
    center = np.uint16(256) - 2 * weights.sum(1, keepdims=True, dtype=np.uint16)
    for channel in range(3):
        image[:, radius:-radius, radius:-radius] = views[:, channel]
        image[:, :radius] = image[:, 2 * radius : radius : -1]
        image[:, -radius:] = image[:, -radius - 2 : -2 * radius - 2 : -1]
        image[:, :, :radius] = image[:, :, 2 * radius : radius : -1]
        image[:, :, -radius:] = image[:, :, -radius - 2 : -2 * radius - 2 : -1]
        for step, read, write in ((1, source, blurred), (padded, blurred, source)):  # along rows, then columns
            # All rows as one long row: values that cross a border end up in the padding.
            np.multiply(read, center, out=write)
            for tap in range(1, radius + 1):
                shift = tap * step
                both, middle = pair[:, 2 * shift :], write[:, shift:-shift]
                np.add(read[:, 2 * shift :], read[:, : -2 * shift], out=both)
                np.multiply(both, weights[:, tap - 1 : tap], out=both)
                np.add(middle, both, out=middle)
            write += 128
            write >>= 8
        result[:, channel] = image[:, radius:-radius, radius:-radius]
    return result
