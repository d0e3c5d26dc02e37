from __future__ import annotations

import numpy as np
import pytest
from helpers.scene_reading import canonical, holds, objects_of, parse_caption

from coalign.data.scenes.captions import (
    KINDS,
    SYNONYMS,
    TEMPLATES,
    Fact,
    Wording,
    caption_facts,
    make_captions,
    render_caption,
    repeated_shapes,
    sample_facts,
    true_facts,
    truth_after_view,
)
from coalign.data.scenes.layout import COLORS, SHAPES, SPLITS, BufferedRandom, Scene, make_scene
from coalign.randomness import generator
from coalign.types import AugmentationParams

SCENES = [make_scene(0, split, index) for split in SPLITS for index in range(120)]


def captions(scene: Scene) -> list[tuple[str, list[Fact]]]:
    return make_captions(scene, generator(5, 0, scene.index, 0, scene.split))


def test_captions_state_their_facts_and_are_true() -> None:
    kinds = set()
    for scene in SCENES:
        for text, facts in captions(scene):
            stated, definite = parse_caption(text)
            assert stated == set(map(tuple, facts)), text
            assert 1 <= len(facts) <= 3
            for fact in facts:
                assert holds(fact, objects_of(scene)), (text, fact)
            for shape in definite:
                assert sum(item.shape == shape for item in scene.objects) == 1, text
            kinds |= {fact.kind for fact in facts}
    assert kinds == set(KINDS)


def test_relations_are_unambiguous_and_between_different_rows_or_columns() -> None:
    for scene in SCENES:
        shapes = [item.shape for item in scene.objects]
        cells = {item.shape: item.cell for item in scene.objects}
        for _, facts in captions(scene):
            for fact in facts:
                if fact.kind in ("left_of", "above", "bigger_than"):
                    assert shapes.count(fact.subject) == shapes.count(fact.value) == 1
                    axis = {"left_of": 1, "above": 0}.get(fact.kind)
                    assert axis is None or cells[fact.subject][axis] < cells[fact.value][axis]


def test_parser_detects_false_captions() -> None:
    scene = next(s for s in SCENES if len(s.objects) == 2 and not repeated_shapes(s))
    a, b = scene.objects
    wrong_color = next(color for color in COLORS if color != a.color)
    stated, _ = parse_caption(f"a picture of a {wrong_color} {a.shape} and a {b.color} {b.shape}")
    assert {holds(fact, objects_of(scene)) for fact in stated} == {True, False}


def test_true_facts_agree_with_the_boxes() -> None:
    values_by_kind = {
        "colour": COLORS, "size": ("small", "medium", "big"),
        "side": ("left", "center", "right", "top", "middle", "bottom"),
        "shape": ("",), "count": "123", "left_of": SHAPES, "above": SHAPES,
    }  # fmt: skip
    for scene in SCENES[::15]:
        truth = true_facts(scene)
        for kind, values in values_by_kind.items():
            for shape in SHAPES:
                for value in values:
                    assert (Fact(kind, shape, value) in truth) == holds((kind, shape, value), objects_of(scene))


def test_there_are_more_than_a_hundred_thousand_captions() -> None:
    assert len(TEMPLATES) == 8
    assert all(len(set(words)) == 3 for words in SYNONYMS.values())
    assert len({word for words in SYNONYMS.values() for word in words}) == 3 * len(SYNONYMS)
    texts = set()
    for scene in [make_scene(0, "train", index) for index in range(1400)]:
        rng = BufferedRandom(generator(0, 0, scene.index, 0, "count"))
        facts = sample_facts(caption_facts(scene), repeated_shapes(scene), rng, 3)
        texts |= {render_caption(facts, Wording.sample(rng), repeated_shapes(scene)) for _ in range(85)}
    assert len(texts) >= 100_000


def test_captions_of_an_image_are_distinct_and_reproducible() -> None:
    for scene in SCENES[:200]:
        first = captions(scene)
        assert len({text for text, _ in first}) == 4
        assert captions(scene) == first


def test_templates_and_synonyms_are_sampled_uniformly() -> None:
    rng = BufferedRandom(generator(0, 0, 0, 0, "wording"))
    wordings = [Wording.sample(rng) for _ in range(3000)]
    for name, words in SYNONYMS.items():
        shares = [np.mean([wording.word(name) == word for wording in wordings]) for word in words]
        np.testing.assert_allclose(shares, 1 / 3, atol=0.04)
    np.testing.assert_allclose([np.mean([w.template == t for w in wordings]) for t in TEMPLATES], 1 / 8, atol=0.03)


# ---------------------------------------------------------------- facts after augmentation


def rasterized_objects(scene: Scene, params: AugmentationParams, resolution: int = 1200) -> list[dict]:
    """Returns the visible objects of a view, from boxes rasterized in the cropped, resized and flipped frame."""
    rows = ((np.arange(resolution) + 0.5) / resolution * params.h + params.y)[:, None]
    columns = ((np.arange(resolution) + 0.5) / resolution * params.w + params.x)[None, :]
    visible = []
    for item in scene.objects:
        left, top, right, bottom = item.box
        view = (rows > top) & (rows < bottom) & (columns > left) & (columns < right)
        if params.flipped:
            view = view[:, ::-1]
        fraction = view.sum() / resolution**2 * params.w * params.h / ((right - left) * (bottom - top))
        if abs(fraction - 0.5) < 0.02:
            return []  # too close to call
        if fraction > 0.5:
            y, x = (np.nonzero(view.any(axis))[0] for axis in (1, 0))
            edges = [x.min(), y.min(), x.max() + 1, y.max() + 1]
            visible.append({"shape": item.shape, "colour": item.color, "box": [edge / resolution for edge in edges]})
    return visible


def test_truth_after_crop_and_flip_matches_rasterized_boxes() -> None:
    rng = np.random.default_rng(0)
    compared, broken = 0, dict.fromkeys(KINDS, 0)
    for scene in SCENES[:300]:
        w, h = rng.uniform(0.35, 1.0, 2)
        params = AugmentationParams(
            x=rng.uniform(0, 1 - w), y=rng.uniform(0, 1 - h), w=w, h=h, flipped=float(rng.integers(2))
        )
        visible = rasterized_objects(scene, params, 300)
        if not visible:
            continue
        facts = [fact for fact in true_facts(scene) if fact.kind not in ("size", "bigger_than")]
        for fact, true in zip(facts, truth_after_view(scene, facts, params)):
            centers = [((o["box"][0] + o["box"][2]) / 2, (o["box"][1] + o["box"][3]) / 2) for o in visible]
            at_threshold = [v for c in centers for v in c if min(abs(v - 0.4), abs(v - 0.6)) < 0.01]
            aligned = any(abs(c[a] - d[a]) < 0.01 for c in centers for d in centers if c != d for a in (0, 1))
            if (fact.kind == "side" and at_threshold) or (fact.kind in ("left_of", "above") and aligned):
                continue
            assert true == holds(fact, visible), (fact, params)
            compared += 1
            broken[fact.kind] += not true
    assert compared > 2000
    assert all(broken[kind] > 20 for kind in ("side", "left_of", "count", "shape", "colour"))


def truths_by_kind(scene: Scene, params: AugmentationParams) -> dict[str, list[bool]]:
    truths: dict[str, list[bool]] = {kind: [] for kind in KINDS}
    stated = [fact for facts in caption_facts(scene).values() for fact in facts]
    for fact, true in zip(stated, truth_after_view(scene, stated, params)):
        truths[fact.kind].append(true)
    return truths


@pytest.mark.parametrize(
    ("params", "broken"),
    [
        (AugmentationParams(), set()),
        (AugmentationParams(brightness=0.4, contrast=-0.4, saturation=0.4, blur=2.0, hue=0.02), set()),
        (AugmentationParams(grayed=1.0), {"colour"}),
        (AugmentationParams(hue=0.5), {"colour"}),
        (AugmentationParams(flipped=1.0), {"side", "left_of"}),
        (AugmentationParams(grayed=1.0, flipped=1.0), {"colour", "side", "left_of"}),
    ],
)
def test_each_augmentation_breaks_only_its_kinds_of_facts(params: AugmentationParams, broken: set[str]) -> None:
    actual = {kind for scene in SCENES for kind, truths in truths_by_kind(scene, params).items() if not all(truths)}
    assert actual == broken


def test_flip_exchanges_left_and_right() -> None:
    flipped = AugmentationParams(flipped=1.0)
    swapped = {"left": "right", "right": "left"}
    for scene in SCENES:
        before, after = true_facts(scene), true_facts(scene, flipped)
        for fact in before:
            expected = fact
            if fact.kind == "side":
                expected = Fact("side", fact.subject, swapped.get(fact.value, fact.value))
            if fact.kind == "left_of":
                expected = Fact("left_of", fact.value, fact.subject)
            assert expected in after
        assert len(before) == len(after)


def test_crop_around_all_objects_changes_only_sizes_and_sides() -> None:
    changed = set()
    for scene in SCENES:
        boxes = np.array([item.box for item in scene.objects])
        x, y = boxes[:, 0].min(), boxes[:, 1].min()
        params = AugmentationParams(x=x, y=y, w=boxes[:, 2].max() - x, h=boxes[:, 3].max() - y)
        for kind, truths in truths_by_kind(scene, params).items():
            if not all(truths):
                changed.add(kind)
    assert changed == {"size", "side"}


def test_crop_to_one_object_makes_it_single_and_big() -> None:
    for scene in SCENES:
        left, top, right, bottom = scene.objects[0].box
        params = AugmentationParams(x=left, y=top, w=right - left, h=bottom - top)
        shape = scene.objects[0].shape
        assert true_facts(scene, params) == {
            Fact("count", "object", "1"), Fact("count", shape, "1"), Fact("shape", shape, ""),
            Fact("colour", shape, scene.objects[0].color), Fact("size", shape, "big"),
            Fact("side", shape, "center"), Fact("side", shape, "middle"),
        }  # fmt: skip


def test_small_hue_shifts_break_only_colors_with_a_similar_hue() -> None:
    def broken_colors(hue: float) -> set[str]:
        params = AugmentationParams(hue=hue)
        return {
            fact.value
            for scene in SCENES
            for fact in caption_facts(scene)["colour"]
            if not truth_after_view(scene, [fact], params)[0]
        }

    assert broken_colors(0.08) == {"red", "pink"}  # toward brown and gold
    assert broken_colors(-0.08) == {"brown", "gold"}
    assert broken_colors(0.04) == broken_colors(-0.04) == set()


def test_facts_can_be_mappings_or_inverse_relations() -> None:
    for scene in SCENES[:100]:
        for fact in caption_facts(scene)["left_of"]:
            assert truth_after_view(scene, [fact._asdict(), Fact("right_of", fact.value, fact.subject)]) == [True] * 2
            assert canonical("right_of", fact.value, fact.subject) == fact
