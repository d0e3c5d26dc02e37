"""What is true of a scene, before and after an augmentation, and how it is said.

A fact is atomic and names shapes, never positions in a list: ("colour", "circle", "red") holds when some visible circle
is red, ("left_of", "circle", "star") when some circle is left of some star, ("count", "circle", "2") when exactly two
circles are visible.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coalign.data.scene_layout import COLOURS, SIZES, Draws, Scene
from coalign.types import AugmentationParams


class Fact(NamedTuple):
    kind: str
    subject: str  # a shape, or "object" when all are counted
    value: str  # a shape for the relations; "" for the kind shape


KINDS = ("shape", "colour", "size", "bigger_than", "side", "left_of", "above", "count")
OPPOSITES = {"left_of": "right_of", "above": "below", "bigger_than": "smaller_than"}
_PLAIN = {opposite: kind for kind, opposite in OPPOSITES.items()}
OPPOSITE_SIDES = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}

SYNONYMS: dict[str, tuple[str, str, str]] = {
    "circle": ("circle", "disc", "ball"), "square": ("square", "box", "block"),
    "triangle": ("triangle", "wedge", "pyramid"), "star": ("star", "pentagram", "five-pointed star"),
    "heart": ("heart", "love heart", "valentine"), "cross": ("cross", "plus", "plus sign"),
    "ring": ("ring", "hoop", "annulus"), "diamond": ("diamond", "rhombus", "lozenge"),
    "red": ("red", "crimson", "scarlet"), "pink": ("pink", "rose", "salmon"),
    "brown": ("brown", "chestnut", "umber"), "gold": ("gold", "yellow", "amber"),
    "green": ("green", "emerald", "fir-green"), "lime": ("lime", "light green", "apple-green"),
    "blue": ("blue", "cobalt", "sapphire"), "cyan": ("cyan", "sky-blue", "azure"),
    "small": ("small", "little", "tiny"), "medium": ("medium", "medium-sized", "middle-sized"),
    "big": ("big", "large", "huge"),
    "left": ("on the left", "at the left", "on the left side"),
    "right": ("on the right", "at the right", "on the right side"),
    "top": ("at the top", "in the upper part", "near the top edge"),
    "bottom": ("at the bottom", "in the lower part", "near the bottom edge"),
    "left_of": ("to the left of", "left of", "on the left of"),
    "right_of": ("to the right of", "right of", "on the right of"),
    "above": ("above", "over", "higher than"), "below": ("below", "under", "lower than"),
    "bigger_than": ("bigger than", "larger than", "greater than"),
    "smaller_than": ("smaller than", "littler than", "tinier than"),
    "1": ("one", "a single", "exactly one"), "2": ("two", "a pair of", "exactly two"),
    "3": ("three", "a trio of", "exactly three"),
    "object": ("object", "shape", "thing"), "picture": ("picture", "image", "drawing"),
}  # fmt: skip
_ORDINAL = {word: position for position, word in enumerate(SYNONYMS)}
# {things}: "a red circle above a star"; {claims}: "the circle is red and above the star"; {picture}: with its article.
TEMPLATES = (
    "{things}",
    "{picture} of {things}",
    "this is {picture} that shows {things}",
    "{picture} with {things}",
    "here we see {things}",
    "you can find {things} here",
    "{claims}",
    "{picture} in which {claims}",
)


# ---------------------------------------------------------------- truth

VISIBLE = 0.5  # an object is seen when at least this share of its box lies in the crop
_SIDE_EDGE = 0.4  # "left": the centre lies in the left two fifths of the picture
_SIZE_NAMES = tuple(SIZES)
_SMALL_MEDIUM, _MEDIUM_BIG = ((a * b) ** 0.5 for a, b in zip(SIZES.values(), tuple(SIZES.values())[1:]))
_HUES = {name: colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))[0] for name, rgb in COLOURS.items()}
_AS_IT_IS = AugmentationParams()


class _Seen(NamedTuple):
    shape: str
    colour: str | None  # None: cannot be told
    diameter: float
    x: float
    y: float


def _colour_survives(colour: str, params: AugmentationParams) -> bool:
    """Not in grey; and when the hue was turned (as in HSV), its own must still be the nearest of its luma's four."""
    if params.greyed >= 0.5 or params.saturation <= -0.8:
        return False
    turned = _HUES[colour] + params.hue
    names = tuple(COLOURS)
    rivals = names[names.index(colour) % 2 :: 2]  # dark and light alternate
    return min(rivals, key=lambda name: abs((turned - _HUES[name] + 0.5) % 1.0 - 0.5)) == colour


def _seen(scene: Scene, params: AugmentationParams) -> list[_Seen]:
    out = []
    for item in scene.objects:
        box = item.box
        left, right = max(box[0], params.x), min(box[2], params.x + params.w)
        top, bottom = max(box[1], params.y), min(box[3], params.y + params.h)
        area = (box[2] - box[0]) * (box[3] - box[1])
        if max(0.0, right - left) * max(0.0, bottom - top) < VISIBLE * area:
            continue
        x = ((left + right) / 2 - params.x) / params.w
        out.append(
            _Seen(
                item.shape,
                item.colour if params is _AS_IT_IS or _colour_survives(item.colour, params) else None,
                item.diameter / (params.w * params.h) ** 0.5,
                1 - x if params.flipped >= 0.5 else x,
                ((top + bottom) / 2 - params.y) / params.h,
            )
        )
    return out


def true_facts(scene: Scene, params: AugmentationParams = _AS_IT_IS) -> frozenset[Fact]:
    """All facts that hold in the picture, or in the view of it that these parameters make.

    Sizes are relative to the frame, so a crop makes things bigger; shapes stay true as long as they are seen.
    """
    seen = _seen(scene, params)
    facts = {Fact("count", "object", str(len(seen)))}
    shapes = [item.shape for item in seen]
    for item in seen:
        facts.add(Fact("shape", item.shape, ""))
        facts.add(Fact("count", item.shape, str(shapes.count(item.shape))))
        rank = int(item.diameter > _SMALL_MEDIUM) + int(item.diameter > _MEDIUM_BIG)
        facts.add(Fact("size", item.shape, _SIZE_NAMES[rank]))
        if item.colour is not None:
            facts.add(Fact("colour", item.shape, item.colour))
        for position, low, high in ((item.x, "left", "right"), (item.y, "top", "bottom")):
            if abs(position - 0.5) > 0.5 - _SIDE_EDGE:
                facts.add(Fact("side", item.shape, low if position < 0.5 else high))
        for other in seen:
            if item.diameter > other.diameter * 1.1:  # less is the jitter within one size
                facts.add(Fact("bigger_than", item.shape, other.shape))
            if item.x < other.x:
                facts.add(Fact("left_of", item.shape, other.shape))
            if item.y < other.y:
                facts.add(Fact("above", item.shape, other.shape))
    return frozenset(facts)


def as_fact(fact: Fact | Mapping[str, str]) -> Fact:
    """A fact, from one or from its form in `Record.facts`; "right_of", "below", "smaller_than" turned round."""
    kind, subject, value = fact if isinstance(fact, Fact) else (fact["kind"], fact["subject"], fact["value"])
    return Fact(_PLAIN[kind], value, subject) if kind in _PLAIN else Fact(kind, subject, value)


def truth_after_view(
    scene: Scene, facts: Iterable[Fact | Mapping[str, str]], params: AugmentationParams = _AS_IT_IS
) -> list[bool]:
    """For every fact whether it holds in the view that was made with these parameters."""
    after = true_facts(scene, params)
    return [as_fact(fact) in after for fact in facts]


# ---------------------------------------------------------------- what may be said


def sayable(scene: Scene) -> dict[str, list[Fact]]:
    """By kind, the true facts that are clear (left of: in another column) and name unambiguously what they relate."""
    shapes = [item.shape for item in scene.objects]
    facts: dict[str, list[Fact]] = {kind: [] for kind in KINDS}
    facts["count"].append(Fact("count", "object", str(len(shapes))))
    for item in scene.objects:
        shape, (row, column) = item.shape, item.cell
        facts["shape"].append(Fact("shape", shape, ""))
        facts["colour"].append(Fact("colour", shape, item.colour))
        facts["size"].append(Fact("size", shape, item.size))
        facts["side"] += [Fact("side", shape, ("left", "right")[column // 2])] if column != 1 else []
        facts["side"] += [Fact("side", shape, ("top", "bottom")[row // 2])] if row != 1 else []
        if shapes.count(shape) > 1:
            facts["count"].append(Fact("count", shape, str(shapes.count(shape))))
            continue
        for other in scene.objects:
            if shapes.count(other.shape) > 1:
                continue
            if column < other.cell[1]:
                facts["left_of"].append(Fact("left_of", shape, other.shape))
            if row < other.cell[0]:
                facts["above"].append(Fact("above", shape, other.shape))
            if SIZES[item.size] > SIZES[other.size]:
                facts["bigger_than"].append(Fact("bigger_than", shape, other.shape))
    return facts


RELATIONS = frozenset(OPPOSITES) | frozenset(_PLAIN)


def fits(said: Sequence[Fact], fact: Fact, repeated: frozenset[str]) -> bool:
    """Whether a caption can say this too: nothing twice, nothing ambiguous, no relation whose attachment is unclear."""
    mentioned = [shape for old in said for shape in shapes_of(old)]
    if fact in said or any(old.kind == fact.kind == "count" for old in said):
        return False
    if fact.kind == "shape" or any(old.kind == "shape" and old.subject in shapes_of(fact) for old in said):
        return not set(shapes_of(fact)) & set(mentioned)  # "a red circle" says "a circle" already
    if repeated & set(shapes_of(fact)) & set(mentioned):
        return False  # two circles: "a red circle" and "a big circle" might be either
    if fact.kind in ("colour", "size", "side") and any(o.kind == fact.kind and o.subject == fact.subject for o in said):
        return False
    relations = [old for old in said if old.kind in RELATIONS]
    if fact.kind in RELATIONS:
        placed = {old.subject for old in said if old.kind == "side"}
        return all(old.subject == fact.subject for old in relations) and fact.value not in placed
    return fact.kind != "side" or all(old.value != fact.subject for old in relations)


def shapes_of(fact: Fact) -> tuple[str, ...]:
    if fact.kind in RELATIONS:
        return fact.subject, fact.value
    return () if fact.subject == "object" else (fact.subject,)


def turned(fact: Fact) -> Fact:
    """A relation said from the other side: right of, below, smaller than, and back."""
    return Fact({**OPPOSITES, **_PLAIN}[fact.kind], fact.value, fact.subject)


def repeated_shapes(scene: Scene) -> frozenset[str]:
    shapes = [item.shape for item in scene.objects]
    return frozenset(shape for shape in shapes if shapes.count(shape) > 1)


def choose_facts(
    sayable_facts: Mapping[str, Sequence[Fact]],
    repeated: frozenset[str],
    draws: Draws,
    number: int,
    said: Sequence[Fact] = (),
    without: str = "",
) -> list[Fact]:
    """Up to `number` facts that one caption can state together, after those already `said`, every kind as likely."""
    facts = list(said)
    # A count is always at hand and says little, so it is taken less often.
    kinds = [kind for kind in KINDS if kind != without and (kind != "count" or draws() < 0.4)]
    for kind in draws.shuffled(kinds) * 2:  # a kind may come twice, if it must
        if len(facts) - len(said) == number:
            break
        if sayable_facts[kind]:
            fact = draws.pick(sayable_facts[kind])
            if kind in OPPOSITES and draws() < 0.5:
                fact = turned(fact)
            if fits(facts, fact, repeated):
                facts.append(fact)
    return facts[len(said) :]


# ---------------------------------------------------------------- how it is said


_HALF, _WORDS = 18, len(SYNONYMS)  # 3 ** 18 is far below the 2 ** 53 values that one draw takes


class Wording(NamedTuple):
    """A template and one synonym of every word, so that a caption and its foil differ in their facts alone."""

    template: str
    choices: tuple[int, int]  # digits to base 3, one a word

    @classmethod
    def drawn(cls, draws: Draws) -> Wording:
        return cls(draws.pick(TEMPLATES), (int(draws() * 3**_HALF), int(draws() * 3 ** (_WORDS - _HALF))))

    def word(self, name: str) -> str:
        half, digit = divmod(_ORDINAL[name], _HALF)
        return SYNONYMS[name][self.choices[half] // 3**digit % 3]


def say(facts: Sequence[Fact], wording: Wording, repeated: frozenset[str] = frozenset()) -> str:
    """The caption that states these facts. `repeated` are the shapes of which the picture has several."""
    things = "{things}" in wording.template
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    counted = [fact for fact in facts if fact.kind == "count"]
    # What carries a relation comes last, so that nothing after it can be taken for a part of it.
    rest = sorted(
        (own for own in by_subject.values() if own[0] not in counted),
        key=lambda own: any(f.kind in RELATIONS for f in own),
    )
    related = {fact.value for fact in facts if fact.kind in RELATIONS}
    subjects = [own for own in rest if own[0].subject not in related]
    details = {own[0].subject: own for own in rest if own[0].subject in related}
    parts = [
        _numbered(fact, wording) if things else f"there {_be(fact)} {_numbered(fact, wording)}" for fact in counted
    ]
    parts += [(_thing if things else _claim)(own, details, wording, repeated) for own in subjects]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return wording.template.format(things=text, claims=text, picture=_with_article(wording.word("picture")))


def _be(fact: Fact) -> str:
    return "is" if fact.value == "1" else "are"


def _numbered(fact: Fact, wording: Wording) -> str:
    noun = wording.word(fact.subject)
    if fact.value != "1":
        noun += "es" if noun.endswith(("s", "x")) else "s"
    return f"{wording.word(fact.value)} {noun}" + (" in all" if fact.subject == "object" else "")


def _noun(shape: str, own: Sequence[Fact], wording: Wording) -> str:
    adjectives = [wording.word(fact.value) for kind in ("size", "colour") for fact in own if fact.kind == kind]
    return " ".join([*adjectives, wording.word(shape)])


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _places(own: Sequence[Fact], details: Mapping[str, list[Fact]], wording: Wording, things: bool) -> list[str]:
    """ "on the left", "above a red star", in the order of the facts."""
    places, named = [], set()
    for fact in own:
        if fact.kind == "side":
            places.append(wording.word(fact.value))
        elif fact.kind in RELATIONS:
            if fact.value in named:
                other = f"that {wording.word(fact.value)}"
            else:
                noun = _noun(fact.value, details.get(fact.value, ()), wording)
                other = _with_article(noun) if things else f"the {noun}"
            named.add(fact.value)
            places.append(f"{wording.word(fact.kind)} {other}")
    return places


def _thing(own: Sequence[Fact], details: Mapping[str, list[Fact]], wording: Wording, repeated: frozenset[str]) -> str:
    noun = _with_article(_noun(own[0].subject, own, wording))
    return " ".join([noun, " and ".join(_places(own, details, wording, things=True))]).rstrip()


def _claim(own: Sequence[Fact], details: Mapping[str, list[Fact]], wording: Wording, repeated: frozenset[str]) -> str:
    subject = own[0].subject
    if own[0].kind == "shape":
        return f"there is {_with_article(wording.word(subject))}"
    traits = [wording.word(fact.value) for fact in own if fact.kind in ("colour", "size")]
    traits += _places(own, details, wording, things=False)
    noun = wording.word(subject)
    return f"{_with_article(noun) if subject in repeated else f'the {noun}'} is {' and '.join(traits)}"


def make_captions(scene: Scene, source: np.random.Generator, number: int = 4) -> list[tuple[str, list[Fact]]]:
    """Different captions of one to three facts each, with the facts they state."""
    draws, repeated, facts_by_kind = Draws(source, block=96), repeated_shapes(scene), sayable(scene)
    out: dict[str, list[Fact]] = {}
    while len(out) < number:
        facts = choose_facts(facts_by_kind, repeated, draws, (1, 2, 2, 3, 3)[int(draws() * 5)])
        out[say(facts, Wording.drawn(draws), repeated)] = [as_fact(fact) for fact in facts]
    return list(out.items())
