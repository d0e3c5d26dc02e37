from __future__ import annotations

import json
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scene_reading import holds, read

from coalign.data import scenes
from coalign.data.scene_captions import KINDS
from coalign.data.scene_layout import HELD_OUT, SPLITS
from coalign.data.scenes import open_scenes, write_scenes
from coalign.errors import UserError
from coalign.types import AugmentationParams


def test_all_splits_lie_in_one_index_space() -> None:
    source = open_scenes("1000")
    assert list(source.splits) == list(SPLITS)
    np.testing.assert_array_equal(np.concatenate(list(source.splits.values())), np.arange(len(source)))
    assert {name: len(rows) for name, rows in source.splits.items()} == {
        "train": 1000, "val": 2000, "test": 2000, "combinations": 2000, "shifted": 2000
    }  # fmt: skip
    for name, rows in source.splits.items():
        assert {source.record(int(row)).facts["split"] for row in (rows[0], rows[-1])} == {name}
    with pytest.raises(IndexError):
        source.record(len(source))


@pytest.mark.parametrize("split", SPLITS)
def test_a_split_alone_is_the_same_as_among_all(split: str) -> None:
    together, alone = open_scenes("3000,seed=1"), open_scenes("3000,seed=1", split)
    assert len(alone) == len(together.splits[split])
    for number in (0, 1, 777, len(alone) - 1):
        index = int(together.splits[split][number])
        assert alone.record(number) == together.record(index)
        np.testing.assert_array_equal(alone.image(number), together.image(index))


def test_train_sets_are_nested() -> None:
    small, large = open_scenes("1000,swap=0.1"), open_scenes("16000,swap=0.1")
    for index in range(0, 1000, 37):
        assert small.record(index) == large.record(index)
        np.testing.assert_array_equal(small.image(index), large.image(index))
    np.testing.assert_array_equal(small.image(int(small.splits["val"][3])), large.image(int(large.splits["val"][3])))


def test_records_tell_what_is_in_the_picture() -> None:
    source = open_scenes("500")
    keys = set()
    for index in range(0, len(source), 101):
        record = source.record(index)
        keys.add(record.key)
        assert json.loads(json.dumps(record.facts)) == record.facts
        assert len(set(record.captions)) == len(record.facts["captions"]) == 4
        for caption, facts in zip(record.captions, record.facts["captions"]):
            stated = {(fact["kind"], fact["subject"], fact["value"]) for fact in facts}
            assert read(caption)[0] == stated
            assert all(holds(fact, record.facts["objects"]) for fact in stated)
        assert set(record.tags) == {o[k] for o in record.facts["objects"] for k in ("shape", "colour", "size")}
        assert len(record.tags) == len(set(record.tags))
    assert len(keys) == len(range(0, len(source), 101))


def test_images_have_the_asked_size_and_come_again_elsewhere() -> None:
    source = open_scenes("10,size=48")
    pixels = source.image(7)
    assert pixels.shape == (48, 48, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).image(7), pixels)
    assert source.masks(7).shape == (len(source.record(7).facts["objects"]), 48, 48)
    assert (open_scenes("10,size=48,seed=1").image(7) != pixels).any()


def test_swapped_pairs_are_flagged_and_tell_of_another_picture() -> None:
    plain, swapped = open_scenes("4000"), open_scenes("4000,swap=0.1")
    flags = [swapped.record(index).facts["swapped"] for index in range(2000)]
    assert 0.07 < np.mean(flags) < 0.13
    assert not any(swapped.record(index).facts["swapped"] for index in range(4000, len(swapped), 11))
    for index in range(400):
        record, own, partner = swapped.record(index), plain.record(index), plain.record(index ^ 1)
        told = partner if flags[index] else own
        assert (record.captions, record.tags) == (told.captions, told.tags)
        assert record.facts["captions"] == told.facts["captions"]
        assert record.facts["objects"] == own.facts["objects"]
        if index < 40:
            np.testing.assert_array_equal(swapped.image(index), plain.image(index))
    truths = {flag: [] for flag in (False, True)}
    for index in range(400):
        truths[flags[index]] += [all(facts) for facts in swapped.truth_after_view(index, AugmentationParams())]
    assert np.mean(truths[False]) == 1.0
    assert np.mean(truths[True]) < 0.2


def test_truth_follows_the_stated_facts() -> None:
    source = open_scenes("50")
    for index in range(50):
        stated = source.record(index).facts["captions"]
        truth = source.truth_after_view(index, AugmentationParams(greyed=1.0))
        assert [[fact["kind"] != "colour" for fact in facts] for facts in stated] == truth


@pytest.mark.parametrize("kind", KINDS)
def test_foil_items_are_many_and_different(kind: str) -> None:
    source = open_scenes()
    items = source.foil_items("test", kind, 600)
    assert len(set(items)) == 600
    assert {item.kind for item in items} == {kind}
    assert {source.record(item.index).facts["split"] for item in items} == {"test"}
    for item in items[::7]:
        objects = source.record(item.index).facts["objects"]
        assert all(holds(fact, objects) for fact in read(item.true)[0])
        assert not all(holds(fact, objects) for fact in read(item.false)[0])
    assert source.foil_items("test", kind, 50) == items[:50]


def test_foils_that_are_not_there_are_refused() -> None:
    with pytest.raises(UserError, match="kind 'taste'"):
        open_scenes().foil_items("test", "taste")
    with pytest.raises(UserError, match="no split 'train'"):
        open_scenes("", "test").foil_items("train", "colour")
    with pytest.raises(UserError, match="foils of the kind shape, not 1000000"):
        open_scenes("1", "train").foil_items("train", "shape", 10**6)


@pytest.mark.parametrize("split", ["test", "combinations", "shifted"])
def test_each_caption_of_a_pool_fits_exactly_one_image(split: str) -> None:
    source = open_scenes()
    indices, captions = source.retrieval_pool(split)
    assert len(indices) == len(set(indices.tolist())) == len(captions) == 500
    assert {source.record(int(i)).facts["split"] for i in indices} == {split}
    objects = [source.record(int(index)).facts["objects"] for index in indices]
    for position in range(0, 500, 5):
        facts = read(captions[position])[0]
        assert [i for i, told in enumerate(objects) if all(holds(fact, told) for fact in facts)] == [position]
    numbers = Counter(len(told) for told in objects)
    assert min(numbers[n] for n in (1, 2, 3)) > 20


def test_a_pool_that_is_too_large_is_refused() -> None:
    with pytest.raises(UserError, match="unambiguous captions, not 1900"):
        open_scenes().retrieval_pool("test", 1900)


@pytest.mark.parametrize("by", ["shape", "colour", "shape_colour"])
def test_zero_shot_labels_name_the_single_object(by: str) -> None:
    source = open_scenes("100")
    for split in ("test", "combinations"):
        indices, labels, names = source.zero_shot_set(split, by)
        assert len(names) == len(set(names)) == (64 if by == "shape_colour" else 8)
        assert 300 < len(indices) == len(labels) < 500
        for index, label in zip(indices[:60].tolist(), labels.tolist()):
            (item,) = source.record(index).facts["objects"]
            assert names[label] == {"shape_colour": f"{item['colour']} {item['shape']}"}.get(by, item.get(by))
        if by == "shape_colour":
            held_out = {f"{colour} {shape}" for shape, colour in HELD_OUT}
            found = {names[label] for label in labels}
            assert found == held_out if split == "combinations" else found == set(names) - held_out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("8000,sede=3", "no option 'sede'"),
        ("many", "train must be a whole number"),
        ("0", "train must be"),
        ("100,size=8", "size must be a whole number from 16 to 1024"),
        ("100,swap=2", "swap must be a number from 0 to 1"),
        ("100,swap=nan", "swap must be"),
        ("100,seed=", "seed must be"),
        ("100,200", "no option '200'"),
    ],
)
def test_wrong_options_get_one_clear_sentence(options: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        open_scenes(options)


def test_options() -> None:
    source = open_scenes("8192, seed=3,size=32,swap=0.1")
    assert (len(source.splits["train"]), source.seed, source.size, source.swap) == (8192, 3, 32, 0.1)
    assert len(open_scenes("seed=4").splits["train"]) == len(open_scenes().splits["train"]) == 8000
    with pytest.raises(UserError, match="no split 'training'"):
        open_scenes("", "training")


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "EVALUATION_SIZE", 12)


@pytest.mark.usefixtures("few")
def test_a_written_folder_holds_everything(tmp_path: Path) -> None:
    done: list[tuple[int, int]] = []
    counts = write_scenes(
        tmp_path / "deep" / "out", "20,swap=0.5", num_foils=15, progress=lambda now, total: done.append((now, total))
    )
    out, source = tmp_path / "deep" / "out", open_scenes("20,swap=0.5")
    assert counts == {"train": 20, "val": 12, "test": 12, "combinations": 12, "shifted": 12}
    assert done == [(n, 68) for n in range(1, 69)]
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len(list((out / "images").iterdir())) == len(source) == 68
    for index, row in enumerate(rows):
        record = source.record(index)
        assert set(row) == {"image", "captions", "tags", "split", "objects", "facts", "swapped"}
        assert (row["captions"], row["tags"]) == (list(record.captions), list(record.tags))
        assert (row["facts"], row["swapped"]) == (record.facts["captions"], record.facts["swapped"])
        np.testing.assert_array_equal(np.asarray(Image.open(out / row["image"])), source.image(index))
    assert 0 < sum(row["swapped"] for row in rows) < 20
    by_image = {row["image"]: row for row in rows}
    for kind in KINDS:
        lines = [json.loads(line) for line in (out / f"foils_{kind}.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(lines) == 15
        for line in lines:
            row = by_image[line["image"]]
            assert row["split"] == "test"
            assert all(holds(fact, row["objects"]) for fact in read(line["true"])[0])
            assert not all(holds(fact, row["objects"]) for fact in read(line["false"])[0])
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


@pytest.mark.usefixtures("few")
def test_a_folder_in_use_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").write_text("mine")
    with pytest.raises(UserError, match="not an empty folder"):
        write_scenes(tmp_path / "used", "5")
    assert [path.name for path in (tmp_path / "used").iterdir()] == ["file"]
    with pytest.raises(UserError, match="not an empty folder"):
        write_scenes(tmp_path / "used" / "file", "5")
    with pytest.raises(UserError, match="cannot be written"):
        write_scenes(tmp_path / "used" / "file" / "below", "5")
    (tmp_path / "empty").mkdir()
    write_scenes(tmp_path / "empty", "5", num_foils=2)
    assert (tmp_path / "empty" / "metadata.jsonl").exists()


@pytest.mark.usefixtures("few")
def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    def stop(now: int, total: int) -> None:
        if now == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", "5", progress=stop)
    assert list(tmp_path.iterdir()) == []


def test_foils_of_all_kinds_are_of_the_images_asked_for() -> None:
    source = open_scenes("100")
    few = source.splits["val"][:200]
    found = source.foils(few, per_kind=400)
    assert {foil.kind for foil in found} == set(KINDS)
    assert {foil.index for foil in found} <= set(few.tolist())
    everything = source.foils(source.splits["val"], per_kind=400)
    assert len(everything) == 400 * len(KINDS)
    assert set(found) == {foil for foil in everything if foil.index in set(few.tolist())}


def test_a_picture_of_one_object_has_a_label() -> None:
    source = open_scenes("300")
    for index in range(300):
        facts = source.record(index).facts
        one = facts["objects"][0]
        assert facts.get("label") == (f"{one['colour']} {one['shape']}" if len(facts["objects"]) == 1 else None)


def test_a_picture_is_drawn_once_and_cannot_be_changed() -> None:
    source = open_scenes("10")
    picture = source.image(3)
    assert source.image(3) is picture
    with pytest.raises(ValueError, match="read-only"):
        picture[0] = 0
    np.testing.assert_array_equal(open_scenes("10").image(3), picture)
