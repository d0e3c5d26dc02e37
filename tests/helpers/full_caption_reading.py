"""Parses captions that describe every object of a scene, and compares them with boxes, independently of the code that generates them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise, permutations
from typing import Any

from helpers.scene_reading import COLORS, SHAPES, SIZES

from coalign.data.scenes.captions import SYNONYMS

_NAMES = {word: name for name in (*SHAPES, *COLORS, *SIZES) for word in SYNONYMS[name]}
_ROWS = {"upper": 0, "top": 0, "middle": 1, "halfway up": 1, "lower": 2, "bottom": 2}
_COLUMNS = {"left": 0, "center": 1, "right": 2}


def _any(names: set[str]) -> str:
    words = sorted((re.escape(word) for word, name in _NAMES.items() if name in names), key=len, reverse=True)
    return f"(?:{'|'.join(words)})"


_PLACE = (
    r"(?:at the (?:upper|middle|lower) (?:left|center|right)|in the (?:top|middle|bottom) (?:left|center|right)|at the center|in the "
    r"middle|(?:at the top|halfway up|at the bottom) (?:on the left|in the center|on the right)|on the (?:left|right))"
)
_PHRASE = re.compile(
    rf"(?:(?P<first>{_PLACE}) )?an? (?:(?P<size>{_any(SIZES)}) )?(?:(?P<colour>{_any(COLORS)}) )?(?P<shape>{_any(SHAPES)})(?![\w-])"
    rf"(?: (?P<place>{_PLACE}))?(?: that is (?P<adjectives>{_any(SIZES | COLORS)}(?: and {_any(COLORS)})?))?"
)
_FRAME = re.compile(r"(?:a picture of |an image with |here we see |in this picture, )?(.*)")


def parse_full_caption(caption: str) -> list[dict[str, Any]]:
    """Returns what a caption states of each object it names: some of shape, colour, size and cell."""
    body = _FRAME.fullmatch(caption)[1]
    matches = list(_PHRASE.finditer(body))
    between = [body[a.end() : b.start()] for a, b in pairwise(matches)]
    assert matches[0].start() == 0, caption
    assert matches[-1].end() == len(body), caption
    assert between == [", "] * (len(matches) - 2) + [" and "] * (len(matches) > 1), caption
    return [_description(match) for match in matches]


def _description(match: re.Match[str]) -> dict[str, Any]:
    found: dict[str, Any] = {"shape": _NAMES[match["shape"]]}
    words = [match["size"], match["colour"], *(match["adjectives"] or "").split(" and ")]
    for name in (_NAMES[word] for word in words if word):
        found["size" if name in SIZES else "colour"] = name
    if place := match["first"] or match["place"]:
        row = None if place in ("on the left", "on the right") else _value(place, _ROWS)  # None: not stated
        found["cell"] = [row, _value(place, _COLUMNS)]
    return found


def _value(place: str, names: Mapping[str, int]) -> int:
    return next((number for name, number in names.items() if re.search(rf"\b{name}\b", place)), 1)


def describes(descriptions: Sequence[Mapping[str, Any]], objects: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the descriptions can be assigned to all objects, one to one, such that each is true by labels and boxes."""
    if len(descriptions) != len(objects):
        return False
    truths = [
        {"shape": o["shape"], "colour": o["colour"], "size": o["size"], "cell": (_cell(o["box"]), _half(o["box"]))}
        for o in objects
    ]
    return any(
        all(
            value in truth[name] if name == "cell" else value == truth[name]
            for found, truth in zip(descriptions, order)
            for name, value in found.items()
        )
        for order in permutations(truths)
    )


def _cell(box: Sequence[float]) -> list[int]:
    return [int(3 * (box[1] + box[3]) / 2), int(3 * (box[0] + box[2]) / 2)]


def _half(box: Sequence[float]) -> list[int | None]:
    return [None, 0 if box[0] + box[2] < 1 else 2]


def stated_facts(descriptions: Sequence[Mapping[str, Any]]) -> set[tuple[str, str, str]]:
    """Returns the facts that the descriptions state, as in `Record.facts`."""
    facts = set()
    for found in descriptions:
        shape = found["shape"]
        stated = {(kind, shape, found[kind]) for kind in ("colour", "size") if kind in found}
        if "cell" in found:
            row, column = found["cell"]
            stated.add(("side", shape, ("left", "center", "right")[column]))
            if row is not None:
                stated.add(("side", shape, ("top", "middle", "bottom")[row]))
        facts |= stated or {("shape", shape, "")}
    return facts
