"""The contents of a scene: all parameters of its image, as a pure function of (seed, split, index)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from coalign.randomness import generator

Item = TypeVar("Item")
RGB = tuple[float, float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the frame

SPLITS = ("train", "val", "test", "combinations", "shifted")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")  # all mirror-symmetric
SIZES = {"small": 0.140, "medium": 0.196, "big": 0.274}  # diameter in fractions of the frame
LUMA: RGB = (0.299, 0.587, 0.114)
# Luma of dark and light colors, far enough apart for brightness factors of 0.6 … 1.4.
DARK, LIGHT = 74.0, 172.0


def luma(color: Sequence[float]) -> float:
    """Luma of an RGB color, in the same range."""
    return sum(weight * channel for weight, channel in zip(LUMA, color))


def _with_luma(target: float, *color: float) -> RGB:
    red, green, blue = (channel * target / luma(color) for channel in color)
    return red, green, blue


# Four hues, each dark and light. All dark colors have the same luma, and so do all light ones, so that grayscale hides the hue.
COLORS: dict[str, RGB] = {
    "red": _with_luma(DARK, 184, 22, 48), "pink": _with_luma(LIGHT, 240, 140, 164),
    "brown": _with_luma(DARK, 110, 66, 24), "gold": _with_luma(LIGHT, 232, 168, 36),
    "green": _with_luma(DARK, 14, 114, 46), "lime": _with_luma(LIGHT, 112, 218, 84),
    "blue": _with_luma(DARK, 32, 66, 214), "cyan": _with_luma(LIGHT, 92, 200, 236),
}  # fmt: skip
# Two shapes of each color and two colors of each shape, which only the split `combinations` contains.
HELD_OUT = frozenset((shape, tuple(COLORS)[(i + shift) % 8]) for i, shape in enumerate(SHAPES) for shift in (0, 3))

Cell = tuple[int, int]  # row, column of the 3 × 3 grid
GRID = {(row, column): ((column + 0.5) / 3, (row + 0.5) / 3) for row in range(3) for column in range(3)}  # centers x, y
HALVES = {(1, 0): (0.25, 0.5), (1, 2): (0.75, 0.5)}  # of simple scenes

PATTERNS = ("clouds", "stripes", "checks", "dots")
SHIFTED_PATTERNS = ("plaid", "zigzag")
TEXTURES = ("plain", "stripes", "checks", "dots", "clouds")


class BufferedRandom:
    """Uniform random numbers, drawn from a generator in blocks, which is faster than one call per number."""

    def __init__(self, generator: np.random.Generator, block_size: int = 64) -> None:
        self._generator, self._block_size, self._values = generator, block_size, list[float]()

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._values:
            self._values = self._generator.random(self._block_size).tolist()
        return low + (high - low) * self._values.pop()

    def choice(self, items: Sequence[Item]) -> Item:
        return items[int(self() * len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        remaining = list(items)
        return [remaining.pop(int(self() * len(remaining))) for _ in items]


@dataclass(frozen=True)
class Pattern:
    """A periodic pattern with values 0 … 1. The scale is in fractions of the covered area's size, the angle in turns, phases in periods."""

    kind: str
    scale: float
    angle: float
    phase_u: float
    phase_v: float


# Dimensions of the shapes in units of the radius, with y pointing down. The bounding box of every shape is centered at 0.
SIN36, COS36 = 0.587785, 0.809017
STAR, STAR_INNER = 1.12, 0.56
STAR_OFFSET = STAR * (1 - COS36) / 2  # centers the box, as does HEART_OFFSET
HEART, HEART_OFFSET = 0.6, 0.088
_TIP = HEART * 1.414214
# Circles (u, v, radius) with the same convex hull as the shape, from which the box follows at any tilt.
OUTLINES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "circle": ((0, 0, 1),),
    "square": ((-0.9, -0.9, 0), (0.9, -0.9, 0), (-0.9, 0.9, 0), (0.9, 0.9, 0)),
    "triangle": ((0, -0.9, 0), (-1.03923, 0.9, 0), (1.03923, 0.9, 0)),
    "star": tuple(
        (STAR * u, STAR * v + STAR_OFFSET, 0)
        for u, v in ((0, -1), (-0.951057, -0.309017), (0.951057, -0.309017), (-SIN36, COS36), (SIN36, COS36))
    ),
    "heart": (
        (-_TIP / 2, HEART_OFFSET - _TIP / 2, HEART),
        (_TIP / 2, HEART_OFFSET - _TIP / 2, HEART),
        (0, HEART_OFFSET + _TIP, 0),
    ),
    "cross": tuple((u, v, 0) for a in (-1, 1) for b in (-0.34, 0.34) for u, v in ((a, b), (b, a))),
    "ring": ((0, 0, 1),),
    "diamond": ((-0.8625, 0, 0), (0.8625, 0, 0), (0, -1.15, 0), (0, 1.15, 0)),
}


def cos_sin(turns: float) -> tuple[float, float]:
    """Cosine and sine of an angle, rounded to be the same in all math libraries."""
    return round(math.cos(2 * math.pi * turns), 7), round(math.sin(2 * math.pi * turns), 7)


@dataclass(frozen=True)
class SceneObject:
    shape: str
    color: str
    size: str
    cell: Cell
    x: float  # center and diameter in fractions of the frame
    y: float
    diameter: float
    tilt: float  # in turns
    texture: Pattern
    texture_strength: float
    outline: float  # width in fractions of the frame
    outline_shade: float  # brightness factor at the outline
    relief: float  # strength of the brightness gradient from top to bottom

    @property
    def box(self) -> Box:
        """The tight bounding box."""
        cos, sin = cos_sin(self.tilt)
        radius = self.diameter / 2
        circles = [(cos * u - sin * v, sin * u + cos * v, r) for u, v, r in OUTLINES[self.shape]]
        return (
            self.x + radius * min(u - r for u, _, r in circles),
            self.y + radius * min(v - r for _, v, r in circles),
            self.x + radius * max(u + r for u, _, r in circles),
            self.y + radius * max(v + r for _, v, r in circles),
        )


@dataclass(frozen=True)
class Bar:
    """A short bar of background clutter."""

    x: float
    y: float
    length: float
    width: float
    angle: float
    color: RGB


@dataclass(frozen=True)
class Scene:
    seed: int
    split: str
    index: int
    objects: tuple[SceneObject, ...]
    zoom: float  # factor of the objects' sizes
    background: Pattern
    background_colors: tuple[RGB, RGB]
    clutter: tuple[Bar, ...]
    shadow: float  # strength of the shadows around objects
    tint: RGB  # added to every color; its luma is zero
    saturation: float
    gain: float
    light: tuple[float, float]  # brightness gradient toward the right and the bottom
    blur: float  # sigma in fractions of the frame


# ---------------------------------------------------------------- sampling


@lru_cache(maxsize=4096)
def make_scene(seed: int, split: str, index: int, simple: bool = False) -> Scene:
    """Returns the scene at an index of a split. It does not depend on the size of the split.

    A simple scene has one or two objects of different shapes, in the left and the right half. They are medium or big, and half again as
    large as in other scenes.
    """
    rng = BufferedRandom(generator(seed, 0, index, 0, f"scenes/{split}"), block_size=128)
    shifted = split == "shifted"
    centers, sizes, zoom = (HALVES, ("medium", "big"), 1.5) if simple else (GRID, tuple(SIZES), 1.0)
    num_objects = (1, 2, 2, 2, 3)[int(rng() * 5)]
    cells = rng.shuffled(tuple(centers))[:num_objects]  # at most two of the halves
    pairs: list[tuple[str, str]] = []
    while len(pairs) < len(cells):
        pair = (rng.choice(SHAPES), rng.choice(tuple(COLORS)))
        if split == "combinations":
            allowed = bool(pairs) or pair in HELD_OUT
        else:
            allowed = pair not in HELD_OUT
        repeated = pair[0] in dict(pairs) if simple else pair in pairs
        if allowed and not repeated:
            pairs.append(pair)
    objects = tuple(_object(rng, *pair, cell, centers[cell], sizes, zoom) for pair, cell in zip(pairs, cells))
    background_color = _background_color(rng, (225.0, 114.0, 26.0)[max(0, int(rng() * 6) - 3)])
    kind = rng.choice(SHIFTED_PATTERNS if shifted else PATTERNS)
    num_bars = int(rng(6, 13)) if shifted else int(rng(0, 8))
    max_tint = 26.0 if shifted else 10.0
    red, blue = rng(-max_tint, max_tint), rng(-max_tint, max_tint)
    return Scene(
        seed, split, index, objects, zoom,
        background=_pattern(rng, kind, 0.05, 0.35),
        background_colors=(background_color, _jittered(rng, background_color)),
        clutter=tuple(
            Bar(rng(), rng(), rng(0.012, 0.05), rng(0.005, 0.01), rng(), _jittered(rng, background_color, 20.0, 16.0))
            for _ in range(num_bars)
        ),
        shadow=rng(0.0, 0.3),
        tint=(red, -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1], blue),
        saturation=rng(0.8, 1.05),
        gain=rng(0.6, 0.8) if shifted else rng(0.85, 1.03),
        light=(rng(-0.2, 0.2), rng(-0.2, 0.2)),
        blur=rng(0.008, 0.018) if shifted else max(0.0, rng(-0.014, 0.012)),
    )  # fmt: skip


def _object(
    rng: BufferedRandom,
    shape: str,
    color: str,
    cell: Cell,
    center: tuple[float, float],
    sizes: Sequence[str],
    zoom: float,
) -> SceneObject:
    size = rng.choice(sizes)
    diameter = SIZES[size] * rng(0.97, 1.03) * zoom
    jitter = min(0.08, max(0.0, zoom / 6 - 0.6 * diameter))  # of the center, limited to keep the shape in its cell
    return SceneObject(
        shape, color, size, cell,
        x=center[0] + rng(-jitter, jitter),
        y=center[1] + rng(-jitter, jitter),
        diameter=diameter,
        tilt=rng(-0.025, 0.025),
        texture=_pattern(rng, rng.choice(TEXTURES), 0.3, 1.2),
        texture_strength=rng(0.05, 0.18),
        outline=max(0.0, rng(-0.008, 0.012)),
        outline_shade=rng(0.5, 0.75),
        relief=rng(0.0, 0.16),
    )  # fmt: skip


def _pattern(rng: BufferedRandom, kind: str, low: float, high: float) -> Pattern:
    scale = low * (high / low) ** rng()
    return Pattern(kind, round(scale, 6), rng(), rng(), rng())


def _background_color(rng: BufferedRandom, level: float) -> RGB:
    """A color near a gray level. The levels (light, medium, dark) differ from the two lumas of objects."""
    return _jittered(rng, (level, level, level), 10.0, 18.0)


def _jittered(rng: BufferedRandom, color: RGB, level: float = 12.0, chroma: float = 9.0) -> RGB:
    shift, red, blue = rng(-level, level), rng(-chroma, chroma), rng(-chroma, chroma)
    green = -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1]
    return color[0] + shift + red, color[1] + shift + green, color[2] + shift + blue
