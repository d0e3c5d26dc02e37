"""Foils: false captions of a scene that differ from a true caption in one kind of fact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coalign.data.scenes.captions import (
    INVERSES,
    OPPOSITE_SIDES,
    RELATIONS,
    Fact,
    Wording,
    can_add,
    canonical_fact,
    caption_facts,
    inverse,
    render_caption,
    repeated_shapes,
    sample_facts,
    shapes_of,
    true_facts,
)
from coalign.data.scenes.layout import COLORS, HELD_OUT, SHAPES, SIZES, BufferedRandom, Scene

Facts = list[Fact]


class _FoilContext(NamedTuple):
    """A scene, prepared for making foils."""

    rng: BufferedRandom
    facts: Mapping[str, Sequence[Fact]]  # what captions may state, by kind
    repeated: frozenset[str]
    truth: frozenset[Fact]
    num_objects: int


def foils(scene: Scene, kind: str, generator: np.random.Generator) -> tuple[str, str, str] | None:
    """Samples (true caption, foil, how the foil was made). Returns None if the scene has no suitable facts of this kind.

    "replace" makes one fact false, "swap" swaps words (not for shapes), and "add" adds a false fact. Both captions use the same template
    and synonyms. After "replace" or "swap", the captions alone do not reveal which one is true: true and false values are equally frequent,
    and held-out combinations of color and shape are in both or in neither. After "add" they do: the foil is longer.
    """
    rng = BufferedRandom(generator)
    context = _FoilContext(rng, caption_facts(scene), repeated_shapes(scene), true_facts(scene), len(scene.objects))
    for how in rng.shuffled(tuple(_MAKERS)):
        pair = _MAKERS[how](kind, context)
        if pair is None or not _is_fair(*pair, how, scene):
            continue
        wording = Wording.sample(rng)
        if how == "swap" and "{phrases}" not in wording.template and len(pair[0]) > 1 and kind in RELATIONS:
            # Clauses join colors and relations by "and", noun phrases do not: a swap would change the number of words.
            wording = wording._replace(template="{phrases}")
        true, false = (render_caption(facts, wording, context.repeated) for facts in pair)
        return true, false, how
    return None


def _is_fair(true: Facts, false: Facts, how: str, scene: Scene) -> bool:
    """Whether held-out combinations of color and shape do not reveal which caption is true."""
    held_out_true, held_out_false = (
        sum(fact.kind == "colour" and (fact.subject, fact.value) in HELD_OUT for fact in facts)
        for facts in (true, false)
    )
    return held_out_true == held_out_false or (how == "add" and scene.split == "combinations")


def _is_consistent(facts: Facts, context: _FoilContext) -> bool:
    return all(can_add(facts[:i], fact, context.repeated) for i, fact in enumerate(facts))


def _falsify(fact: Fact, context: _FoilContext) -> Fact | None:
    """Returns the fact with another value, or None if that also holds in the scene."""
    kind, subject, value = fact
    if kind == "shape":
        false = Fact(
            kind, context.rng.choice([shape for shape in SHAPES if Fact(kind, shape, "") not in context.truth]), ""
        )
    elif kind == "colour":
        held_out = (subject, value) in HELD_OUT
        values = [color for color in COLORS if color != value and ((subject, color) in HELD_OUT) == held_out]
        false = Fact(kind, subject, context.rng.choice(values))
    elif kind == "size":
        false = Fact(kind, subject, context.rng.choice([size for size in SIZES if size != value]))
    elif kind == "side":
        false = Fact(kind, subject, OPPOSITE_SIDES[value])
    elif kind == "count":
        false = Fact(kind, subject, context.rng.choice([number for number in "123" if number != value]))
    else:
        false = Fact(inverse(fact).kind, subject, value)  # if a is left of b, "a is right of b" is false
    return None if canonical_fact(false) in context.truth else false


def _random_direction(fact: Fact, rng: BufferedRandom) -> Fact:
    return inverse(fact) if fact.kind in INVERSES and rng() < 0.5 else fact


def _replace(kind: str, context: _FoilContext) -> tuple[Facts, Facts] | None:
    facts = [fact for fact in context.facts[kind] if kind != "count" or fact.subject == "object"]
    # One, two and three objects occur in the ratio 1 : 3 : 1. Using two thirds of the twos makes the (true, false) counts (1, 2), (2, 1),
    # (2, 3) and (3, 2) equally frequent. There is no (1, 3).
    if not facts or (kind == "count" and context.num_objects == 2 and context.rng() < 1 / 3):
        return None
    fact = _random_direction(context.rng.choice(facts), context.rng)
    if kind == "count":
        false: Fact | None = Fact(kind, "object", context.rng.choice("13") if context.num_objects == 2 else "2")
    else:
        false = _falsify(fact, context)
    if false is None:
        return None
    others = sample_facts(context.facts, context.repeated, context.rng, int(context.rng() * 2), [fact], exclude=kind)
    return [fact, *others], [false, *others]


def _swap(kind: str, context: _FoilContext) -> tuple[Facts, Facts] | None:
    facts = context.facts[kind]
    if kind in RELATIONS:
        if not facts:
            return None
        fact = _random_direction(context.rng.choice(facts), context.rng)
        others = sample_facts(
            context.facts, context.repeated, context.rng, int(context.rng() * 2), [fact], exclude=kind
        )
        false = [Fact(fact.kind, fact.value, fact.subject), *others]
        return ([fact, *others], false) if _is_consistent(false, context) else None
    if kind == "count":
        shapes = {fact.subject: fact.value for fact in context.truth if fact.kind == kind and fact.subject != "object"}
        facts = [Fact(kind, shape, value) for shape, value in sorted(shapes.items())]
    pairs = [
        (a, b)
        for a in facts
        for b in facts
        if a.subject != b.subject and a.value != b.value and kind != "shape"
        if kind != "side" or OPPOSITE_SIDES[a.value] == b.value
        if context.truth.isdisjoint((Fact(kind, a.subject, b.value), Fact(kind, b.subject, a.value)))
    ]
    if not pairs:
        return None
    a, b = context.rng.choice(pairs)
    return [a, b], [Fact(kind, a.subject, b.value), Fact(kind, b.subject, a.value)]


def _add(kind: str, context: _FoilContext) -> tuple[Facts, Facts] | None:
    true = sample_facts(context.facts, context.repeated, context.rng, 1 + int(context.rng() * 2), exclude=kind)
    mentioned = {shape for fact in true for shape in shapes_of(fact)}
    facts = [fact for fact in context.facts[kind] if kind in ("shape", "count") or mentioned & set(shapes_of(fact))]
    if not facts:
        return None
    false = _falsify(_random_direction(context.rng.choice(facts), context.rng), context)
    if false is None:
        return None
    # "a circle" becomes "a red circle", not "a circle and a red circle".
    stated = [fact for fact in true if fact.kind != "shape" or fact.subject not in shapes_of(false)]
    return (true, [*stated, false]) if true and can_add(stated, false, context.repeated) else None


_MAKERS: dict[str, Callable[[str, _FoilContext], tuple[Facts, Facts] | None]] = {
    "replace": _replace,
    "swap": _swap,
    "add": _add,
}
