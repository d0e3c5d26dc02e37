"""Rendering of scenes.

Pixels are the same on every machine: shapes are signed distance functions in elementwise IEEE arithmetic, without trigonometric or
exponential functions of arrays, and the few scalars that need these functions are rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from coalign.data.scenes.layout import (
    COLORS,
    COS36,
    HEART,
    HEART_OFFSET,
    SIN36,
    STAR,
    STAR_INNER,
    STAR_OFFSET,
    Bar,
    Pattern,
    Scene,
    SceneObject,
    cos_sin,
    luma,
)

Field = np.ndarray  # float32, one value per pixel of a window of the image

# ---------------------------------------------------------------- signed distances to the shapes, in radii, with y pointing down


def _star(u: Field, v: Field) -> Field:
    v = v - STAR_OFFSET
    for _ in range(2):  # fold the ten half-points onto one
        u = np.abs(u)
        beyond = np.maximum(COS36 * u + SIN36 * v, 0)
        u, v = u - (2 * COS36) * beyond, v - (2 * SIN36) * beyond
    across, down = STAR - STAR_INNER * COS36, STAR_INNER * SIN36
    length = math.sqrt(across * across + down * down)
    return (across / length) * np.abs(u) - (down / length) * (v + STAR)


def _heart(u: Field, v: Field) -> Field:
    u, v = np.abs(u), v - HEART_OFFSET
    square = (u + np.abs(v)) * 0.707107 - HEART
    lobe_u, lobe_v = u - 0.707107 * HEART, v + 0.707107 * HEART
    return np.minimum(square, np.sqrt(lobe_u * lobe_u + lobe_v * lobe_v) - HEART)


def _cross(u: Field, v: Field) -> Field:
    u, v = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(u - 1.0, v - 0.34), np.maximum(v - 1.0, u - 0.34))


def _diamond(u: Field, v: Field) -> Field:
    return np.abs(u) * 0.8 + np.abs(v) * 0.6 - 0.69


DISTANCES: dict[str, Callable[[Field, Field], Field]] = {
    "circle": lambda u, v: np.sqrt(u * u + v * v) - 1.0,
    "square": lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.9,
    "triangle": lambda u, v: np.maximum(v - 0.9, 0.866025 * np.abs(u) - 0.5 * v - 0.45),
    "star": _star,
    "heart": _heart,
    "cross": _cross,
    "ring": lambda u, v: np.abs(np.sqrt(u * u + v * v) - 0.76) - 0.24,
    "diamond": _diamond,
}


# ---------------------------------------------------------------- images


def draw(scene: Scene, size: int = 64) -> np.ndarray:
    """Renders a scene, uint8 [size, size, 3]."""
    x, y = _pixel_centers(size)
    first, second = (_channels(color) for color in scene.background_colors)
    pixels = first + _pattern_field(scene.background, x - 0.5, y - 0.5, size) * (second - first)  # [3, size, size]
    for bar in scene.clutter:
        _draw_bar(pixels, bar, size)
    windows = [_window(item, size, pad=0.05) for item in scene.objects]
    distances = [_distance(item, window, size) for item, window in zip(scene.objects, windows)]
    for window, distance in zip(windows, distances):
        pixels[(slice(None), *window)] *= 1 - scene.shadow * np.clip(1 - distance / 0.045, 0, 1) ** 2
    pixels += _channels(scene.tint)
    light = scene.gain * (1 + scene.light[0] * (x - 0.5) + scene.light[1] * (y - 0.5))
    peak = scene.gain * (1 + abs(scene.light[0]) / 2 + abs(scene.light[1]) / 2)
    for item, window, distance in zip(scene.objects, windows, distances):
        _draw_object(pixels, scene, item, window, distance, peak, size)
    pixels *= light
    if scene.blur * size > 0.2:
        pixels = _blurred(pixels, scene.blur * size)
    return np.ascontiguousarray((pixels + 0.5).clip(0, 255).astype(np.uint8).transpose(1, 2, 0))


def masks(scene: Scene, size: int = 64) -> np.ndarray:
    """Returns the mask of each object, bool [objects, size, size]: the pixels whose center is inside."""
    inside = np.zeros((len(scene.objects), size, size), bool)
    for mask, item in zip(inside, scene.objects):
        window = _window(item, size, pad=0.02)
        mask[window] = _distance(item, window, size) <= 0
    return inside


def _channels(color: Sequence[float]) -> Field:
    return np.array(color, np.float32)[:, None, None]


@lru_cache(maxsize=8)
def _pixel_centers(size: int) -> tuple[Field, Field]:
    """Pixel centers in fractions of the frame: x [1, size] and y [size, 1]."""
    centers = ((np.arange(size) + 0.5) / size).astype(np.float32)
    return centers[None, :], centers[:, None]


def _window(item: SceneObject, size: int, pad: float) -> tuple[slice, slice]:
    left, top, right, bottom = item.box
    rows = slice(max(0, math.floor((top - pad) * size)), math.ceil((bottom + pad) * size))
    return rows, slice(max(0, math.floor((left - pad) * size)), math.ceil((right + pad) * size))


def _local_coordinates(item: SceneObject, window: tuple[slice, slice], size: int) -> tuple[Field, Field]:
    """Pixel centers relative to the object, in units of its radius."""
    x, y = _pixel_centers(size)
    cos, sin = cos_sin(item.tilt)
    x = (x[:, window[1]] - item.x) * (2 / item.diameter)
    y = (y[window[0]] - item.y) * (2 / item.diameter)
    return cos * x + sin * y, cos * y - sin * x


def _distance(item: SceneObject, window: tuple[slice, slice], size: int) -> Field:
    """Signed distance to the outline in fractions of the frame, negative inside."""
    return DISTANCES[item.shape](*_local_coordinates(item, window, size)) * (item.diameter / 2)


def _draw_object(
    pixels: Field, scene: Scene, item: SceneObject, window: tuple[slice, slice], distance: Field, peak: float, size: int
) -> None:
    shade: Field | float = 1.0
    highest = 1 + item.relief
    if item.texture.kind != "plain":
        u, v = _local_coordinates(item, window, size)
        shade = (1 - item.texture_strength) + item.texture_strength * _pattern_field(
            item.texture, u / 2, v / 2, item.diameter * size
        )
    rows = _pixel_centers(size)[1][window[0]]
    # vertical, so that it does not reveal a flip
    shade = shade * (1 - (2 * item.relief / item.diameter) * (rows - item.y))
    if item.outline > 0:
        rim = np.clip((distance + item.outline) * size + 0.5, 0, 1)
        shade = shade * (1 - (1 - item.outline_shade) * rim)
    level = luma(COLORS[item.color])
    chroma = [scene.saturation * (channel - level) + shift for channel, shift in zip(COLORS[item.color], scene.tint)]
    # Clipping a channel would change the luma and reveal the hue in grayscale, so reduce the saturation instead.
    scale = min(1.0, *((255 / (highest * peak) - level) / c if c > 0 else -level / c if c < 0 else 1.0 for c in chroma))
    color = _channels([level + max(0.0, scale) * c for c in chroma])
    coverage = np.clip(0.5 - distance * size, 0, 1)
    region = pixels[(slice(None), *window)]
    region += coverage * (color * shade - region)


def _draw_bar(pixels: Field, bar: Bar, size: int) -> None:
    extent = bar.length + bar.width + 1 / size
    rows = slice(max(0, math.floor((bar.y - extent) * size)), max(0, math.ceil((bar.y + extent) * size)))
    columns = slice(max(0, math.floor((bar.x - extent) * size)), max(0, math.ceil((bar.x + extent) * size)))
    x, y = _pixel_centers(size)
    cos, sin = cos_sin(bar.angle)
    x, y = x[:, columns] - bar.x, y[rows] - bar.y
    along, across = cos * x + sin * y, cos * y - sin * x
    along = np.maximum(np.abs(along) - bar.length, 0)
    coverage = np.clip(0.5 - (np.sqrt(along * along + across * across) - bar.width) * size, 0, 1)
    region = pixels[:, rows, columns]
    region += coverage * (_channels(bar.color) - region)


def _wave(t: Field) -> Field:
    """Triangle wave of period 1 with values 0 … 1, an even function."""
    return np.abs(t - np.floor(t) - 0.5) * 2


def _pattern_field(pattern: Pattern, x: Field, y: Field, pixels_across: float) -> Field:
    """Values of a pattern, 0 … 1. All kinds are even in u and v, so that a mirrored pattern is a pattern of the same kind."""
    cos, sin = cos_sin(pattern.angle)
    u = (cos * x + sin * y) / pattern.scale + pattern.phase_u
    v = (cos * y - sin * x) / pattern.scale + pattern.phase_v
    edge = max(1.0, min(6.0, pattern.scale * pixels_across / 3))  # as sharp as the resolution allows
    if pattern.kind == "clouds":
        t = (_wave(u * 0.7) + _wave(v * 0.6) + _wave(u * 0.9 + v * 1.1) + _wave(u * 0.9 - v * 1.1)) * 0.25
        return t * t * (3 - 2 * t)
    if pattern.kind == "stripes":
        t = _wave(u) - 0.5
    elif pattern.kind == "checks":
        t = (_wave(u) - 0.5) * (_wave(v) - 0.5) * 3
    elif pattern.kind == "dots":
        u, v = 1 - _wave(u), 1 - _wave(v)
        t = 0.5 - np.sqrt(u * u + v * v)
    elif pattern.kind == "plaid":
        t = np.maximum(_wave(u), _wave(v)) - 0.7
    else:  # zigzag
        t = _wave(v + 0.6 * _wave(u)) - 0.5
    return np.clip(t * edge + 0.5, 0, 1)


def _blurred(pixels: Field, sigma: float) -> Field:
    radius = math.ceil(2.5 * sigma)
    weights = [round(math.exp(-0.5 * (step / sigma) ** 2), 6) for step in range(radius + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    size = pixels.shape[1]
    for axis in (1, 2):
        padding = [(0, 0), (0, 0), (0, 0)]
        padding[axis] = (radius, radius)
        padded = np.pad(pixels, padding, mode="edge")
        window = [padded[:, i : i + size] if axis == 1 else padded[:, :, i : i + size] for i in range(2 * radius + 1)]
        pixels = window[radius] * (weights[0] / total)
        for step in range(1, radius + 1):
            pixels += (window[radius - step] + window[radius + step]) * (weights[step] / total)
    return pixels
