"""What is in a scene: everything that its picture shows, as numbers, a pure function of (seed, split, index)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar

import numpy as np

from coalign.data.randomness import generator

Item = TypeVar("Item")
RGB = tuple[float, float, float]
Box = tuple[float, float, float, float]  # left, top, right, bottom in fractions of the frame

SPLITS = ("train", "val", "test", "combinations", "shifted")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")  # mirror images of themselves
SIZES = {"small": 0.140, "medium": 0.196, "big": 0.274}  # diameter, in fractions of the frame
LUMA: RGB = (0.299, 0.587, 0.114)
DARK, LIGHT = 74.0, 172.0  # a brightness factor of 0.6 … 1.4 does not take one for the other


def luma(colour: Sequence[float]) -> float:
    return sum(weight * channel for weight, channel in zip(LUMA, colour))


def _of_luma(target: float, *colour: float) -> RGB:
    red, green, blue = (channel * target / luma(colour) for channel in colour)
    return red, green, blue


# Four hues, each dark and light. Within a column the luma is exactly equal: a grey picture does not tell the hue.
COLOURS: dict[str, RGB] = {
    "red": _of_luma(DARK, 184, 22, 48), "pink": _of_luma(LIGHT, 240, 140, 164),
    "brown": _of_luma(DARK, 110, 66, 24), "gold": _of_luma(LIGHT, 232, 168, 36),
    "green": _of_luma(DARK, 14, 114, 46), "lime": _of_luma(LIGHT, 112, 218, 84),
    "blue": _of_luma(DARK, 32, 66, 214), "cyan": _of_luma(LIGHT, 92, 200, 236),
}  # fmt: skip
# Two shapes of every colour and two colours of every shape are kept out of all splits but `combinations`.
HELD_OUT = frozenset((shape, tuple(COLOURS)[(i + turn) % 8]) for i, shape in enumerate(SHAPES) for turn in (0, 3))

PATTERNS = ("clouds", "stripes", "checks", "dots")
SHIFTED_PATTERNS = ("plaid", "zigzag")
TEXTURES = ("plain", "stripes", "checks", "dots", "clouds")


class Draws:
    """Uniform numbers taken from a generator in blocks, because one call a number is slow."""

    def __init__(self, source: np.random.Generator, block: int = 64) -> None:
        self._source, self._block, self._values = source, block, list[float]()

    def __call__(self, low: float = 0.0, high: float = 1.0) -> float:
        if not self._values:
            self._values = self._source.random(self._block).tolist()
        return low + (high - low) * self._values.pop()

    def pick(self, items: Sequence[Item]) -> Item:
        return items[int(self() * len(items))]

    def shuffled(self, items: Sequence[Item]) -> list[Item]:
        left = list(items)
        return [left.pop(int(self() * len(left))) for _ in items]


@dataclass(frozen=True)
class Pattern:
    """A periodic field of values 0 … 1. Scale in fractions of what it covers, angle in turns, phases in periods."""

    kind: str
    scale: float
    angle: float
    phase_u: float
    phase_v: float


# The shapes' measures in units of the radius, y downwards; the middle of every shape's box is at 0.
SIN36, COS36 = 0.587785, 0.809017
STAR, STAR_INNER = 1.12, 0.56
STAR_DROP = STAR * (1 - COS36) / 2  # puts the middle of the box at 0, as below
HEART, HEART_DROP = 0.6, 0.088
_TIP = HEART * 1.414214
# Circles (u, v, radius) whose hull is the shape's: they give the box at any tilt.
OUTLINES: dict[str, tuple[tuple[float, float, float], ...]] = {
    "circle": ((0, 0, 1),),
    "square": ((-0.9, -0.9, 0), (0.9, -0.9, 0), (-0.9, 0.9, 0), (0.9, 0.9, 0)),
    "triangle": ((0, -0.9, 0), (-1.03923, 0.9, 0), (1.03923, 0.9, 0)),
    "star": tuple(
        (STAR * u, STAR * v + STAR_DROP, 0)
        for u, v in ((0, -1), (-0.951057, -0.309017), (0.951057, -0.309017), (-SIN36, COS36), (SIN36, COS36))
    ),
    "heart": (
        (-_TIP / 2, HEART_DROP - _TIP / 2, HEART),
        (_TIP / 2, HEART_DROP - _TIP / 2, HEART),
        (0, HEART_DROP + _TIP, 0),
    ),
    "cross": tuple((u, v, 0) for a in (-1, 1) for b in (-0.34, 0.34) for u, v in ((a, b), (b, a))),
    "ring": ((0, 0, 1),),
    "diamond": ((-0.8625, 0, 0), (0.8625, 0, 0), (0, -1.15, 0), (0, 1.15, 0)),
}


def direction(turns: float) -> tuple[float, float]:
    """Cosine and sine, rounded so that mathematical libraries agree on them."""
    return round(math.cos(2 * math.pi * turns), 7), round(math.sin(2 * math.pi * turns), 7)


@dataclass(frozen=True)
class SceneObject:
    shape: str
    colour: str
    size: str
    cell: tuple[int, int]  # row, column of the 3 × 3 grid
    x: float  # the centre and the diameter, in fractions of the frame
    y: float
    diameter: float
    tilt: float  # in turns
    texture: Pattern
    texture_strength: float
    outline: float  # width in fractions of the frame
    outline_shade: float
    relief: float

    @property
    def box(self) -> Box:
        """The tight box around the shape."""
        cos, sin = direction(self.tilt)
        radius = self.diameter / 2
        spots = [(cos * u - sin * v, sin * u + cos * v, r) for u, v, r in OUTLINES[self.shape]]
        return (
            self.x + radius * min(u - r for u, _, r in spots),
            self.y + radius * min(v - r for _, v, r in spots),
            self.x + radius * max(u + r for u, _, r in spots),
            self.y + radius * max(v + r for _, v, r in spots),
        )


@dataclass(frozen=True)
class Bar:
    """A piece of clutter."""

    x: float
    y: float
    length: float
    width: float
    angle: float
    colour: RGB


@dataclass(frozen=True)
class Scene:
    seed: int
    split: str
    index: int
    objects: tuple[SceneObject, ...]
    background: Pattern
    background_colours: tuple[RGB, RGB]
    clutter: tuple[Bar, ...]
    shadow: float
    tint: RGB  # added to every colour; its luma is zero
    saturation: float
    gain: float
    light: tuple[float, float]  # how much brighter towards the right and the bottom
    blur: float  # sigma in fractions of the frame


# ---------------------------------------------------------------- which scene


@lru_cache(maxsize=4096)
def make_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of a split at an index; how many others there are makes no difference."""
    draws = Draws(generator(seed, 0, index, 0, f"scenes/{split}"), block=128)
    shifted = split == "shifted"
    number = (1, 2, 2, 2, 3)[int(draws() * 5)]
    cells = draws.shuffled([(row, column) for row in range(3) for column in range(3)])[:number]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < number:
        pair = (draws.pick(SHAPES), draws.pick(tuple(COLOURS)))
        if split == "combinations":
            allowed = bool(pairs) or pair in HELD_OUT
        else:
            allowed = pair not in HELD_OUT
        if allowed and pair not in pairs:
            pairs.append(pair)
    objects = tuple(_object(draws, *pair, cell) for pair, cell in zip(pairs, cells))
    ground = _ground_colour(draws, (225.0, 114.0, 26.0)[max(0, int(draws() * 6) - 3)])
    kind = draws.pick(SHIFTED_PATTERNS if shifted else PATTERNS)
    bars = range(int(draws(6, 13)) if shifted else int(draws(0, 8)))
    tint = 26.0 if shifted else 10.0
    red, blue = draws(-tint, tint), draws(-tint, tint)
    return Scene(
        seed, split, index, objects,
        background=_pattern(draws, kind, 0.05, 0.35),
        background_colours=(ground, _nearby(draws, ground)),
        clutter=tuple(
            Bar(draws(), draws(), draws(0.012, 0.05), draws(0.005, 0.01), draws(), _nearby(draws, ground, 20.0, 16.0))
            for _ in bars
        ),
        shadow=draws(0.0, 0.3),
        tint=(red, -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1], blue),
        saturation=draws(0.8, 1.05),
        gain=draws(0.6, 0.8) if shifted else draws(0.85, 1.03),
        light=(draws(-0.2, 0.2), draws(-0.2, 0.2)),
        blur=draws(0.008, 0.018) if shifted else max(0.0, draws(-0.014, 0.012)),
    )  # fmt: skip


def _object(draws: Draws, shape: str, colour: str, cell: tuple[int, int]) -> SceneObject:
    size = draws.pick(tuple(SIZES))
    diameter = SIZES[size] * draws(0.97, 1.03)
    room = min(0.08, max(0.0, 1 / 6 - 0.6 * diameter))  # for the centre, so that the shape stays in its cell
    return SceneObject(
        shape, colour, size, cell,
        x=(cell[1] + 0.5) / 3 + draws(-room, room),
        y=(cell[0] + 0.5) / 3 + draws(-room, room),
        diameter=diameter,
        tilt=draws(-0.025, 0.025),
        texture=_pattern(draws, draws.pick(TEXTURES), 0.3, 1.2),
        texture_strength=draws(0.05, 0.18),
        outline=max(0.0, draws(-0.008, 0.012)),
        outline_shade=draws(0.5, 0.75),
        relief=draws(0.0, 0.16),
    )  # fmt: skip


def _pattern(draws: Draws, kind: str, low: float, high: float) -> Pattern:
    scale = low * (high / low) ** draws()
    return Pattern(kind, round(scale, 6), draws(), draws(), draws())


def _ground_colour(draws: Draws, level: float) -> RGB:
    """Light, middling or dark, and always away from the two lumas of the objects."""
    return _nearby(draws, (level, level, level), 10.0, 18.0)


def _nearby(draws: Draws, colour: RGB, level: float = 12.0, chroma: float = 9.0) -> RGB:
    shift, red, blue = draws(-level, level), draws(-chroma, chroma), draws(-chroma, chroma)
    green = -(LUMA[0] * red + LUMA[2] * blue) / LUMA[1]
    return colour[0] + shift + red, colour[1] + shift + green, colour[2] + shift + blue
