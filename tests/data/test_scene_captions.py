from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest
from scene_reading import holds, plain, read

from coalign.data.randomness import generator
from coalign.data.scene_captions import (
    KINDS,
    SYNONYMS,
    TEMPLATES,
    Fact,
    Wording,
    choose_facts,
    make_captions,
    repeated_shapes,
    say,
    sayable,
    true_facts,
    truth_after_view,
)
from coalign.data.scene_layout import COLOURS, SHAPES, SPLITS, Draws, Scene, make_scene
from coalign.types import AugmentationParams

SCENES = [make_scene(0, split, index) for split in SPLITS for index in range(120)]


def objects(scene: Scene) -> list[dict]:
    return [{**asdict(item), "box": item.box} for item in scene.objects]


def captions(scene: Scene) -> list[tuple[str, list[Fact]]]:
    return make_captions(scene, generator(5, 0, scene.index, 0, scene.split))


def test_captions_read_as_the_facts_they_state_and_are_true() -> None:
    kinds = set()
    for scene in SCENES:
        for text, facts in captions(scene):
            stated, definite = read(text)
            assert stated == set(map(tuple, facts)), text
            assert 1 <= len(facts) <= 3
            for fact in facts:
                assert holds(fact, objects(scene)), (text, fact)
            for shape in definite:
                assert sum(item.shape == shape for item in scene.objects) == 1, text
            kinds |= {fact.kind for fact in facts}
    assert kinds == set(KINDS)


def test_relations_name_one_object_each_and_clear_places() -> None:
    for scene in SCENES:
        shapes = [item.shape for item in scene.objects]
        cells = {item.shape: item.cell for item in scene.objects}
        for _, facts in captions(scene):
            for fact in facts:
                if fact.kind in ("left_of", "above", "bigger_than"):
                    assert shapes.count(fact.subject) == shapes.count(fact.value) == 1
                    axis = {"left_of": 1, "above": 0}.get(fact.kind)
                    assert axis is None or cells[fact.subject][axis] < cells[fact.value][axis]


def test_the_reader_finds_planted_errors() -> None:
    scene = next(s for s in SCENES if len(s.objects) == 2 and not repeated_shapes(s))
    a, b = scene.objects
    wrong = next(colour for colour in COLOURS if colour != a.colour)
    stated, _ = read(f"a picture of a {wrong} {a.shape} and a {b.colour} {b.shape}")
    assert {holds(fact, objects(scene)) for fact in stated} == {True, False}


def test_all_true_facts_agree_with_the_boxes() -> None:
    words = {
        "colour": COLOURS, "size": ("small", "medium", "big"), "side": ("left", "right", "top", "bottom"),
        "shape": ("",), "count": "123", "left_of": SHAPES, "above": SHAPES,
    }  # fmt: skip
    for scene in SCENES[::15]:
        truth = true_facts(scene)
        for kind, values in words.items():
            for shape in SHAPES:
                for value in values:
                    assert (Fact(kind, shape, value) in truth) == holds((kind, shape, value), objects(scene))


def test_there_are_more_than_a_hundred_thousand_captions() -> None:
    assert len(TEMPLATES) == 8
    assert all(len(set(words)) == 3 for words in SYNONYMS.values())
    assert len({word for words in SYNONYMS.values() for word in words}) == 3 * len(SYNONYMS)
    texts = set()
    for scene in [make_scene(0, "train", index) for index in range(1400)]:
        draws = Draws(generator(0, 0, scene.index, 0, "count"))
        facts = choose_facts(sayable(scene), repeated_shapes(scene), draws, 3)
        texts |= {say(facts, Wording.drawn(draws), repeated_shapes(scene)) for _ in range(85)}
    assert len(texts) >= 100_000


def test_captions_of_an_image_differ_and_come_again() -> None:
    for scene in SCENES[:200]:
        made = captions(scene)
        assert len({text for text, _ in made}) == 4
        assert captions(scene) == made


def test_wording_uses_every_template_and_synonym_equally() -> None:
    draws = Draws(generator(0, 0, 0, 0, "wording"))
    drawn = [Wording.drawn(draws) for _ in range(3000)]
    for name, words in SYNONYMS.items():
        shares = [np.mean([wording.word(name) == word for wording in drawn]) for word in words]
        np.testing.assert_allclose(shares, 1 / 3, atol=0.04)
    np.testing.assert_allclose([np.mean([w.template == t for w in drawn]) for t in TEMPLATES], 1 / 8, atol=0.03)


# ---------------------------------------------------------------- after a view


def seen_on_a_raster(scene: Scene, params: AugmentationParams, resolution: int = 1200) -> list[dict]:
    """The objects of a view, from boxes drawn on a raster that is cropped, stretched and flipped."""
    rows = ((np.arange(resolution) + 0.5) / resolution * params.h + params.y)[:, None]
    columns = ((np.arange(resolution) + 0.5) / resolution * params.w + params.x)[None, :]
    seen = []
    for item in scene.objects:
        left, top, right, bottom = item.box
        view = (rows > top) & (rows < bottom) & (columns > left) & (columns < right)
        if params.flipped:
            view = view[:, ::-1]
        share = view.sum() / resolution**2 * params.w * params.h / ((right - left) * (bottom - top))
        if abs(share - 0.5) < 0.02:
            return []  # too close to call
        if share > 0.5:
            y, x = (np.nonzero(view.any(axis))[0] for axis in (1, 0))
            edges = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            seen.append({"shape": item.shape, "colour": item.colour, "box": [edge / resolution for edge in edges]})
    return seen


def test_truth_after_crop_and_flip_agrees_with_a_raster() -> None:
    source = np.random.default_rng(0)
    compared, broken = 0, dict.fromkeys(KINDS, 0)
    for scene in SCENES[:300]:
        w, h = source.uniform(0.35, 1.0, 2)
        params = AugmentationParams(
            x=source.uniform(0, 1 - w), y=source.uniform(0, 1 - h), w=w, h=h, flipped=float(source.integers(2))
        )
        seen = seen_on_a_raster(scene, params, 300)
        if not seen:
            continue
        facts = [fact for fact in true_facts(scene) if fact.kind not in ("size", "bigger_than")]
        for fact, true in zip(facts, truth_after_view(scene, facts, params)):
            middles = [((o["box"][0] + o["box"][2]) / 2, (o["box"][1] + o["box"][3]) / 2) for o in seen]
            near = [v for m in middles for v in m if min(abs(v - 0.4), abs(v - 0.6)) < 0.01]
            close = any(abs(m[a] - n[a]) < 0.01 for m in middles for n in middles if m != n for a in (0, 1))
            if (fact.kind == "side" and near) or (fact.kind in ("left_of", "above") and close):
                continue
            assert true == holds(fact, seen), (fact, params)
            compared += 1
            broken[fact.kind] += not true
    assert compared > 2000
    assert all(broken[kind] > 20 for kind in ("side", "left_of", "count", "shape", "colour"))


def facts_by_kind(scene: Scene, params: AugmentationParams) -> dict[str, list[bool]]:
    out: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    stated = [fact for facts in sayable(scene).values() for fact in facts]
    for fact, true in zip(stated, truth_after_view(scene, stated, params)):
        out[fact.kind].append(true)
    return out


@pytest.mark.parametrize(
    ("params", "broken"),
    [
        (AugmentationParams(), set()),
        (AugmentationParams(brightness=0.4, contrast=-0.4, saturation=0.4, blur=2.0, hue=0.02), set()),
        (AugmentationParams(greyed=1.0), {"colour"}),
        (AugmentationParams(hue=0.5), {"colour"}),
        (AugmentationParams(flipped=1.0), {"side", "left_of"}),
        (AugmentationParams(greyed=1.0, flipped=1.0), {"colour", "side", "left_of"}),
    ],
)
def test_each_augmentation_breaks_its_kinds_and_no_other(params: AugmentationParams, broken: set[str]) -> None:
    found = {kind for scene in SCENES for kind, truths in facts_by_kind(scene, params).items() if not all(truths)}
    assert found == broken


def test_a_flip_turns_left_to_right_and_twice_is_nothing() -> None:
    flipped = AugmentationParams(flipped=1.0)
    swapped = {"left": "right", "right": "left", "top": "top", "bottom": "bottom"}
    for scene in SCENES:
        before, after = true_facts(scene), true_facts(scene, flipped)
        for fact in before:
            expected = fact
            if fact.kind == "side":
                expected = Fact("side", fact.subject, swapped[fact.value])
            if fact.kind == "left_of":
                expected = Fact("left_of", fact.value, fact.subject)
            assert expected in after
        assert len(before) == len(after)


def test_a_crop_around_everything_spares_the_controls_and_changes_sizes() -> None:
    changed = set()
    for scene in SCENES:
        boxes = np.array([item.box for item in scene.objects])
        x, y = boxes[:, 0].min(), boxes[:, 1].min()
        params = AugmentationParams(x=x, y=y, w=boxes[:, 2].max() - x, h=boxes[:, 3].max() - y)
        for kind, truths in facts_by_kind(scene, params).items():
            if not all(truths):
                changed.add(kind)
    assert changed == {"size", "side"}


def test_a_crop_to_one_object_leaves_one_and_makes_it_big() -> None:
    for scene in SCENES:
        left, top, right, bottom = scene.objects[0].box
        params = AugmentationParams(x=left, y=top, w=right - left, h=bottom - top)
        shape = scene.objects[0].shape
        assert true_facts(scene, params) == {
            Fact("count", "object", "1"), Fact("count", shape, "1"), Fact("shape", shape, ""),
            Fact("colour", shape, scene.objects[0].colour), Fact("size", shape, "big"),
        }  # fmt: skip


def test_small_turns_of_the_hue_break_only_colours_with_a_near_neighbour() -> None:
    def breaks(hue: float) -> set[str]:
        params = AugmentationParams(hue=hue)
        return {
            fact.value
            for scene in SCENES
            for fact in sayable(scene)["colour"]
            if not truth_after_view(scene, [fact], params)[0]
        }

    assert breaks(0.08) == {"red", "pink"}  # towards brown and gold
    assert breaks(-0.08) == {"brown", "gold"}
    assert breaks(0.04) == breaks(-0.04) == set()


def test_facts_are_taken_as_mappings_and_turned_round() -> None:
    for scene in SCENES[:100]:
        for fact in sayable(scene)["left_of"]:
            assert truth_after_view(scene, [fact._asdict(), Fact("right_of", fact.value, fact.subject)]) == [True] * 2
            assert plain("right_of", fact.value, fact.subject) == fact
