"""Parses captions of scenes and checks facts against boxes, independently of the code that generates them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from coalign.data.scenes.captions import SYNONYMS
from coalign.data.scenes.layout import Scene

RELATIONS = {"left_of", "right_of", "above", "below", "bigger_than", "smaller_than"}
SHAPES = {"circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond"}
COLORS = {"red", "pink", "brown", "gold", "green", "lime", "blue", "cyan"}
SIZES = {"small", "medium", "big"}
SIDES = {"left", "right", "top", "bottom"}
_WORDS = {text: name for name, texts in SYNONYMS.items() for text in texts}
_WORD = re.compile(
    r"(?<![\w-])(" + "|".join(sorted(map(re.escape, _WORDS), key=len, reverse=True)) + r")(?:es|s)?(?![\w-])"
)
_FRAMES = (
    r"this is an? <picture> that shows (.*)",
    r"an? <picture> (?:of|with|in which) (.*)",
    r"here we see (.*)",
    r"you can find (.*) here",
    r"(.*)",
)
Fact = tuple[str, str, str]


def words(caption: str) -> list[str]:
    """Returns the sorted words of a caption, with synonyms and plurals normalized, without articles."""
    text = _WORD.sub(lambda match: f"<{_WORDS[match[1]]}>", caption)
    return sorted(re.findall(r"<\w+>|\band\b", text))


def parse_caption(caption: str) -> tuple[set[Fact], set[str]]:
    """Returns the facts that a caption states, and the shapes that it mentions with a definite article."""
    text = _WORD.sub(lambda match: f"<{_WORDS[match[1]]}>", caption)
    body = next(match[1] for frame in _FRAMES if (match := re.fullmatch(frame, text)))
    facts: set[Fact] = set()
    definite: set[str] = set()
    bare: set[str] = set()
    number = relation = subject = ""
    adjectives: list[str] = []
    predicate, the = False, False
    for token in re.findall(r"<\w+>|[\w-]+", body):
        word = token.strip("<>")
        if token == "is":
            predicate = True
        elif token == "the":
            the = True
        elif word in ("1", "2", "3"):
            number = word
        elif word in COLORS | SIZES:
            if predicate and not relation:
                facts.add(("colour" if word in COLORS else "size", subject, word))
            else:
                adjectives.append(word)
        elif word in SIDES:
            facts.add(("side", subject, word))
        elif word in RELATIONS:
            relation = word
        elif word in SHAPES | {"object"}:
            if the:
                definite.add(word)
            if number:
                facts.add(("count", word, number))
            else:
                facts |= {("colour" if a in COLORS else "size", word, a) for a in adjectives}
                if relation:
                    facts.add(canonical(relation, subject, word))
                else:
                    subject, predicate = word, False
                    bare.add(word)
            number = relation = ""
            adjectives, the = [], False
        else:
            assert token in {"a", "an", "and", "there", "are", "in", "all", "that"}, (token, caption)
    described = {shape for fact in facts for shape in fact[1:]}
    return facts | {("shape", shape, "") for shape in bare - described}, definite


def canonical(kind: str, a: str, b: str) -> Fact:
    """Returns the fact with "right_of", "below" and "smaller_than" replaced by their inverses."""
    inverse = {"right_of": "left_of", "below": "above", "smaller_than": "bigger_than"}
    return (inverse[kind], b, a) if kind in inverse else (kind, a, b)


def objects_of(scene: Scene) -> list[dict[str, Any]]:
    """Returns the objects in the form of `Record.facts["objects"]`."""
    return [{"shape": o.shape, "colour": o.color, "size": o.size, "box": o.box} for o in scene.objects]


def holds(fact: Sequence[str], objects: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a fact holds for an image without augmentation, from the labels and boxes of its objects."""
    kind, a, b = fact
    subjects = [o for o in objects if a in (o["shape"], "object")]
    if kind == "count":
        return len(subjects) == int(b)
    if kind == "shape":
        return bool(subjects)
    if kind in ("colour", "size"):
        return any(o[kind] == b for o in subjects)
    if kind == "side":
        centers = [_center(o["box"]) for o in subjects]
        between = [0.4 <= z <= 0.6 for center in centers for z in center]
        if b in ("center", "middle"):
            return any(between[b == "middle" :: 2])
        return any({"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6}[b] for x, y in centers)
    if kind == "bigger_than":
        order = ["small", "medium", "big"]
        return any(
            order.index(o["size"]) > order.index(p["size"]) for o in subjects for p in objects if p["shape"] == b
        )
    pairs = [(o["box"], p["box"]) for o in subjects for p in objects if p["shape"] == b]
    if kind == "left_of":
        return any(_center(p)[0] < _center(q)[0] for p, q in pairs)
    assert kind == "above"
    return any(_center(p)[1] < _center(q)[1] for p, q in pairs)


def _center(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
