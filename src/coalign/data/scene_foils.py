"""Two captions of one scene that differ in one kind of fact: one is true, the other, its foil, is false."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coalign.data.scene_captions import (
    OPPOSITE_SIDES,
    OPPOSITES,
    RELATIONS,
    Fact,
    Wording,
    as_fact,
    choose_facts,
    fits,
    repeated_shapes,
    say,
    sayable,
    shapes_of,
    true_facts,
    turned,
)
from coalign.data.scene_layout import COLOURS, HELD_OUT, SHAPES, SIZES, Draws, Scene

Facts = list[Fact]


class _Case(NamedTuple):
    """A scene as the makers of foils need it."""

    draws: Draws
    sayable: Mapping[str, Sequence[Fact]]
    repeated: frozenset[str]
    truth: frozenset[Fact]
    number: int  # of objects


def foils(scene: Scene, kind: str, source: np.random.Generator) -> tuple[str, str, str] | None:
    """(true caption, false caption, how) with how one of "replace", "swap", "add"; None without such facts.

    replace: one fact becomes false; swap: the same words in another order (none for shapes); add: one false fact more.
    Both captions have the same template and synonyms. From the captions alone "replace" and "swap" cannot be told: true
    and false values are equally frequent, and a colour and shape that never meet in training are in both captions or in
    neither. "add" can: its false caption is the longer one.
    """
    draws = Draws(source)
    case = _Case(draws, sayable(scene), repeated_shapes(scene), true_facts(scene), len(scene.objects))
    for how in draws.shuffled(tuple(_MAKERS)):
        pair = _MAKERS[how](kind, case)
        if pair is None or not _fair(*pair, how, scene):
            continue
        wording = Wording.drawn(draws)
        if how == "swap" and "{things}" not in wording.template and len(pair[0]) > 1 and kind in RELATIONS:
            wording = wording._replace(template="{things}")  # claims join traits and places by "and", adjectives do not
        return say(pair[0], wording, case.repeated), say(pair[1], wording, case.repeated), how
    return None


def _fair(true: Facts, false: Facts, how: str, scene: Scene) -> bool:
    novel_true, novel_false = (
        sum(fact.kind == "colour" and (fact.subject, fact.value) in HELD_OUT for fact in facts)
        for facts in (true, false)
    )
    return novel_true == novel_false or (how == "add" and scene.split == "combinations")


def _consistent(facts: Facts, case: _Case) -> bool:
    return all(fits(facts[:i], fact, case.repeated) for i, fact in enumerate(facts))


def _falsified(fact: Fact, case: _Case) -> Fact | None:
    """The fact with another value, or none if that is true too."""
    kind, subject, value = fact
    if kind == "shape":
        false = Fact(kind, case.draws.pick([shape for shape in SHAPES if Fact(kind, shape, "") not in case.truth]), "")
    elif kind == "colour":
        novel = (subject, value) in HELD_OUT
        values = [colour for colour in COLOURS if colour != value and ((subject, colour) in HELD_OUT) == novel]
        false = Fact(kind, subject, case.draws.pick(values))
    elif kind == "size":
        false = Fact(kind, subject, case.draws.pick([size for size in SIZES if size != value]))
    elif kind == "side":
        false = Fact(kind, subject, OPPOSITE_SIDES[value])
    elif kind == "count":
        false = Fact(kind, subject, case.draws.pick([number for number in "123" if number != value]))
    else:
        other = turned(fact)  # a is left of b, b is right of a: so a is right of b is false
        false = Fact(other.kind, subject, value)
    return None if as_fact(false) in case.truth else false


def _either_way(fact: Fact, draws: Draws) -> Fact:
    return turned(fact) if fact.kind in OPPOSITES and draws() < 0.5 else fact


def _replace(kind: str, case: _Case) -> tuple[Facts, Facts] | None:
    facts = [fact for fact in case.sayable[kind] if kind != "count" or fact.subject == "object"]
    # One, two and three objects are shown 1 : 3 : 1; as 1 against 2, 2 against 1, 2 against 3 and 3 against 2 must be
    # equally frequent, only two thirds of the twos are used, and never 1 against 3.
    if not facts or (kind == "count" and case.number == 2 and case.draws() < 1 / 3):
        return None
    fact = _either_way(case.draws.pick(facts), case.draws)
    if kind == "count":
        false: Fact | None = Fact(kind, "object", case.draws.pick("13") if case.number == 2 else "2")
    else:
        false = _falsified(fact, case)
    if false is None:
        return None
    rest = choose_facts(case.sayable, case.repeated, case.draws, int(case.draws() * 2), [fact], without=kind)
    return [fact, *rest], [false, *rest]


def _swap(kind: str, case: _Case) -> tuple[Facts, Facts] | None:
    facts = case.sayable[kind]
    if kind in RELATIONS:
        if not facts:
            return None
        fact = _either_way(case.draws.pick(facts), case.draws)
        rest = choose_facts(case.sayable, case.repeated, case.draws, int(case.draws() * 2), [fact], without=kind)
        false = [Fact(fact.kind, fact.value, fact.subject), *rest]
        return ([fact, *rest], false) if _consistent(false, case) else None
    if kind == "count":
        shapes = {fact.subject: fact.value for fact in case.truth if fact.kind == kind and fact.subject != "object"}
        facts = [Fact(kind, shape, value) for shape, value in sorted(shapes.items())]
    pairs = [
        (a, b)
        for a in facts
        for b in facts
        if a.subject != b.subject and a.value != b.value and kind != "shape"
        if kind != "side" or OPPOSITE_SIDES[a.value] == b.value
        if case.truth.isdisjoint((Fact(kind, a.subject, b.value), Fact(kind, b.subject, a.value)))
    ]
    if not pairs:
        return None
    a, b = case.draws.pick(pairs)
    return [a, b], [Fact(kind, a.subject, b.value), Fact(kind, b.subject, a.value)]


def _add(kind: str, case: _Case) -> tuple[Facts, Facts] | None:
    true = choose_facts(case.sayable, case.repeated, case.draws, 1 + int(case.draws() * 2), without=kind)
    mentioned = {shape for fact in true for shape in shapes_of(fact)}
    facts = [fact for fact in case.sayable[kind] if kind in ("shape", "count") or mentioned & set(shapes_of(fact))]
    if not facts:
        return None
    false = _falsified(_either_way(case.draws.pick(facts), case.draws), case)
    if false is None:
        return None
    # "a circle" becomes "a red circle", not "a circle and a red circle".
    said = [fact for fact in true if fact.kind != "shape" or fact.subject not in shapes_of(false)]
    return (true, [*said, false]) if true and fits(said, false, case.repeated) else None


_MAKERS: dict[str, Callable[[str, _Case], tuple[Facts, Facts] | None]] = {
    "replace": _replace,
    "swap": _swap,
    "add": _add,
}
