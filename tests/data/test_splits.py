from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from helpers.data_files import write_tar

from coalign.data import splits as splits_module
from coalign.data.components import connected_components
from coalign.data.fingerprints import fingerprints
from coalign.data.sources.base import Classes, Source, Subset
from coalign.data.sources.open import open_source
from coalign.data.sources.tar.shards import open_shards
from coalign.data.splits import assign_splits, nested_subset
from coalign.errors import BadSample, UserError
from coalign.types import Record


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@dataclass
class Memory(Source):
    """An in-memory source of (key, captions, image bytes) rows. Captions or image bytes of None are bad."""

    rows: list
    name: str = "memory"
    splits: dict | None = None
    reads: list = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        key, captions, _ = self.rows[index]
        if captions is None:
            raise BadSample("no caption")
        return Record(key, tuple(captions))

    def image(self, index: int) -> bytes:
        self.reads.append(index)
        if self.rows[index][2] is None:
            raise BadSample("image file is missing")
        return self.rows[index][2]


def plain(count: int, prefix: str = "k") -> list:
    return [(f"{prefix}{i}", [f"caption {prefix} {i}"], f"image {prefix} {i}".encode()) for i in range(count)]


def sides(source) -> dict[str, str]:
    parts, _ = assign_splits(source)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(len(source)))  # each sample once
    return {source.rows[i][0]: name for name, indices in parts.items() for i in indices}


def test_components_against_scipy() -> None:
    sparse = pytest.importorskip("scipy.sparse")
    from scipy.sparse.csgraph import connected_components as scipy_components

    rng = np.random.default_rng(0)
    for count, edges, values in [(1, 1, 1), (50, 40, 30), (300, 280, 250), (2000, 3000, 3000), (500, 0, 1)]:
        sample, value = rng.integers(count, size=edges), rng.integers(values, size=edges)
        ours = connected_components(count, sample, value)
        graph = sparse.coo_matrix((np.ones(edges), (sample, value + count)), shape=(count + values, count + values))
        _, theirs = scipy_components(graph, directed=False)
        for i, label in enumerate(theirs[:count]):
            assert ours[i] == np.flatnonzero(theirs[:count] == label)[0]
    # The worst case: a chain in which each sample shares a value only with the next.
    chain = np.random.default_rng(1).permutation(3000)
    ours = connected_components(3000, np.concatenate([chain[:-1], chain[1:]]), np.tile(np.arange(2999), 2))
    assert not ours.any()


def test_shared_captions_and_images_stay_together() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(3000):
        captions = [f"caption {rng.integers(4000)}" for _ in range(rng.integers(1, 3))]
        rows.append((f"k{i}", captions, f"image {rng.integers(5000)}".encode()))
    source = Memory(rows)
    side = sides(source)
    for position in (1, 2):
        seen: dict = {}
        for row in rows:
            for value in row[1] if position == 1 else [row[2]]:
                assert seen.setdefault(value, side[row[0]]) == side[row[0]]


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_val_has_the_requested_fraction(fraction: float) -> None:
    count = 8_000
    parts, counts = assign_splits(Memory(plain(count)), val_fraction=fraction)
    assert abs(len(parts["val"]) - fraction * count) < 5 * np.sqrt(fraction * (1 - fraction) * count)
    assert counts["train"] + counts["val"] == counts["groups"] == count
    assert counts["largest_group"] == 1


def test_boilerplate_goes_to_train_and_val_keeps_its_fraction() -> None:
    fractions = []
    rows = plain(602) + [(f"g{i}", ["gramastar"], f"drawing {i}".encode()) for i in range(138)]
    source = Memory(rows)
    prints = fingerprints(source)
    source.fingerprints = lambda: prints  # read once for all seeds
    for seed in range(60):
        parts, counts = assign_splits(source, seed=seed)
        assert parts["val"].max() < 602
        assert counts["largest_group"] == counts["grouped"] == 138
        fractions.append(len(parts["val"]) / 602)
    assert np.mean(fractions) == pytest.approx(0.05, abs=0.007)
    assert np.std(fractions) > 0  # splits depend on the seed


def test_a_test_split_is_held_out_besides_val() -> None:
    """No caption and no image is on two sides; every sample is on one; both have their fraction; samples that come later move none."""
    rng = np.random.default_rng(0)
    rows = [
        (f"k{i}", [f"caption {rng.integers(6000)}", f"more {i}"], f"image {rng.integers(8000)}".encode())
        for i in range(4000)
    ]
    source = Memory(rows)
    parts, counts = assign_splits(source, val_fraction=0.1, test_fraction=0.1)
    assert sorted(np.concatenate(list(parts.values())).tolist()) == list(range(4000))
    assert {name: counts[name] for name in parts} == {name: len(indices) for name, indices in parts.items()}
    assert len(parts["test"]) == pytest.approx(400, abs=100)
    assert len(parts["val"]) == pytest.approx(360, abs=100)
    seen: dict = {}
    for name, indices in parts.items():
        for index in indices:
            for value in (*rows[index][1], rows[index][2]):
                assert seen.setdefault(value, name) == name
    without, _ = assign_splits(source, val_fraction=0.1)
    assert set(parts["val"]) <= set(without["val"])  # the hash of val is the same with and without test
    later, _ = assign_splits(Memory([*plain(500, "new"), *rows]), val_fraction=0.1, test_fraction=0.1)
    for name, indices in parts.items():
        assert set(indices + 500) <= set(later[name])


def test_a_test_split_of_the_data_is_kept() -> None:
    own = {"train": np.arange(300), "test": np.arange(300, 400)}
    parts, _ = assign_splits(Memory(plain(400), splits=own), val_fraction=0.1, test_fraction=0.3)
    assert parts["test"].tolist() == list(range(300, 400))
    assert sorted([*parts["train"], *parts["val"]]) == list(range(300))
    own = {"train": np.arange(300), "val": np.arange(300, 400)}
    parts, counts = assign_splits(Memory(plain(400), splits=own), test_fraction=0.2)
    assert parts["val"].tolist() == list(range(300, 400))
    assert sorted([*parts["train"], *parts["test"]]) == list(range(300))
    assert 30 < counts["test"] < 90
    only = {"val": np.arange(400)}
    assert assign_splits(Memory(plain(400), splits=only), test_fraction=0.2)[0].keys() == {"val"}


def test_the_test_split_has_every_class_that_can_be_divided() -> None:
    rows = [(f"k{i}", [f"class {i % 7}"], f"image {i}".encode()) for i in range(140)]
    parts, _ = assign_splits(Memory(rows), val_fraction=0.1, test_fraction=0.1)
    for indices in parts.values():
        assert {int(i) % 7 for i in indices} == set(range(7))


def test_groups_are_as_frequent_in_val_as_single_samples() -> None:
    rows = [(f"k{i}", [f"caption {i // 3}"], f"image {i}".encode()) for i in range(12_000)]
    parts, counts = assign_splits(Memory(rows), val_fraction=0.1)
    assert counts["groups"] == 4_000
    assert len(parts["val"]) / 12_000 == pytest.approx(0.1, abs=0.02)


class WithStyle(Memory):
    """Each sample has a style, the first part of its key; "-" means none."""

    def record(self, index: int) -> Record:
        record = super().record(index)
        return replace(record, facts={"style": record.key.partition("/")[0].strip("-")})


def test_val_by_a_column_holds_out_whole_groups() -> None:
    """Train and val may share captions but no value and no image, and large groups stay in train."""
    rows = [(f"artist {i % 200}/{i}", [f"caption {i % 300}"], f"image {i}".encode()) for i in range(2000)]
    rows += [(f"busy/{i}", [f"busy {i}"], f"busy {i}".encode()) for i in range(100)]
    rows += [(f"-/{i}", [f"nobody {i}"], f"nobody {i}".encode()) for i in range(40)]
    rows += [(f"copier {i}/1", ["a copy"], f"image {i}".encode()) for i in range(200)]
    source = WithStyle(rows)
    parts, counts = assign_splits(source, val_fraction=0.4, by="style")
    styles = {name: {source.record(i).facts["style"] for i in parts[name].tolist()} for name in ("train", "val")}
    assert styles["train"] & styles["val"] <= {""}
    assert "busy" in styles["train"]
    assert 0.3 * 2000 < len(parts["val"]) < 0.5 * 2100
    captions = [{source.record(i).captions[0] for i in parts[name].tolist()} for name in ("train", "val")]
    assert captions[0] & captions[1]
    images = [{source.image(i) for i in parts[name].tolist()} for name in ("train", "val")]
    assert not images[0] & images[1]
    assert counts["groups"] == 200 + 1 + 40 + 200
    left_out = set(range(len(rows))) - {i for part in parts.values() for i in part.tolist()}
    trained = {source.image(i) for i in parts["train"].tolist()}
    assert left_out
    assert counts["excluded"] == len(left_out)
    assert all(source.image(i) in trained for i in left_out)
    assert not {source.record(i).facts["style"] for i in left_out} & styles["train"]
    parts, counts = assign_splits(source, val_fraction=0.2, by="style", test_fraction=0.3)
    assert counts["excluded"] == len(rows) - sum(map(len, parts.values()))
    assert not {source.image(i) for i in parts["test"].tolist()} & {
        source.image(i) for name in ("train", "val") for i in parts[name].tolist()
    }
    own = {"train": np.arange(2000), "val": np.arange(2000, len(rows))}
    parts, _ = assign_splits(WithStyle(rows, splits=own), by="style", test_fraction=0.3)
    assert parts["val"].tolist() == own["val"].tolist()
    of_train, of_test = ({source.record(i).facts["style"] for i in parts[name].tolist()} for name in ("train", "test"))
    assert len(of_test) > 20
    assert not of_test & of_train
    for given in (None, own):
        with pytest.raises(UserError, match=r"(holds out no pairs|own validation split); remove --val-by style"):
            assign_splits(WithStyle(rows, splits=given), val_fraction=0.0, by="style")
    with pytest.raises(UserError, match="no column 'artist'"):
        assign_splits(source, by="artist")


def test_subsets_are_nested_exact_and_in_order() -> None:
    indices = np.arange(0, 4000, 2)
    subsets = {fraction: nested_subset(indices, fraction) for fraction in (0.0001, 0.1, 0.25, 0.5, 1.0)}
    assert [len(subset) for subset in subsets.values()] == [1, 200, 500, 1000, 2000]
    for subset, larger in pairwise(subsets.values()):
        assert set(subset.tolist()) < set(larger.tolist())
        assert (np.diff(subset) > 0).all()
    assert np.corrcoef(np.isin(indices, subsets[0.5]), indices)[0, 1] == pytest.approx(0, abs=0.07)


def test_adding_data_keeps_existing_assignments() -> None:
    before = sides(Memory(plain(2000)))
    order = np.random.default_rng(0).permutation(3000)
    rows = plain(2000) + plain(1000, "new")
    after = sides(Memory([rows[i] for i in order]))
    assert {key: after[key] for key in before} == before
    assert sum(after[key] == "val" for key in after if key.startswith("new")) > 10


def test_bad_samples_are_train_and_connect_nothing() -> None:
    rows = plain(400)
    rows += [("no caption", None, b"image k 3"), ("no image", ["caption k 5", "caption k 6"], None)]
    source = Memory(rows)
    parts, counts = assign_splits(source, val_fraction=0.3)
    assert set(parts["train"][-2:].tolist()) == {400, 401}
    assert counts["unusable"] == 2
    assert counts["groups"] == 400
    for i in range(300):  # many draws: the captions of the sample without an image do not connect other samples
        val = assign_splits(Memory(rows[:20] + rows[-2:]), val_fraction=0.5, seed=i)[0]["val"]
        if (5 in val) != (6 in val):
            break
    else:
        pytest.fail("an unusable sample connects other samples")


def test_small_data_has_a_val_split_if_possible() -> None:
    for count in (2, 3, 10, 30):
        parts, _ = assign_splits(Memory(plain(count)))
        assert len(parts["val"]) >= 1
        assert len(parts["train"]) >= 1
    same = [(f"k{i}", ["the same"], b"x") for i in range(10)]
    for rows in ([], plain(1), same):
        parts, _ = assign_splits(Memory(rows))
        assert len(parts["val"]) == 0
        assert len(parts["train"]) == len(rows)
    assert len(assign_splits(Memory(plain(30)), val_fraction=0.0)[0]["val"]) == 0


def test_own_splits_are_kept() -> None:
    own = {"train": np.arange(5), "val": np.arange(5, 7), "test": np.arange(7, 8)}
    source = Memory(plain(8), splits=own)
    parts, counts = assign_splits(source)
    assert {name: indices.tolist() for name, indices in parts.items()} == {name: i.tolist() for name, i in own.items()}
    assert counts == {"train": 5, "val": 2, "test": 1}
    assert source.reads == []
    source = Memory(plain(200), splits={"train": np.arange(150), "test": np.arange(150, 200)})
    parts, _ = assign_splits(source, val_fraction=0.2)
    assert parts["test"].tolist() == list(range(150, 200))
    assert len(parts["val"]) > 5
    assert sorted([*parts["train"], *parts["val"]]) == list(range(150))


def test_shard_splits_match_other_sources_and_ignore_location(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    entries = []
    for i in range(600):
        entries += [
            (f"{i:05d}.jpg", f"image {rng.integers(900)}".encode()),
            (f"{i:05d}.txt", f"caption {rng.integers(900)}".encode()),
        ]
    entries += [("bad.jpg", b"x"), ("bad.txt", b""), ("none.jpg", b"y")]
    write_tar(tmp_path / "here" / "0.tar", entries[:600])
    write_tar(tmp_path / "here" / "1.tar", entries[600:])
    shards = open_shards(str(tmp_path / "here"))
    parts, counts = assign_splits(shards, val_fraction=0.2)

    # A subset has no index, so its records and images are read.
    slow = fingerprints(Subset(shards, np.arange(len(shards)), "all"))
    fast = shards.fingerprints()
    usable = fast.caption_counts > 0
    assert np.array_equal(usable, slow.caption_counts > 0)
    assert counts["unusable"] == 2
    assert np.array_equal(fast.images[usable], slow.images[usable])
    assert np.array_equal(fast.captions, slow.captions)
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    moved, _ = assign_splits(open_shards(str(tmp_path / "there" / "{0,1}.tar")), val_fraction=0.2)
    assert moved["val"].tolist() == parts["val"].tolist()
    assert len(parts["val"]) > 50


def test_the_split_of_shards_is_cached(tmp_path: Path, monkeypatch) -> None:
    """It is drawn again if a shard or the fraction changes."""
    drawn = []
    real = splits_module._draw
    monkeypatch.setattr(splits_module, "_draw", lambda *args: drawn.append(args) or real(*args))
    path = write_tar(
        tmp_path / "a.tar", [(f"{i}.{kind}", f"{i}".encode()) for i in range(60) for kind in ("jpg", "txt")]
    )
    first, counts = assign_splits(open_shards(str(path)), val_fraction=0.2)
    again, same_counts = assign_splits(open_shards(str(path)), val_fraction=0.2)
    assert len(drawn) == 1
    assert counts == same_counts
    for name in ("train", "val"):
        assert np.array_equal(first[name], again[name])
        assert first[name].dtype == np.uint32
    assign_splits(open_shards(str(path)), val_fraction=0.3)
    assert len(drawn) == 2
    for damaged in (tmp_path / "cache" / "coalign" / "splits").iterdir():
        damaged.write_bytes(b"PK nonsense")
    assert np.array_equal(assign_splits(open_shards(str(path)), val_fraction=0.2)[0]["val"], first["val"])
    write_tar(path, [(f"{i}.{kind}", f"{i}".encode()) for i in range(80) for kind in ("jpg", "txt")])
    assert sum(map(len, assign_splits(open_shards(str(path)), val_fraction=0.2)[0].values())) == 80


def test_image_files_are_read_once(tmp_path: Path, monkeypatch) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(60):
        (folder / f"thing_{'abcdefghij'[i % 10]}{'klmnop'[i // 10]}.png").write_bytes(f"{i // 2}".encode())
    read: list[str] = []
    monkeypatch.setattr(
        "coalign.data.sources.folders.folder.read_image_file", lambda path: read.append(path) or Path(path).read_bytes()
    )
    first = assign_splits(open_source(str(folder)))
    assert len(read) == 60 + 30  # every file for its hash, and one of each pair of identical ones to find look-alikes
    assert first[1]["groups"] == 30
    assert first[1]["grouped"] == 60
    again = assign_splits(open_source(str(folder)))
    assert len(read) == 90
    assert again[1] == first[1]
    assert np.array_equal(again[0]["val"], first[0]["val"])
    (folder / "thing_ak.png").write_bytes(b"something else")
    (folder / "other.png").write_bytes(b"new")
    _, counts = assign_splits(open_source(str(folder)))
    assert len(read) == 90 + 2 + 2
    assert counts["groups"] == 32
    for cache in (tmp_path / "cache").rglob("*.npy"):
        cache.write_bytes(b"damaged")
    assert assign_splits(open_source(str(folder)))[1] == counts


def labeled_rows(classes: int, images: int) -> list:
    return [(f"{n}", [f"kind {n % classes}"], f"image {n}".encode()) for n in range(classes * images)]


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.3, 0.9])
@pytest.mark.parametrize(("classes", "images"), [(8, 15), (200, 5), (2, 60), (1, 40), (30, 4)])
def test_class_labels_put_every_class_on_both_sides(classes: int, images: int, fraction: float) -> None:
    rows = labeled_rows(classes, images)
    parts, counts = assign_splits(Memory(rows), val_fraction=fraction)
    for side in ("train", "val"):
        assert {rows[i][1][0] for i in parts[side]} == {f"kind {k}" for k in range(classes)}
    assert counts["classes"] == classes
    expected = np.clip(images * fraction, 1, images - 1) * classes
    assert (
        abs(len(parts["val"]) - expected) <= 4 * np.sqrt(expected) + classes / 2
    )  # a hash decides, and each class has one


def test_few_images_per_caption_are_no_labels() -> None:
    parts, counts = assign_splits(Memory(labeled_rows(100, 3)))
    assert "classes" not in counts
    rows = labeled_rows(100, 3)
    assert not {rows[i][1][0] for i in parts["train"]} & {rows[i][1][0] for i in parts["val"]}


def test_declared_classes_are_stratified_however_few_their_images() -> None:
    source = Memory([*labeled_rows(20, 2), ("lone", ["only one"], b"lone"), ("none", ["x"], b"none")])
    source.classes = Classes(
        [*(f"kind {k}" for k in range(20)), "only one"], np.array([*range(20), *range(20), 20, -1]), ("{}",)
    )
    parts, _ = assign_splits(source)
    assert sorted(source.classes.of[parts["val"]].tolist()) == list(range(20))
    assert 40 in parts["train"]  # the only image of its class is trained on


def test_identical_images_of_labeled_data_stay_together() -> None:
    rows = [
        (f"{n}", [f"kind {n % 4}"], f"image {n // 8}".encode()) for n in range(800)
    ]  # two copies in each of four classes
    parts, _ = assign_splits(Memory(rows), val_fraction=0.2)
    assert len(parts["val"])
    assert not {rows[i][2] for i in parts["train"]} & {rows[i][2] for i in parts["val"]}


def test_adding_labeled_data_moves_few_samples() -> None:
    """A sample moves only if its class had no other sample on one side."""
    rows = labeled_rows(10, 100)
    few, many = (assign_splits(Memory(part), val_fraction=0.1)[0]["val"].tolist() for part in (rows[:700], rows))
    assert len(set(few) ^ {i for i in many if i < 700}) <= 2
    assert few
