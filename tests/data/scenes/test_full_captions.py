from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from helpers.full_caption_reading import describes, parse_full_caption, stated_facts
from helpers.pages import ROOT
from helpers.scene_reading import holds

from coalign.data.scenes.layout import HELD_OUT
from coalign.data.scenes.source import Scenes
from coalign.data.sources.base import are_labels
from coalign.data.sources.labeled import label_by_captions
from coalign.types import AugmentationParams, Foil

FULL = ("simple", "standard")
KINDS = {"simple": ("shape", "colour", "side"), "standard": ("shape", "colour", "size", "side")}
LEVELS_AND_KINDS = [(level, kind) for level in FULL for kind in KINDS[level]]
SOURCES: dict[str, Scenes] = {level: Scenes(400, level=level) for level in FULL}


def records(level: str) -> list[Any]:
    source = SOURCES[level]
    return [source.record(int(index)) for indices in source.splits.values() for index in indices[:200]]


@pytest.mark.parametrize("level", FULL)
def test_captions_describe_every_object_and_state_their_facts(level: str) -> None:
    for record in records(level):
        objects = record.facts["objects"]
        assert len(set(record.captions)) == len(record.facts["captions"]) == (1 if level == "simple" else 4)
        for caption, facts in zip(record.captions, record.facts["captions"]):
            found = parse_full_caption(caption)
            assert describes(found, objects), caption
            stated = [(fact["kind"], fact["subject"], fact["value"]) for fact in facts]
            assert stated_facts(found) == set(stated), caption
            assert len(stated) == len(set(stated))
            assert all(holds(fact, objects) for fact in stated), caption


def test_simple_captions_state_color_shape_and_side_from_left_to_right() -> None:
    captions = {}
    for record in records("simple"):
        (caption,) = record.captions
        found = parse_full_caption(caption)
        assert all(set(each) == {"shape", "colour", "cell"} for each in found)
        assert [each["cell"] for each in found] in ([[None, 0]], [[None, 2]], [[None, 0], [None, 2]])
        content = frozenset((o["shape"], o["colour"], *o["cell"]) for o in record.facts["objects"])
        assert captions.setdefault(caption, content) == content  # equal captions only for equal contents
    assert len(captions) == len(set(captions.values()))
    words = {word.strip(",") for caption in captions for word in caption.split()}
    assert len(words) == 8 + 8 + len(("a", "on", "the", "left", "right", "and"))


def test_standard_captions_leave_out_a_fifth_and_vary() -> None:
    found, captions = [], []
    for record in records("standard"):
        captions += record.captions
        found += [each for caption in record.captions for each in parse_full_caption(caption)]
    for name in ("colour", "size", "cell"):
        assert sum(name not in each for each in found) / len(found) == pytest.approx(0.2, abs=0.02)
    orders = [[each["cell"] for each in parse_full_caption(caption) if "cell" in each] for caption in captions]
    assert 0.2 < sum(order != sorted(order) for order in orders) / len(orders) < 0.5
    texts = " ".join(captions)
    for words in (
        " that is ",
        "in this picture, ",
        "here we see ",
        "halfway up",
        "in the top",
        "at the upper",
        "emerald",
    ):
        assert texts.count(words) > 50
    assert "scarlet" not in texts  # two words for each thing


def test_standard_and_hard_scenes_have_the_same_images_tags_and_objects() -> None:
    standard, hard = SOURCES["standard"], Scenes(400, level="hard")
    for index in (0, 7, 399, 400, 6000, 8399):
        record, other = standard.record(index), hard.record(index)
        assert (standard.image(index) == hard.image(index)).all()
        assert (standard.masks(index) == hard.masks(index)).all()
        assert (record.key, record.tags) == (other.key, other.tags)
        assert record.facts | {"captions": 0} == other.facts | {"captions": 0}
        assert not set(record.captions) & set(other.captions)


def test_simple_captions_are_no_class_labels() -> None:
    """They are as few as labels are."""
    source = Scenes(9000, level="simple")
    captions = {source.record(index).captions for index in range(len(source))}
    assert are_labels(len(captions), len(source))
    assert label_by_captions(source) is source


@pytest.mark.parametrize("level", FULL)
def test_a_flip_breaks_the_left_and_right_sides(level: str) -> None:
    source = SOURCES[level]
    for index in range(100):
        truths = source.truth_after_view(index, AugmentationParams(flipped=1.0))
        stated = source.record(index).facts["captions"]
        shapes = [item["shape"] for item in source.record(index).facts["objects"]]
        for fact, true in [pair for facts, truth in zip(stated, truths) for pair in zip(facts, truth)]:
            if shapes.count(fact["subject"]) == 1:
                assert true == (fact["value"] not in ("left", "right"))


def test_examples_in_the_docs_are_captions_of_one_image() -> None:
    page = (ROOT / "docs/data.md").read_text(encoding="utf-8")
    for level in ("simple", "standard", "hard"):
        (row,) = [line for line in page.splitlines() if line.startswith("| `scenes:8192") and f":{level}`" in line]
        assert row.split('"')[1] in Scenes(8192, level=level).record(1).captions


# ---------------------------------------------------------------- foils


@pytest.fixture(scope="module")
def foils() -> dict[tuple[str, str], list[Foil]]:
    return {
        (level, kind): [foil for split in ("test", "combinations") for foil in source.foil_items(split, kind, 500)]
        for level, source in SOURCES.items()
        for kind in KINDS[level]
    }


@pytest.mark.parametrize(("level", "kind"), LEVELS_AND_KINDS)
def test_foils_are_false_in_one_kind(foils: dict[tuple[str, str], list[Foil]], level: str, kind: str) -> None:
    name = "cell" if kind == "side" else kind
    for foil in foils[level, kind]:
        objects = SOURCES[level].record(foil.index).facts["objects"]
        true, false = parse_full_caption(foil.true), parse_full_caption(foil.false)
        assert describes(true, objects), foil
        assert not describes(false, objects), foil
        assert not all(holds(fact, objects) for fact in stated_facts(false)), foil
        rest = [
            Counter(str(sorted((k, v) for k, v in each.items() if k != name)) for each in found)
            for found in (true, false)
        ]
        assert rest[0] == rest[1], foil
        if foil.how == "swap":
            words = [
                sorted(text.replace(",", " and").replace(" an ", " a ").split()) for text in (foil.true, foil.false)
            ]
            assert [w for w in words[0] if w != "and"] == [w for w in words[1] if w != "and"], foil
        cells = [str(each["cell"]) for each in false if "cell" in each]
        assert len(cells) == len(set(cells))
        if level == "simple":
            assert [each["cell"] for each in false] == sorted(each["cell"] for each in false)
            assert len({(each["shape"], each["colour"]) for each in false}) == len(false)
    assert {foil.how for foil in foils[level, kind]} == {"replace", "swap"}


@pytest.mark.parametrize(("level", "kind"), LEVELS_AND_KINDS)
def test_captions_alone_do_not_reveal_the_foil(foils: dict[tuple[str, str], list[Foil]], level: str, kind: str) -> None:
    """Values that are more frequent in true captions than in foils, counted on half of the foils, do not help on the other half."""
    items = foils[level, kind]
    pairs = [[stated_facts(parse_full_caption(text)) for text in (foil.true, foil.false)] for foil in items]
    weights: Counter[tuple[str, str]] = Counter()
    for true, false in pairs[::2]:
        weights.update((fact[0], fact[2] or fact[1]) for fact in true)
        weights.subtract((fact[0], fact[2] or fact[1]) for fact in false)
    scores = [[sum(weights[f[0], f[2] or f[1]] for f in facts) for facts in pair] for pair in pairs[1::2]]
    correct = sum(0.5 if true == false else float(true > false) for true, false in scores)
    assert abs(correct / len(scores) - 0.5) < 3.5 * 0.5 / len(scores) ** 0.5
    for foil, (true, false) in zip(items, pairs):
        counts = [sum((f[1], f[2]) in HELD_OUT for f in facts if f[0] == "colour") for facts in (true, false)]
        assert counts[0] == counts[1], foil
