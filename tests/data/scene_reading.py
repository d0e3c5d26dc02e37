"""Reads captions of scenes and checks facts against boxes, independently of how they were made."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from coalign.data.scene_captions import SYNONYMS

RELATIONS = {"left_of", "right_of", "above", "below", "bigger_than", "smaller_than"}
SHAPES = {"circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond"}
COLOURS = {"red", "pink", "brown", "gold", "green", "lime", "blue", "cyan"}
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
    """The words, sorted, whatever their article, number and synonym."""
    text = _WORD.sub(lambda found: f"<{_WORDS[found[1]]}>", caption)
    return sorted(re.findall(r"<\w+>|\band\b", text))


def read(caption: str) -> tuple[set[Fact], set[str]]:
    """The facts a caption states, and the shapes it speaks of as the only one of their kind."""
    text = _WORD.sub(lambda found: f"<{_WORDS[found[1]]}>", caption)
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
        elif word in COLOURS | SIZES:
            if predicate and not relation:
                facts.add(("colour" if word in COLOURS else "size", subject, word))
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
                facts |= {("colour" if a in COLOURS else "size", word, a) for a in adjectives}
                if relation:
                    facts.add(plain(relation, subject, word))
                else:
                    subject, predicate = word, False
                    bare.add(word)
            number = relation = ""
            adjectives, the = [], False
        else:
            assert token in {"a", "an", "and", "there", "are", "in", "all", "that"}, (token, caption)
    described = {shape for fact in facts for shape in fact[1:]}
    return facts | {("shape", shape, "") for shape in bare - described}, definite


def plain(kind: str, a: str, b: str) -> Fact:
    turned = {"right_of": "left_of", "below": "above", "smaller_than": "bigger_than"}
    return (turned[kind], b, a) if kind in turned else (kind, a, b)


def holds(fact: Sequence[str], objects: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a fact is true of a clean picture, from the objects' names and boxes."""
    kind, a, b = fact
    chosen = [o for o in objects if a in (o["shape"], "object")]
    if kind == "count":
        return len(chosen) == int(b)
    if kind == "shape":
        return bool(chosen)
    if kind in ("colour", "size"):
        return any(o[kind] == b for o in chosen)
    if kind == "side":
        spots = [_middle(o["box"]) for o in chosen]
        return any({"left": x < 0.4, "right": x > 0.6, "top": y < 0.4, "bottom": y > 0.6}[b] for x, y in spots)
    if kind == "bigger_than":
        order = ["small", "medium", "big"]
        return any(order.index(o["size"]) > order.index(p["size"]) for o in chosen for p in objects if p["shape"] == b)
    pairs = [(o["box"], p["box"]) for o in chosen for p in objects if p["shape"] == b]
    if kind == "left_of":
        return any(_middle(p)[0] < _middle(q)[0] for p, q in pairs)
    assert kind == "above"
    return any(_middle(p)[1] < _middle(q)[1] for p, q in pairs)


def _middle(box: Sequence[float]) -> tuple[float, float]:
    return (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
