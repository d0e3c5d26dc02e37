from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.scene_reading import holds, parse_caption
from PIL import Image

from coalign.data.fingerprints import fingerprints
from coalign.data.scenes import source as scenes
from coalign.data.scenes.captions import KINDS
from coalign.data.scenes.layout import SPLITS
from coalign.data.scenes.source import open_scenes, write_scenes
from coalign.errors import UserError
from coalign.types import AugmentationParams


def test_splits_are_concatenated() -> None:
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
@pytest.mark.parametrize("level", scenes.LEVELS)
def test_single_split_matches_the_concatenated_source(level: str, split: str) -> None:
    together, alone = open_scenes(f"3000:{level},seed=1"), open_scenes(f"3000:{level},seed=1", split)
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


def test_hard_captions_are_those_of_the_published_results() -> None:
    """Digests of what the version that made the results wrote, before there were levels."""
    source = open_scenes("100:hard,swap=0.1")
    captions = [
        text for indices in source.splits.values() for i in indices[:100] for text in source.record(int(i)).captions
    ]
    assert digest(captions) == "72aa2a2157a05b3f6f069eb30a5a6e9f8845bdb4727fc48f15c58b50650ca349"
    foils = [text for kind in KINDS for foil in source.foil_items("test", kind, 50) for text in (foil.true, foil.false)]
    assert digest(foils) == "f840f1a6fa8c0efe34e15e9aa0323a29a42e2aa66fe3519abbbd4b15edcbd6c1"


def digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_the_level_is_part_of_the_data(level: str) -> None:
    """Fingerprints differ between levels in the captions, and in the images if one is simple."""
    found = fingerprints(open_scenes(f"20:{level}", "train"))
    for other in set(scenes.LEVELS) - {level}:
        another = fingerprints(open_scenes(f"20:{other}", "train"))
        assert (found.images == another.images).all() == ("simple" not in (level, other))
        assert not set(found.captions.tolist()) & set(another.captions.tolist())


def test_records_have_the_ground_truth_of_their_image() -> None:
    source = open_scenes("500:hard")
    keys = set()
    for index in range(0, len(source), 101):
        record = source.record(index)
        keys.add(record.key)
        assert json.loads(json.dumps(record.facts)) == record.facts
        assert len(set(record.captions)) == len(record.facts["captions"]) == 4
        for caption, facts in zip(record.captions, record.facts["captions"]):
            stated = {(fact["kind"], fact["subject"], fact["value"]) for fact in facts}
            assert parse_caption(caption)[0] == stated
            assert all(holds(fact, record.facts["objects"]) for fact in stated)
        assert set(record.tags) == {o[k] for o in record.facts["objects"] for k in ("shape", "colour", "size")}
        assert len(record.tags) == len(set(record.tags))
    assert len(keys) == len(range(0, len(source), 101))


def test_images_have_the_requested_size_and_are_reproducible() -> None:
    source = open_scenes("10,size=48")
    pixels = source.image(7)
    assert pixels.shape == (48, 48, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(source)).image(7), pixels)
    assert source.masks(7).shape == (len(source.record(7).facts["objects"]), 48, 48)
    assert (open_scenes("10,size=48,seed=1").image(7) != pixels).any()


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_swapped_samples_are_marked_and_have_the_captions_of_another_image(level: str) -> None:
    plain, swapped = open_scenes(f"4000:{level}"), open_scenes(f"4000:{level},swap=0.1")
    flags = [swapped.record(index).facts["swapped"] for index in range(2000)]
    assert 0.07 < np.mean(flags) < 0.13
    assert not any(swapped.record(index).facts["swapped"] for index in range(4000, len(swapped), 11))
    for index in range(400):
        record, original, partner = swapped.record(index), plain.record(index), plain.record(index ^ 1)
        described = partner if flags[index] else original
        assert (record.captions, record.tags) == (described.captions, described.tags)
        assert record.facts["captions"] == described.facts["captions"]
        assert record.facts["objects"] == original.facts["objects"]
        if index < 40:
            np.testing.assert_array_equal(swapped.image(index), plain.image(index))
    truths = {flag: [] for flag in (False, True)}
    for index in range(400):
        truths[flags[index]] += [all(facts) for facts in swapped.truth_after_view(index, AugmentationParams())]
    assert np.mean(truths[False]) == 1.0
    assert np.mean(truths[True]) < 0.2


@pytest.mark.parametrize("level", scenes.LEVELS)
def test_truth_after_view_is_per_stated_fact(level: str) -> None:
    source = open_scenes(f"50:{level}")
    for index in range(50):
        stated = source.record(index).facts["captions"]
        truth = source.truth_after_view(index, AugmentationParams(grayed=1.0))
        assert [[fact["kind"] != "colour" for fact in facts] for facts in stated] == truth


@pytest.mark.parametrize("kind", KINDS)
def test_foil_items_are_distinct_and_reproducible(kind: str) -> None:
    source = open_scenes("8000:hard")
    items = source.foil_items("test", kind, 600)
    assert len(set(items)) == 600
    assert {item.kind for item in items} == {kind}
    assert {source.record(item.index).facts["split"] for item in items} == {"test"}
    for item in items[::7]:
        objects = source.record(item.index).facts["objects"]
        assert all(holds(fact, objects) for fact in parse_caption(item.true)[0])
        assert not all(holds(fact, objects) for fact in parse_caption(item.false)[0])
    assert source.foil_items("test", kind, 50) == items[:50]


def test_unavailable_foils_are_rejected() -> None:
    with pytest.raises(UserError, match=r"no foils of kind 'taste'; available: shape, .*, count"):
        open_scenes("8:hard").foil_items("test", "taste")
    with pytest.raises(UserError, match=r"no foils of kind 'left_of'; available: shape, colour, size, side\."):
        open_scenes("8:standard").foil_items("test", "left_of")
    with pytest.raises(UserError, match="without a split 'train'; available: test"):
        open_scenes("", "test").foil_items("train", "colour")
    with pytest.raises(UserError, match="foils of kind 'shape', but 1000000 are requested"):
        open_scenes("1", "train").foil_items("train", "shape", 10**6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            "8000,sede=3",
            "no option 'sede'; write scenes:N:LEVEL,seed=SEED,size=PIXELS,swap=FRACTION, as in scenes:8000:standard,seed=3,",
        ),
        ("many", "N is 'many', but must be an integer"),
        ("0", "N is '0', but must be"),
        ("hard", "N is 'hard', but must be an integer from 1 to 10000000; write scenes:N:LEVEL,"),
        (":hard", "N is '', but must be"),
        ("100:easy", "level of scenes is 'easy', but must be simple, standard or hard; write scenes:N:LEVEL,"),
        ("100:", "level of scenes is ''"),
        ("100:hard:size=32", "no option '100:hard:size'"),
        ("100,hard", "no option 'hard'; write scenes:N:LEVEL,"),
        ("N=100", "no option 'N'"),
        ("100,size=8", "size is '8', but must be an integer from 16 to 1024"),
        ("100,swap=2", "swap is '2', but must be a number from 0 to 1"),
        ("100,swap=nan", "swap is 'nan', but must be"),
        ("100,seed=", "seed is '', but must be"),
        ("100,200", "no option '200'"),
    ],
)
def test_invalid_options_are_rejected(options: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_scenes(options)


def test_options() -> None:
    source = open_scenes("8192:standard, seed=3,size=32,swap=0.1")
    assert (len(source.splits["train"]), source.level) == (8192, "standard")
    assert (source.seed, source.size, source.swap) == (3, 32, 0.1)
    assert {open_scenes(options).level for options in ("", "8", "8,seed=3", "8:simple")} == {"simple"}
    assert len(open_scenes("seed=4").splits["train"]) == len(open_scenes().splits["train"]) == 8000
    with pytest.raises(UserError, match="no split 'training'"):
        open_scenes("", "training")


@pytest.fixture
def small_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "EVALUATION_SIZE", 12)


@pytest.mark.usefixtures("small_splits")
def test_written_folder_is_complete(tmp_path: Path) -> None:
    counts = write_scenes(tmp_path / "deep" / "out", "20:hard,swap=0.5", num_foils=15)
    out, source = tmp_path / "deep" / "out", open_scenes("20:hard,swap=0.5")
    assert counts == {"train": 20, "val": 12, "test": 12, "combinations": 12, "shifted": 12}
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
            assert all(holds(fact, row["objects"]) for fact in parse_caption(line["true"])[0])
            assert not all(holds(fact, row["objects"]) for fact in parse_caption(line["false"])[0])
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


@pytest.mark.usefixtures("small_splits")
def test_output_folder_must_be_new_or_empty(tmp_path: Path) -> None:
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


@pytest.mark.usefixtures("small_splits")
def test_an_interrupted_write_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(items: range, what: str) -> Iterator[int]:
        yield from items[:9]
        raise KeyboardInterrupt

    monkeypatch.setattr(scenes, "track", stop)
    with pytest.raises(KeyboardInterrupt):
        write_scenes(tmp_path / "out", "5")
    assert list(tmp_path.iterdir()) == []


def test_foils_are_restricted_to_the_given_indices() -> None:
    source = open_scenes("100:hard")
    indices = source.splits["val"][:200]
    foils = source.foils(indices, per_kind=400)
    assert {foil.kind for foil in foils} == set(KINDS)
    assert {foil.index for foil in foils} <= set(indices.tolist())
    all_foils = source.foils(source.splits["val"], per_kind=400)
    assert len(all_foils) == 400 * len(KINDS)
    assert set(foils) == {foil for foil in all_foils if foil.index in set(indices.tolist())}


def test_images_of_a_single_object_have_a_label() -> None:
    source = open_scenes("300")
    for index in range(300):
        facts = source.record(index).facts
        item = facts["objects"][0]
        assert facts.get("label") == (f"{item['colour']} {item['shape']}" if len(facts["objects"]) == 1 else None)


def test_images_are_cached_and_read_only() -> None:
    source = open_scenes("10")
    image = source.image(3)
    assert source.image(3) is image
    with pytest.raises(ValueError, match="read-only"):
        image[0] = 0
    np.testing.assert_array_equal(open_scenes("10").image(3), image)
