from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from coalign.data.scene_layout import COLOURS, DARK, HELD_OUT, LIGHT, SHAPES, SIZES, SPLITS, make_scene


def pairs_of(split: str, number: int = 1500) -> Counter[tuple[str, str]]:
    return Counter((o.shape, o.colour) for i in range(number) for o in make_scene(0, split, i).objects)


def test_luma_is_equal_across_the_hues() -> None:
    lumas = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b in COLOURS.values()]
    np.testing.assert_allclose(lumas, [DARK, LIGHT] * 4, atol=1e-9)
    assert len({tuple(map(round, colour)) for colour in COLOURS.values()}) == 8
    assert all(0 <= channel <= 255 for colour in COLOURS.values() for channel in colour)


def test_two_pairs_are_held_out_in_every_row_and_column() -> None:
    assert len(HELD_OUT) == 16
    assert Counter(shape for shape, _ in HELD_OUT) == dict.fromkeys(SHAPES, 2)
    assert Counter(colour for _, colour in HELD_OUT) == dict.fromkeys(COLOURS, 2)


@pytest.mark.parametrize("split", SPLITS)
def test_held_out_pairs_are_in_combinations_alone(split: str) -> None:
    pairs = pairs_of(split)
    if split == "combinations":
        assert set(pairs) >= HELD_OUT
        for index in range(500):
            assert any((o.shape, o.colour) in HELD_OUT for o in make_scene(0, split, index).objects)
    else:
        assert len(pairs) == 48
        assert not set(pairs) & HELD_OUT


def test_numbers_of_objects_are_as_specified() -> None:
    counts = Counter(len(make_scene(0, "train", i).objects) for i in range(3000))
    np.testing.assert_allclose([counts[n] / 3000 for n in (1, 2, 3)], [0.2, 0.6, 0.2], atol=0.03)


def test_objects_keep_to_their_cells_and_sizes_order_the_boxes() -> None:
    areas: dict[str, list[float]] = {size: [] for size in SIZES}
    for index in range(600):
        for item in make_scene(0, "train", index).objects:
            left, top, right, bottom = item.box
            row, column = item.cell
            assert column / 3 - 1e-9 <= left < right <= (column + 1) / 3 + 1e-9
            assert row / 3 - 1e-9 <= top < bottom <= (row + 1) / 3 + 1e-9
            areas[item.size].append((right - left) * (bottom - top))
    assert max(areas["small"]) < min(areas["medium"])
    assert max(areas["medium"]) < min(areas["big"])


def test_nothing_tells_left_from_right() -> None:
    scenes = [make_scene(0, "train", i) for i in range(3000)]
    for values in (
        [s.light[0] for s in scenes],
        [o.tilt for s in scenes for o in s.objects],
        [o.x - 0.5 for s in scenes for o in s.objects],
        [np.sin(4 * np.pi * s.background.angle) for s in scenes],
    ):
        assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_the_shifted_split_has_other_nuisance_and_the_same_contents() -> None:
    plain, shifted = ([make_scene(0, split, i) for i in range(800)] for split in ("test", "shifted"))
    assert not {s.background.kind for s in plain} & {s.background.kind for s in shifted}
    assert max(s.gain for s in shifted) < min(s.gain for s in plain)
    for attribute in ("shape", "size"):
        a, b = (Counter(getattr(o, attribute) for s in scenes for o in s.objects) for scenes in (plain, shifted))
        np.testing.assert_allclose([a[k] for k in a], [b[k] for k in a], rtol=0.35)


def test_a_scene_depends_on_seed_split_and_index() -> None:
    scene = make_scene(3, "val", 5)
    make_scene.cache_clear()
    assert make_scene(3, "val", 5) == scene
    assert make_scene(3, "val", 5) is not scene
    others = [make_scene(3, "val", 6), make_scene(4, "val", 5), make_scene(3, "test", 5)]
    assert all(other.objects != scene.objects for other in others)
