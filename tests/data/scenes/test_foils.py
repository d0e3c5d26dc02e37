from __future__ import annotations

from collections import Counter

import pytest
from helpers.scene_reading import holds, objects_of, parse_caption, words

from coalign.data.scenes.captions import KINDS
from coalign.data.scenes.foils import foils
from coalign.data.scenes.layout import HELD_OUT, make_scene
from coalign.randomness import generator


@pytest.fixture(scope="module")
def foils_by_split_and_kind() -> dict[tuple[str, str], list[tuple[list[dict], str, str, str]]]:
    """(split, kind) -> list of (objects, true caption, foil, how)."""
    samples: dict[tuple[str, str], list[tuple[list[dict], str, str, str]]] = {}
    for split in ("test", "combinations"):
        for kind in KINDS:
            for index in range(500):
                scene = make_scene(0, split, index)
                foil = foils(scene, kind, generator(0, 0, index, 0, kind))
                if foil is not None:
                    samples.setdefault((split, kind), []).append((objects_of(scene), *foil))
    return samples


@pytest.mark.parametrize("kind", KINDS)
def test_foils_are_false_in_one_kind_of_fact(foils_by_split_and_kind: dict, kind: str) -> None:
    hows = set()
    samples = foils_by_split_and_kind["test", kind] + foils_by_split_and_kind["combinations", kind]
    for objects, true, false, how in samples:
        true_facts, false_facts = parse_caption(true)[0], parse_caption(false)[0]
        assert all(holds(fact, objects) for fact in true_facts), true
        broken = {fact for fact in false_facts if not holds(fact, objects)}
        assert broken, false
        assert {fact[0] for fact in broken} == {kind}, (true, false)
        if how == "swap":
            assert words(true) == words(false)
            assert true != false
        elif how == "replace":
            assert len(true_facts) == len(false_facts)
            assert len(true_facts - false_facts) == len(false_facts - true_facts) == 1
        else:
            assert len(false_facts - true_facts) == 1
            assert {fact for fact in true_facts - false_facts if fact[0] != "shape"} == set()
        hows.add(how)
    assert hows == ({"replace", "add"} if kind == "shape" else {"replace", "swap", "add"})


@pytest.mark.parametrize("kind", KINDS)
def test_captions_alone_do_not_reveal_the_foil(foils_by_split_and_kind: dict, kind: str) -> None:
    """Fact frequencies in true captions and foils, counted on half of the samples, do not help on the other half."""
    samples = [sample for sample in foils_by_split_and_kind["test", kind] if sample[3] != "add"]
    half = len(samples) // 2
    weights: Counter[str] = Counter()
    for _, true, false, _ in samples[:half]:
        for fact in parse_caption(true)[0] - parse_caption(false)[0]:
            weights[fact[0], fact[2]] += 1
        for fact in parse_caption(false)[0] - parse_caption(true)[0]:
            weights[fact[0], fact[2]] -= 1
    correct = 0.0
    for _, true, false, _ in samples[half:]:
        a, b = (sum(weights[fact[0], fact[2]] for fact in parse_caption(text)[0]) for text in (true, false))
        correct += 0.5 if a == b else float(a > b)
    tested = len(samples) - half
    assert abs(correct / tested - 0.5) < 3.5 * 0.5 / tested**0.5


@pytest.mark.parametrize("split", ["test", "combinations"])
def test_held_out_combinations_are_in_both_captions_or_neither(foils_by_split_and_kind: dict, split: str) -> None:
    num_both = 0
    for kind in KINDS:
        for _, true, false, how in foils_by_split_and_kind[split, kind]:
            if how == "add" and split == "combinations":
                continue
            counts = [
                sum((fact[1], fact[2]) in HELD_OUT for fact in parse_caption(text)[0] if fact[0] == "colour")
                for text in (true, false)
            ]
            assert counts[0] == counts[1]
            num_both += counts[0] > 0
    assert (num_both > 50) == (split == "combinations")


def test_scenes_without_suitable_facts_have_no_foils() -> None:
    for index in range(100):
        scene = make_scene(0, "test", index)
        if len(scene.objects) == 1:
            for kind in ("left_of", "above", "bigger_than"):
                assert foils(scene, kind, generator(0, 0, index, 0, kind)) is None
