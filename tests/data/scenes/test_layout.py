from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from coalign.data.scenes.captions import true_facts
from coalign.data.scenes.layout import COLORS, DARK, HELD_OUT, LIGHT, SHAPES, SIZES, SPLITS, make_scene


def combinations(split: str, num_scenes: int = 1500) -> Counter[tuple[str, str]]:
    return Counter((o.shape, o.color) for i in range(num_scenes) for o in make_scene(0, split, i).objects)


def test_luma_is_equal_across_hues() -> None:
    lumas = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in COLORS.values()]
    np.testing.assert_allclose(lumas, [DARK, LIGHT] * 4, atol=1e-9)
    assert len({tuple(map(round, color)) for color in COLORS.values()}) == 8
    assert all(0 <= channel <= 255 for color in COLORS.values() for channel in color)


def test_two_combinations_are_held_out_per_shape_and_color() -> None:
    assert len(HELD_OUT) == 16
    assert Counter(shape for shape, _ in HELD_OUT) == dict.fromkeys(SHAPES, 2)
    assert Counter(color for _, color in HELD_OUT) == dict.fromkeys(COLORS, 2)


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_combinations_are_only_in_the_compositional_split(split: str) -> None:
    pairs = combinations(split)
    if split == "combinations":
        assert set(pairs) >= HELD_OUT
        for index in range(500):
            assert any((o.shape, o.color) in HELD_OUT for o in make_scene(0, split, index).objects)
    else:
        assert len(pairs) == 48
        assert not set(pairs) & HELD_OUT


def test_distribution_of_the_number_of_objects() -> None:
    counts = Counter(len(make_scene(0, "train", i).objects) for i in range(3000))
    np.testing.assert_allclose([counts[n] / 3000 for n in (1, 2, 3)], [0.2, 0.6, 0.2], atol=0.03)


@pytest.mark.parametrize("simple", [False, True])
def test_objects_are_inside_their_cells_and_ordered_by_size(simple: bool) -> None:
    areas: dict[str, list[float]] = {size: [] for size in SIZES}
    for index in range(600):
        for item in make_scene(0, "train", index, simple).objects:
            left, top, right, bottom = item.box
            row, column = item.cell
            if simple:
                assert row == 1
                assert 0 <= top < bottom <= 1
                assert column / 4 - 1e-9 <= left < right <= column / 4 + 0.5 + 1e-9
            else:
                assert column / 3 - 1e-9 <= left < right <= (column + 1) / 3 + 1e-9
                assert row / 3 - 1e-9 <= top < bottom <= (row + 1) / 3 + 1e-9
            areas[item.size].append((right - left) * (bottom - top))
    assert simple == (not areas["small"])
    assert max(areas["small"], default=0) < min(areas["medium"])
    assert max(areas["medium"]) < min(areas["big"])


def test_simple_scenes_have_one_or_two_large_objects_of_different_shapes() -> None:
    scenes = [make_scene(0, split, i, simple=True) for split in SPLITS for i in range(600)]
    assert Counter(len(scene.objects) for scene in scenes).keys() == {1, 2}
    assert sum(len(scene.objects) == 1 for scene in scenes) / len(scenes) == pytest.approx(0.2, abs=0.03)
    for scene in scenes:
        assert len({item.shape for item in scene.objects}) == len(scene.objects)
        assert len({item.cell for item in scene.objects}) == len(scene.objects)
        assert {("size", item.shape, item.size) for item in scene.objects} <= true_facts(scene)
        for item in scene.objects:
            assert item.diameter == pytest.approx(1.5 * SIZES[item.size], rel=0.031)
            assert ((item.shape, item.color) in HELD_OUT) <= (scene.split == "combinations")
    assert all(
        any((item.shape, item.color) in HELD_OUT for item in scene.objects)
        for scene in scenes
        if scene.split == "combinations"
    )


def test_nuisance_parameters_are_left_right_symmetric() -> None:
    scenes = [make_scene(0, "train", i) for i in range(3000)]
    for values in (
        [s.light[0] for s in scenes],
        [o.tilt for s in scenes for o in s.objects],
        [o.x - 0.5 for s in scenes for o in s.objects],
        [np.sin(4 * np.pi * s.background.angle) for s in scenes],
    ):
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_shifted_split_differs_in_nuisance_parameters_only() -> None:
    plain, shifted = ([make_scene(0, split, i) for i in range(800)] for split in ("test", "shifted"))
    assert not {s.background.kind for s in plain} & {s.background.kind for s in shifted}
    assert max(s.gain for s in shifted) < min(s.gain for s in plain)
    for attribute in ("shape", "size"):
        a, b = (Counter(getattr(o, attribute) for s in scenes for o in s.objects) for scenes in (plain, shifted))
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=0.35)


def test_scene_depends_on_seed_split_and_index() -> None:
    scene = make_scene(3, "val", 5)
    make_scene.cache_clear()
    assert make_scene(3, "val", 5) == scene
    assert make_scene(3, "val", 5) is not scene
    others = [make_scene(3, "val", 6), make_scene(4, "val", 5), make_scene(3, "test", 5)]
    assert all(other.objects != scene.objects for other in others)
