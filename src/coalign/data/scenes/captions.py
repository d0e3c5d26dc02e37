"""Facts that hold in a scene, before and after augmentation, and captions that state them.

A fact is atomic and refers to objects by shape: ("colour", "circle", "red") holds if a visible circle is red, ("left_of", "circle", "star")
if a circle is to the left of a star, and ("count", "circle", "2") if exactly two circles are visible.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from coalign.data.scenes.layout import COLORS, SIZES, BufferedRandom, Scene
from coalign.types import AugmentationParams


class Fact(NamedTuple):
    kind: str
    subject: str  # a shape; "object" for the count of all objects
    value: str  # a shape for relations, "" for the kind "shape"


KINDS = ("shape", "colour", "size", "bigger_than", "side", "left_of", "above", "count")
INVERSES = {"left_of": "right_of", "above": "below", "bigger_than": "smaller_than"}
_CANONICAL = {inverse: kind for kind, inverse in INVERSES.items()}
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
_WORD_INDEX = {word: position for position, word in enumerate(SYNONYMS)}
# {phrases}: "a red circle above a star"; {clauses}: "the circle is red and above the star"; {picture}: "a picture"
TEMPLATES = (
    "{phrases}",
    "{picture} of {phrases}",
    "this is {picture} that shows {phrases}",
    "{picture} with {phrases}",
    "here we see {phrases}",
    "you can find {phrases} here",
    "{clauses}",
    "{picture} in which {clauses}",
)


# ---------------------------------------------------------------- truth

MIN_VISIBLE = 0.5  # an object is visible if at least this fraction of its box is in the crop
_SIDE_WIDTH = 0.4  # an object is on the left if its center is in the left 40 % of the image
_SIZE_NAMES = tuple(SIZES)
_SMALL_MEDIUM, _MEDIUM_BIG = ((a * b) ** 0.5 for a, b in zip(SIZES.values(), tuple(SIZES.values())[1:]))
_HUES = {name: colorsys.rgb_to_hsv(*(channel / 255 for channel in rgb))[0] for name, rgb in COLORS.items()}
_IDENTITY = AugmentationParams()


class _VisibleObject(NamedTuple):
    shape: str
    color: str | None  # None: not recognizable
    diameter: float
    x: float
    y: float


def _color_is_preserved(color: str, params: AugmentationParams) -> bool:
    """Whether the view is not gray, and the shifted HSV hue is still nearest to this color among the four of the same luma."""
    if params.grayed >= 0.5 or params.saturation <= -0.8:
        return False
    hue = _HUES[color] + params.hue
    names = tuple(COLORS)
    same_luma = names[names.index(color) % 2 :: 2]  # dark and light alternate
    return min(same_luma, key=lambda name: abs((hue - _HUES[name] + 0.5) % 1.0 - 0.5)) == color


def _visible_objects(scene: Scene, params: AugmentationParams) -> list[_VisibleObject]:
    visible = []
    for item in scene.objects:
        box = item.box
        left, right = max(box[0], params.x), min(box[2], params.x + params.w)
        top, bottom = max(box[1], params.y), min(box[3], params.y + params.h)
        area = (box[2] - box[0]) * (box[3] - box[1])
        if max(0.0, right - left) * max(0.0, bottom - top) < MIN_VISIBLE * area:
            continue
        x = ((left + right) / 2 - params.x) / params.w
        visible.append(
            _VisibleObject(
                item.shape,
                item.color if params is _IDENTITY or _color_is_preserved(item.color, params) else None,
                item.diameter / scene.zoom / (params.w * params.h) ** 0.5,
                1 - x if params.flipped >= 0.5 else x,
                ((top + bottom) / 2 - params.y) / params.h,
            )
        )
    return visible


def true_facts(scene: Scene, params: AugmentationParams = _IDENTITY) -> frozenset[Fact]:
    """Returns all facts that hold in the view of the scene with these parameters (default: the whole image).

    Sizes are relative to the frame, so a crop makes objects bigger. Shapes hold while they are visible.
    """
    visible = _visible_objects(scene, params)
    facts = {Fact("count", "object", str(len(visible)))}
    shapes = [item.shape for item in visible]
    for item in visible:
        facts.add(Fact("shape", item.shape, ""))
        facts.add(Fact("count", item.shape, str(shapes.count(item.shape))))
        rank = int(item.diameter > _SMALL_MEDIUM) + int(item.diameter > _MEDIUM_BIG)
        facts.add(Fact("size", item.shape, _SIZE_NAMES[rank]))
        if item.color is not None:
            facts.add(Fact("colour", item.shape, item.color))
        for position, low, between, high in (
            (item.x, "left", "center", "right"),
            (item.y, "top", "middle", "bottom"),
        ):
            side = low if position < 0.5 else high
            facts.add(Fact("side", item.shape, side if abs(position - 0.5) > 0.5 - _SIDE_WIDTH else between))
        for other in visible:
            if item.diameter > other.diameter * 1.1:  # more than the jitter within one size
                facts.add(Fact("bigger_than", item.shape, other.shape))
            if item.x < other.x:
                facts.add(Fact("left_of", item.shape, other.shape))
            if item.y < other.y:
                facts.add(Fact("above", item.shape, other.shape))
    return frozenset(facts)


def canonical_fact(fact: Fact | Mapping[str, str]) -> Fact:
    """Converts a fact, or its form in `Record.facts`, to canonical form: "right_of", "below" and "smaller_than" are inverted."""
    kind, subject, value = fact if isinstance(fact, Fact) else (fact["kind"], fact["subject"], fact["value"])
    return Fact(_CANONICAL[kind], value, subject) if kind in _CANONICAL else Fact(kind, subject, value)


def truth_after_view(
    scene: Scene, facts: Iterable[Fact | Mapping[str, str]], params: AugmentationParams = _IDENTITY
) -> list[bool]:
    """Returns for each fact whether it holds in the view of the scene with these parameters."""
    after = true_facts(scene, params)
    return [canonical_fact(fact) in after for fact in facts]


# ---------------------------------------------------------------- facts of a caption


def caption_facts(scene: Scene) -> dict[str, list[Fact]]:
    """Returns the facts that captions may state, by kind: true, clear (left of: in another column), with unambiguous relations."""
    shapes = [item.shape for item in scene.objects]
    facts: dict[str, list[Fact]] = {kind: [] for kind in KINDS}
    facts["count"].append(Fact("count", "object", str(len(shapes))))
    for item in scene.objects:
        shape, (row, column) = item.shape, item.cell
        facts["shape"].append(Fact("shape", shape, ""))
        facts["colour"].append(Fact("colour", shape, item.color))
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


RELATIONS = frozenset(INVERSES) | frozenset(_CANONICAL)


def can_add(stated: Sequence[Fact], fact: Fact, repeated: frozenset[str]) -> bool:
    """Whether a caption that states `stated` can also state `fact`, without repetition, ambiguity or an unclear attachment."""
    mentioned = [shape for other in stated for shape in shapes_of(other)]
    if fact in stated or any(other.kind == fact.kind == "count" for other in stated):
        return False
    if fact.kind == "shape" or any(other.kind == "shape" and other.subject in shapes_of(fact) for other in stated):
        return not set(shapes_of(fact)) & set(mentioned)  # "a red circle" already implies "a circle"
    if repeated & set(shapes_of(fact)) & set(mentioned):
        return False  # with two circles, "a red circle" and "a big circle" may or may not be the same
    subject_kinds = {other.kind for other in stated if other.subject == fact.subject}
    if fact.kind in ("colour", "size", "side") and fact.kind in subject_kinds:
        return False
    relations = [other for other in stated if other.kind in RELATIONS]
    if fact.kind in RELATIONS:
        with_side = {other.subject for other in stated if other.kind == "side"}
        return all(other.subject == fact.subject for other in relations) and fact.value not in with_side
    return fact.kind != "side" or all(other.value != fact.subject for other in relations)


def shapes_of(fact: Fact) -> tuple[str, ...]:
    """Returns the shapes that a fact mentions."""
    if fact.kind in RELATIONS:
        return fact.subject, fact.value
    return () if fact.subject == "object" else (fact.subject,)


def inverse(fact: Fact) -> Fact:
    """Returns the same relation with subject and value swapped: "left_of" becomes "right_of", and vice versa."""
    return Fact({**INVERSES, **_CANONICAL}[fact.kind], fact.value, fact.subject)


def repeated_shapes(scene: Scene) -> frozenset[str]:
    """Returns the shapes that occur more than once."""
    shapes = [item.shape for item in scene.objects]
    return frozenset(shape for shape in shapes if shapes.count(shape) > 1)


def sample_facts(
    facts_by_kind: Mapping[str, Sequence[Fact]],
    repeated: frozenset[str],
    rng: BufferedRandom,
    num_facts: int,
    stated: Sequence[Fact] = (),
    exclude: str = "",
) -> list[Fact]:
    """Samples up to `num_facts` facts that a caption can state in addition to `stated`, but none of the kind `exclude`.

    Kinds are sampled uniformly, except that counts are less likely.
    """
    facts = list(stated)
    # Every scene has counts, and they are less informative than other facts.
    kinds = [kind for kind in KINDS if kind != exclude and (kind != "count" or rng() < 0.4)]
    for kind in rng.shuffled(kinds) * 2:  # use a kind twice if there are too few others
        if len(facts) - len(stated) == num_facts:
            break
        if facts_by_kind[kind]:
            fact = rng.choice(facts_by_kind[kind])
            if kind in INVERSES and rng() < 0.5:
                fact = inverse(fact)
            if can_add(facts, fact, repeated):
                facts.append(fact)
    return facts[len(stated) :]


# ---------------------------------------------------------------- wording


# two numbers of base-3 digits: 3 ** 18 is well within the 53 random bits of a float
_HALF, _NUM_WORDS = 18, len(SYNONYMS)


class Wording(NamedTuple):
    """A template and one synonym of each word. A caption and its foil share it, so that they differ in their facts only."""

    template: str
    choices: tuple[int, int]  # base-3 digits, one per word

    @classmethod
    def sample(cls, rng: BufferedRandom) -> Wording:
        return cls(rng.choice(TEMPLATES), (int(rng() * 3**_HALF), int(rng() * 3 ** (_NUM_WORDS - _HALF))))

    def word(self, name: str) -> str:
        half, digit = divmod(_WORD_INDEX[name], _HALF)
        return SYNONYMS[name][self.choices[half] // 3**digit % 3]


def render_caption(facts: Sequence[Fact], wording: Wording, repeated: frozenset[str] = frozenset()) -> str:
    """Returns the caption that states these facts. `repeated` are the shapes that occur more than once in the scene."""
    as_phrases = "{phrases}" in wording.template
    by_subject: dict[str, list[Fact]] = {}
    for fact in facts:
        by_subject.setdefault(fact.subject, []).append(fact)
    counts = [fact for fact in facts if fact.kind == "count"]
    # Subjects with a relation come last, so that nothing after a relation can be read as part of it.
    described = sorted(
        (group for group in by_subject.values() if group[0] not in counts),
        key=lambda group: any(fact.kind in RELATIONS for fact in group),
    )
    related = {fact.value for fact in facts if fact.kind in RELATIONS}
    subjects = [group for group in described if group[0].subject not in related]
    details = {group[0].subject: group for group in described if group[0].subject in related}
    parts = [
        _count_phrase(fact, wording) if as_phrases else f"there {_verb(fact)} {_count_phrase(fact, wording)}"
        for fact in counts
    ]
    if as_phrases:
        parts += [_noun_phrase(group, details, wording) for group in subjects]
    else:
        parts += [_clause(group, details, wording, repeated) for group in subjects]
    text = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return wording.template.format(phrases=text, clauses=text, picture=_with_article(wording.word("picture")))


def _verb(fact: Fact) -> str:
    return "is" if fact.value == "1" else "are"


def _count_phrase(fact: Fact, wording: Wording) -> str:
    noun = wording.word(fact.subject)
    if fact.value != "1":
        noun += "es" if noun.endswith(("s", "x")) else "s"
    return f"{wording.word(fact.value)} {noun}" + (" in all" if fact.subject == "object" else "")


def _noun(shape: str, facts: Sequence[Fact], wording: Wording) -> str:
    adjectives = [wording.word(fact.value) for kind in ("size", "colour") for fact in facts if fact.kind == kind]
    return " ".join([*adjectives, wording.word(shape)])


def _with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _location_phrases(
    facts: Sequence[Fact], details: Mapping[str, list[Fact]], wording: Wording, definite: bool
) -> list[str]:
    """Returns phrases such as "on the left" or "above a red star", in the order of the facts."""
    phrases, mentioned = [], set()
    for fact in facts:
        if fact.kind == "side":
            phrases.append(wording.word(fact.value))
        elif fact.kind in RELATIONS:
            if fact.value in mentioned:
                other = f"that {wording.word(fact.value)}"
            else:
                noun = _noun(fact.value, details.get(fact.value, ()), wording)
                other = f"the {noun}" if definite else _with_article(noun)
            mentioned.add(fact.value)
            phrases.append(f"{wording.word(fact.kind)} {other}")
    return phrases


def _noun_phrase(facts: Sequence[Fact], details: Mapping[str, list[Fact]], wording: Wording) -> str:
    noun = _with_article(_noun(facts[0].subject, facts, wording))
    return " ".join([noun, " and ".join(_location_phrases(facts, details, wording, definite=False))]).rstrip()


def _clause(
    facts: Sequence[Fact], details: Mapping[str, list[Fact]], wording: Wording, repeated: frozenset[str]
) -> str:
    subject = facts[0].subject
    if facts[0].kind == "shape":
        return f"there is {_with_article(wording.word(subject))}"
    predicates = [wording.word(fact.value) for fact in facts if fact.kind in ("colour", "size")]
    predicates += _location_phrases(facts, details, wording, definite=True)
    noun = wording.word(subject)
    return f"{_with_article(noun) if subject in repeated else f'the {noun}'} is {' and '.join(predicates)}"


def make_captions(scene: Scene, generator: np.random.Generator, num_captions: int = 4) -> list[tuple[str, list[Fact]]]:
    """Samples distinct captions of one to three facts each. Returns each caption with the facts that it states."""
    rng = BufferedRandom(generator, block_size=96)
    repeated, facts_by_kind = repeated_shapes(scene), caption_facts(scene)
    captions: dict[str, list[Fact]] = {}
    while len(captions) < num_captions:
        facts = sample_facts(facts_by_kind, repeated, rng, (1, 2, 2, 3, 3)[int(rng() * 5)])
        captions[render_caption(facts, Wording.sample(rng), repeated)] = [canonical_fact(fact) for fact in facts]
    return list(captions.items())
