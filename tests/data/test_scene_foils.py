from __future__ import annotations

from collections import Counter
from dataclasses import asdict

import pytest
from scene_reading import holds, read, words

from coalign.data.randomness import generator
from coalign.data.scene_captions import KINDS
from coalign.data.scene_foils import foils
from coalign.data.scene_layout import HELD_OUT, make_scene


@pytest.fixture(scope="module")
def made() -> dict[tuple[str, str], list[tuple[list[dict], str, str, str]]]:
    """By split and kind: (objects, true, false, how)."""
    out: dict[tuple[str, str], list[tuple[list[dict], str, str, str]]] = {}
    for split in ("test", "combinations"):
        for kind in KINDS:
            for index in range(500):
                scene = make_scene(0, split, index)
                pair = foils(scene, kind, generator(0, 0, index, 0, kind))
                if pair is not None:
                    objects = [{**asdict(item), "box": item.box} for item in scene.objects]
                    out.setdefault((split, kind), []).append((objects, *pair))
    return out


@pytest.mark.parametrize("kind", KINDS)
def test_one_is_true_and_the_other_is_not(made: dict, kind: str) -> None:
    hows = set()
    for objects, true, false, how in made["test", kind] + made["combinations", kind]:
        right, wrong = read(true)[0], read(false)[0]
        assert all(holds(fact, objects) for fact in right), true
        broken = {fact for fact in wrong if not holds(fact, objects)}
        assert broken, false
        assert {fact[0] for fact in broken} == {kind}, (true, false)
        if how == "swap":
            assert words(true) == words(false)
            assert true != false
        elif how == "replace":
            assert len(right) == len(wrong)
            assert len(right - wrong) == len(wrong - right) == 1
        else:
            assert len(wrong - right) == 1
            assert {fact for fact in right - wrong if fact[0] != "shape"} == set()
        hows.add(how)
    assert hows == ({"replace", "add"} if kind == "shape" else {"replace", "swap", "add"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_captions_alone_do_not_tell(made: dict, kind: str) -> None:
    """Which facts true and false captions state, counted on half of the items, does not help on the other half."""
    items = [item for item in made["test", kind] if item[3] != "add"]
    half = len(items) // 2
    weight: Counter[str] = Counter()
    for _, true, false, _ in items[:half]:
        for word in read(true)[0] - read(false)[0]:
            weight[word[0], word[2]] += 1
        for word in read(false)[0] - read(true)[0]:
            weight[word[0], word[2]] -= 1
    right = 0.0
    for _, true, false, _ in items[half:]:
        a, b = (sum(weight[word[0], word[2]] for word in read(text)[0]) for text in (true, false))
        right += 0.5 if a == b else float(a > b)
    tested = len(items) - half
    assert abs(right / tested - 0.5) < 3.5 * 0.5 / tested**0.5


@pytest.mark.parametrize("split", ["test", "combinations"])
def test_unseen_pairs_are_in_both_or_neither(made: dict, split: str) -> None:
    both = 0
    for kind in KINDS:
        for _, true, false, how in made[split, kind]:
            if how == "add" and split == "combinations":
                continue
            novel = [sum((f[1], f[2]) in HELD_OUT for f in read(t)[0] if f[0] == "colour") for t in (true, false)]
            assert novel[0] == novel[1]
            both += novel[0] > 0
    assert (both > 50) == (split == "combinations")


def test_scenes_without_the_facts_give_none() -> None:
    for index in range(100):
        scene = make_scene(0, "test", index)
        if len(scene.objects) == 1:
            for kind in ("left_of", "above", "bigger_than"):
                assert foils(scene, kind, generator(0, 0, index, 0, kind)) is None
