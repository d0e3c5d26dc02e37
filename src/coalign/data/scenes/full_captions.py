"""Captions that describe every object of a scene, and their foils: the levels simple and standard.

A simple caption states every object's color, shape and side, from left to right, with one word for each thing. A standard caption states
sizes and places as well, leaves some of these out, and varies the words, their order and the order of the objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from coalign.data.scenes.captions import OPPOSITE_SIDES, SYNONYMS, Fact, true_facts
from coalign.data.scenes.layout import COLORS, HELD_OUT, SHAPES, SIZES, BufferedRandom, Scene

SIMPLE_KINDS = ("shape", "colour", "side")  # of the facts in simple captions
STANDARD_KINDS = ("shape", "colour", "size", "side")
LEFT_OUT = 0.2  # of the colors, sizes and places in standard captions
_ROWS, _COLUMNS = ("top", "middle", "bottom"), ("left", "center", "right")
_UPPER = {"top": "upper", "middle": "middle", "bottom": "lower"}
_AT_THE_TOP = {"top": "at the top", "middle": "halfway up", "bottom": "at the bottom"}
_ON_THE_LEFT = {"left": "on the left", "center": "in the center", "right": "on the right"}


class Description(NamedTuple):
    """What a caption states of one object. An empty string is left out. Without a column there is no row."""

    shape: str
    color: str
    size: str
    row: str
    column: str

    def facts(self) -> list[Fact]:
        values = (("colour", self.color), ("size", self.size), ("side", self.row), ("side", self.column))
        stated = [Fact(kind, self.shape, value) for kind, value in values if value]
        return stated or [Fact("shape", self.shape, "")]


class Style(NamedTuple):
    """How a caption is worded. The default words simple captions. A caption and its foil share it."""

    order: str = "adjectives first"
    frame: str = "{}"
    place: int = 0  # at the upper left, in the top left, at the top on the left
    words: Mapping[str, str] = MappingProxyType({})  # synonyms of shapes, colors and sizes
    sorts: bool = True  # names the objects from left to right

    @classmethod
    def sample(cls, rng: BufferedRandom) -> Style:
        """Samples the style of a standard caption: two words for each thing, three orders, three ways to name a place."""
        order = rng.choice(tuple(_FRAMES))
        words = {name: rng.choice(SYNONYMS[name][:2]) for name in (*SHAPES, *COLORS, *SIZES)}
        return cls(order, rng.choice(_FRAMES[order]), int(rng() * 3), words, sorts=False)


_PICTURES = ("{}", "a picture of {}", "an image with {}", "here we see {}")
_FRAMES = {"adjectives first": _PICTURES, "adjectives last": _PICTURES, "place first": ("{}", "in this picture, {}")}


# ---------------------------------------------------------------- captions


def simple_caption(scene: Scene) -> tuple[str, list[Fact]]:
    """Returns the caption of a simple scene, and its facts."""
    objects = _describe_simply(scene)
    return _render(objects, Style()), _facts(objects)


def standard_captions(scene: Scene, generator: np.random.Generator, num_captions: int) -> list[tuple[str, list[Fact]]]:
    """Samples distinct captions. Returns each with the facts that it states."""
    rng = BufferedRandom(generator, block_size=160)
    captions: dict[str, list[Fact]] = {}
    while len(captions) < num_captions:
        objects = _leave_out(_describe(scene), rng)
        captions[_render(objects, Style.sample(rng))] = _facts(objects)
    return list(captions.items())


def _describe(scene: Scene) -> list[Description]:
    return [
        Description(item.shape, item.color, item.size, _ROWS[item.cell[0]], _COLUMNS[item.cell[1]])
        for item in scene.objects
    ]


def _describe_simply(scene: Scene) -> list[Description]:
    """Describes a simple scene by shapes, colors and sides.

    These are so few that images of a batch share colors and sides, so that a model has to learn shapes.
    """
    return [item._replace(size="", row="") for item in _describe(scene)]


def _leave_out(objects: Sequence[Description], rng: BufferedRandom) -> list[Description]:
    """Leaves out some attributes, and shuffles the objects."""
    kept = []
    for item in rng.shuffled(objects):
        shape, color, size, row, column = item
        has_place = rng() >= LEFT_OUT
        kept.append(
            Description(
                shape,
                color if rng() >= LEFT_OUT else "",
                size if rng() >= LEFT_OUT else "",
                row if has_place else "",
                column if has_place else "",
            )
        )
    return kept


def _facts(objects: Sequence[Description]) -> list[Fact]:
    return list(dict.fromkeys(fact for item in objects for fact in item.facts()))


def _render(objects: Sequence[Description], style: Style) -> str:
    if style.sorts:
        objects = sorted(objects, key=lambda item: _COLUMNS.index(item.column))
    phrases = [_phrase(item, style) for item in objects]
    return style.frame.format(" and ".join(filter(None, [", ".join(phrases[:-1]), phrases[-1]])))


def _phrase(item: Description, style: Style) -> str:
    """Returns a phrase such as "a pink diamond on the left" or "a diamond at the upper left that is big and pink"."""
    shape, *adjectives = (style.words.get(name, name) for name in (item.shape, item.size, item.color) if name)
    place = [_place(item.row, item.column, style.place)] if item.column else []
    if style.order == "adjectives last":
        clause = [f"that is {' and '.join(adjectives)}"] if adjectives else []
        return " ".join([_with_article(shape), *place, *clause])
    noun = _with_article(" ".join([*adjectives, shape]))
    return " ".join([*place, noun] if style.order == "place first" else [noun, *place])


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _place(row: str, column: str, way: int) -> str:
    if not row:
        return _ON_THE_LEFT[column]
    if way == 2:
        return f"{_AT_THE_TOP[row]} {_ON_THE_LEFT[column]}"
    if (row, column) == ("middle", "center"):
        return ("at the center", "in the middle")[way]
    return f"at the {_UPPER[row]} {column}" if way == 0 else f"in the {row} {column}"


# captions of one object, for its name, such as "pink heart"
SIMPLE_PROMPTS = tuple(f"a {{}} {_ON_THE_LEFT[column]}" for column in ("left", "right"))
STANDARD_PROMPTS = tuple(
    f"a {size} {{}} {_place(row, column, 0)}" for size in SIZES for row in _ROWS for column in _COLUMNS
)


# ---------------------------------------------------------------- foils


def full_foils(scene: Scene, kind: str, generator: np.random.Generator, simple: bool) -> tuple[str, str, str] | None:
    """Samples (true caption, foil, how the foil was made) of a kind. Returns None if the sampled caption has no such foil.

    "replace" changes one object's shape, color, size or side, and "swap" exchanges these of two objects. As in `foils`, the captions alone
    do not reveal which one is true.
    """
    rng = BufferedRandom(generator, block_size=160)
    true = _describe_simply(scene) if simple else _leave_out(_describe(scene), rng)
    style = Style() if simple else Style.sample(rng)
    truth = true_facts(scene)
    for how in rng.shuffled(("replace", "swap")):
        changes = _replaced(true, kind) if how == "replace" else _swapped(true, kind)
        for false in rng.shuffled(list(changes)):
            if _is_fair(true, false) and not truth.issuperset(_facts(false)):
                return _render(true, style), _render(false, style), how
    return None


def _replaced(true: Sequence[Description], kind: str) -> Iterator[list[Description]]:
    for number, item in enumerate(true):
        for changed in _changed(item, kind):
            yield [*true[:number], changed, *true[number + 1 :]]


def _changed(item: Description, kind: str) -> list[Description]:
    """Returns the description with every other value of a kind; for the side, mirrored."""
    if kind == "side":
        mirrored = (OPPOSITE_SIDES.get(item.row), OPPOSITE_SIDES.get(item.column))
        return [item._replace(**{name: side}) for name, side in zip(("row", "column"), mirrored) if side]
    name = "color" if kind == "colour" else kind
    old, values = getattr(item, name), {"shape": SHAPES, "color": COLORS, "size": SIZES}[name]
    return [item._replace(**{name: value}) for value in values if value != old] if old else []


def _swapped(true: Sequence[Description], kind: str) -> Iterator[list[Description]]:
    names = {"colour": ("color",), "side": ("row", "column")}.get(kind, (kind,))
    for first in range(len(true)):
        for second in range(first):
            a, b = ({name: getattr(true[i], name) for name in names} for i in (first, second))
            if a[names[-1]] and b[names[-1]]:
                false = list(true)
                false[first], false[second] = true[first]._replace(**b), true[second]._replace(**a)
                yield false


def _is_fair(true: Sequence[Description], false: Sequence[Description]) -> bool:
    """Whether the foil could be true of another scene of the split.

    No two objects of a scene have the same place, or the same color and shape, and held-out combinations of these are in both captions or
    in neither.
    """
    places = [(item.row, item.column) for item in false if item.column]
    looks = [(item.shape, item.color) for item in false if item.color]
    held_out = [sum((item.shape, item.color) in HELD_OUT for item in objects) for objects in (true, false)]
    return len({*places}) == len(places) and len({*looks}) == len(looks) and held_out[0] == held_out[1]
