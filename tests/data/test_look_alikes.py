from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from coalign.cli.main import main
from coalign.data import look_alikes
from coalign.data.look_alikes import NO_HASH, decode_small, have_look_alike, look_alike_groups, look_hash
from coalign.data.prepare.check import check
from coalign.data.sources.base import Source, hash64
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits, look_alikes_in_train
from coalign.errors import UserError
from coalign.types import Record


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawing(seed: int, size: int = 96) -> Image.Image:
    """A drawing of a few shapes on a white or photo-like background."""
    random = np.random.default_rng(seed)
    if seed % 2:
        noise = Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        return noise.resize((size, size), Image.Resampling.BICUBIC)
    image = Image.new("RGB", (4 * size, 4 * size), "white")
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = random.integers(0, 3 * size, 4).tolist()
        color = tuple(random.integers(0, 200, 3).tolist())
        shape = [draw.ellipse, draw.rectangle][int(random.integers(2))]
        shape((x, y, x + width + 20, y + height + 20), fill=color, outline="black", width=8)
    return image.resize((size, size), Image.Resampling.BOX)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def hue(image: Image.Image, shift: int) -> Image.Image:
    values = np.array(image.convert("HSV"))
    values[..., 0] += np.uint8(shift)
    return Image.fromarray(values, "HSV").convert("RGB")


COPIES = {
    "JPEG": lambda image: encoded(image, "JPEG", quality=60),
    "WebP": lambda image: encoded(image, "WEBP", quality=60),
    "palette": lambda image: encoded(image.quantize(256), "GIF"),
    "half": lambda image: encoded(image.resize((48, 48), Image.Resampling.LANCZOS)),
    "three times": lambda image: encoded(image.resize((288, 288), Image.Resampling.BICUBIC), "JPEG", quality=85),
    "other aspect": lambda image: encoded(image.resize((120, 90), Image.Resampling.BICUBIC)),
    "recolored": lambda image: encoded(hue(image, 85)),
    "swapped channels": lambda image: encoded(Image.merge("RGB", image.split()[::-1])),
    "brighter": lambda image: encoded(image.point(lambda value: min(255, int(value * 0.8 + 50)))),
}


def hash_of(content: bytes) -> int:
    return look_hash(decode_small(content))


@pytest.mark.parametrize("copy", COPIES)
def test_copies_match_and_other_images_do_not(copy: str) -> None:
    images = [drawing(seed) for seed in range(200)]
    originals = np.array([hash_of(encoded(image)) for image in images], np.uint64)
    assert NO_HASH not in originals
    copies = np.array([hash_of(COPIES[copy](image)) for image in images], np.uint64)
    groups = look_alike_groups(np.concatenate([originals, copies]))
    assert (groups[:200] == groups[200:]).mean() > 0.95
    assert len(np.unique(groups[:200])) >= 199  # different images


def test_blank_and_nearly_blank_images_have_no_hash() -> None:
    noise = np.random.default_rng(0).integers(250, 256, (64, 64, 3), dtype=np.uint8)
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[20:40] = 255
    dot = np.full((64, 64, 3), 255, np.uint8)
    dot[0, 0] = 250
    for pixels in (np.full((5, 7, 3), 200, np.uint8), noise, stripes, dot, np.zeros((1, 1, 3), np.uint8)):
        assert look_hash(pixels) == NO_HASH
    assert (look_alike_groups(np.zeros(5, np.uint64)) == -1).all()
    assert not have_look_alike(np.zeros(3, np.uint64), np.zeros(2, np.uint64)).any()


def flipped(hashes: np.ndarray, bits: int, random: np.random.Generator) -> np.ndarray:
    places = random.permuted(np.tile(np.arange(63, dtype=np.uint64), (len(hashes), 1)), axis=1)[:, :bits]
    return hashes ^ np.bitwise_or.reduce(np.uint64(1) << places, axis=1)


def test_groups_and_matches_equal_those_from_all_pairs() -> None:
    """Random hashes, with copies at up to six bits, and copies of copies."""
    random = np.random.default_rng(0)
    hashes = random.integers(1 << 63, 1 << 64, 400, dtype=np.uint64)
    parts = [hashes, np.full(3, NO_HASH, np.uint64), hashes[:50]]
    parts += [flipped(hashes[bits * 40 : bits * 40 + 60], bits, random) for bits in range(1, 7)]
    parts.append(flipped(parts[-3], 4, random))
    hashes = random.permutation(np.concatenate(parts))
    near = np.array(
        [[one and other and (one ^ other).bit_count() <= 4 for other in hashes.tolist()] for one in hashes.tolist()]
    )
    near = near.astype(bool)
    reached = near
    while not np.array_equal(reached, larger := (reached.astype(int) @ near.astype(int)) > 0):
        reached = larger
    groups = look_alike_groups(hashes)
    known = hashes != NO_HASH
    assert (groups[~known] == -1).all()
    assert np.array_equal((groups[:, None] == groups)[known][:, known], reached[known][:, known])
    half = len(hashes) // 2
    assert np.array_equal(have_look_alike(hashes[:half], hashes[half:]), near[:half, half:].any(axis=1))


def test_comparisons_are_bounded_for_any_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not n²: at most 240 times the number of hashes, even if all of them are alike or share most bits."""
    compared = []
    real = look_alikes.num_differing_bits
    monkeypatch.setattr(
        look_alikes, "num_differing_bits", lambda one, other: compared.append(len(one)) or real(one, other)
    )
    count = 20_000
    random = np.random.default_rng(0)
    top = np.uint64(1 << 63)
    for hashes in (
        random.integers(1 << 63, 1 << 64, count, dtype=np.uint64),
        top + np.arange(count, dtype=np.uint64),
        top + (np.arange(count, dtype=np.uint64) << np.uint64(40)),
    ):
        compared.clear()
        look_alike_groups(hashes)
        assert sum(compared) <= 240 * count


def test_a_chain_through_most_of_the_data_is_no_group() -> None:
    chain = np.uint64(1 << 63) + np.arange(60, dtype=np.uint64)  # neighbors differ in few bits
    groups = look_alike_groups(np.concatenate([chain, chain[:5]]))
    assert len(np.unique(groups)) == 60
    assert np.array_equal(groups[:5], groups[60:])
    others = np.random.default_rng(0).integers(1 << 63, 1 << 64, 70, dtype=np.uint64)
    assert len(np.unique(look_alike_groups(np.concatenate([chain, others])))) == 71


# ---------------------------------------------------------------- splits


@dataclass
class Images(Source):
    """Encoded images by key, each with its own caption."""

    rows: dict[str, bytes]
    name: str = "images"
    splits: dict | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        key = list(self.rows)[index]
        return Record(key, (f"caption {key}",), facts={"product": key.partition("/")[0].strip("-")})

    def image(self, index: int) -> bytes:
        return list(self.rows.values())[index]


def sides(source: Source, **settings: object) -> dict[str, str]:
    parts, _ = assign_splits(source, 0.3, **settings)
    return {source.record(int(index)).key: name for name, indices in parts.items() for index in indices}


def with_copies(count: int) -> dict[str, bytes]:
    rows = {f"{seed}": encoded(drawing(seed)) for seed in range(count)}
    for number, (name, copy) in enumerate(COPIES.items()):
        rows[f"{number} {name}"] = copy(drawing(number))
    return rows


def test_copies_are_on_the_same_side_by_default() -> None:
    source = Images(with_copies(300))
    side = sides(source)
    for number, name in enumerate(COPIES):
        assert side[f"{number}"] == side[f"{number} {name}"]
    assert "val" in {side[f"{number}"] for number in range(len(COPIES))}
    assert assign_splits(source, 0.3)[1]["look_alikes"] == 2 * len(COPIES)
    apart = sides(source, look_alikes=False)
    assert any(apart[f"{number}"] != apart[f"{number} {name}"] for number, name in enumerate(COPIES))
    # a source without look-alikes is split as before
    plain = Images({f"{seed}": encoded(drawing(seed)) for seed in range(300)})
    assert sides(plain) == sides(plain, look_alikes=False)


def test_adding_images_keeps_sides_of_others() -> None:
    before = sides(Images({f"{seed}": encoded(drawing(seed)) for seed in range(300)}))
    after = sides(Images(dict(reversed(with_copies(400).items()))))
    moved = {key for key in before if after[key] != before[key]}
    assert moved <= {f"{number}" for number in range(len(COPIES))}  # whose group may have a new smallest key


@dataclass
class Hashed(Source):
    """Rows of (key, caption, hash of the image), as if the images had been hashed."""

    rows: list[tuple[str, str, int]]
    name: str = "hashed"
    splits: dict | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def record(self, index: int) -> Record:
        return Record(self.rows[index][0], (self.rows[index][1],))

    def image(self, index: int) -> bytes:
        return self.rows[index][0].encode()


def smallest_keys(rows: list[tuple[str, str, int]]) -> dict[str, int]:
    """The smallest hashed key in each key's group, by comparing all pairs of rows."""
    smallest = {key: hash64(key.encode()) for key, _, _ in rows}
    edges = [
        (one[0], other[0])
        for number, one in enumerate(rows)
        for other in rows[:number]
        if one[1] == other[1] or (one[2] ^ other[2]).bit_count() <= 4
    ]
    changed = True
    while changed:
        changed = False
        for one, other in edges:
            low = min(smallest[one], smallest[other])
            changed |= (smallest[one], smallest[other]) != (low, low)
            smallest[one] = smallest[other] = low
    return smallest


@pytest.mark.parametrize("seed", range(4))
def test_adding_data_moves_only_groups_that_get_a_smaller_key(monkeypatch, seed: int) -> None:
    """A sample changes sides only if its group merges with one of a smaller key, and all of a group are on one side."""
    monkeypatch.setattr(
        "coalign.data.splits.look_hashes", lambda source, _: np.array([row[2] for row in source.rows], np.uint64)
    )
    random = np.random.default_rng(seed)

    def rows(names: range, earlier: list[tuple[str, str, int]]) -> list[tuple[str, str, int]]:
        made: list[tuple[str, str, int]] = []
        for number in names:
            known = earlier + made
            look, caption = int(random.integers(1 << 63, 1 << 64, dtype=np.uint64)), f"caption {number}"
            if known and random.random() < 0.3:
                look = int(flipped(np.array([known[random.integers(len(known))][2]], np.uint64), 3, random)[0])
            if known and random.random() < 0.1:
                caption = known[random.integers(len(known))][1]
            made.append((f"{number}", caption, look))
        return made

    first = rows(range(500), [])
    added = rows(range(500, 750), first)
    monkeypatch.setattr("coalign.data.splits._LARGE", 1.0)  # without the limit on the size of groups
    before, after = sides(Hashed(first)), sides(Hashed([*added, *first]))
    old, new = smallest_keys(first), smallest_keys([*added, *first])
    moved = {key for key in before if after[key] != before[key]}
    merged = {key for key in before if new[key] != old[key]}
    assert moved <= merged
    assert 0 < len(moved) < len(merged) < 300
    for side in (before, after):
        by_group: dict[int, set[str]] = {}
        for key, name in side.items():
            by_group.setdefault((old if side is before else new)[key], set()).add(name)
        assert all(len(names) == 1 for names in by_group.values())


def test_a_long_series_of_a_class_stays_in_train(monkeypatch) -> None:
    monkeypatch.setattr(
        "coalign.data.splits.look_hashes", lambda source, _: np.array([row[2] for row in source.rows], np.uint64)
    )
    looks = np.random.default_rng(0).integers(1 << 63, 1 << 64, 400, dtype=np.uint64).tolist()
    rows = [(f"{i}", f"class {i % 4}", looks[0] if i % 4 == 0 and i > 40 else looks[i]) for i in range(400)]
    for seed in range(20):
        parts, counts = assign_splits(Hashed(rows), 0.1, seed=seed)
        assert counts["classes"] == 4
        held_out = [rows[i] for i in parts["val"]]
        assert {caption for _, caption, _ in held_out} == {f"class {i}" for i in range(4)}
        assert looks[0] not in {look for _, _, look in held_out}


def test_images_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    source = Images(with_copies(40))
    decoded = []
    real = look_alikes.decode_small
    monkeypatch.setattr(look_alikes, "decode_small", lambda image: decoded.append(image) or real(image))
    first = sides(source)
    assert sorted(decoded) == sorted(source.rows.values())
    assert sides(source) == first
    assert len(decoded) == len(source)
    more = Images(with_copies(42))  # same name, two new images
    sides(more)
    assert len(decoded) == len(source) + 2


def test_larger_data_is_split_without_look_alikes(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("coalign.data.splits.MAX_LOOK_ALIKES", 100)
    source = Images(with_copies(100))
    with caplog.at_level("INFO"):
        assert sides(source) == sides(source, look_alikes=False)
    assert "more than 100 samples: its splits may share look-alikes" in caplog.text
    assert look_alikes_in_train(source, np.arange(50), source, np.arange(50, 60)) is None


def test_groups_of_a_column_stay_together() -> None:
    rows = {f"{seed % 80}/{seed}": encoded(drawing(seed)) for seed in range(320)}
    rows |= {f"-/{seed}": encoded(drawing(seed)) for seed in range(320, 400)}  # without a product
    source = Images(rows)
    side = sides(source, group="product")
    by_product: dict[str, set[str]] = {}
    for key, name in side.items():
        by_product.setdefault(key.partition("/")[0], set()).add(name)
    assert all(len(by_product[f"{product}"]) == 1 for product in range(80))
    assert by_product["-"] == {"train", "val"}
    # a product stays whole in a split by another column too
    both = sides(source, group="product", by="product")
    assert all(both[f"{i}/{i}"] == both[f"{i}/{i + 80}"] for i in range(80))


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("size", [2, 6])
@pytest.mark.parametrize("singles", [0, 20])
def test_groups_of_a_column_make_up_val_in_small_data(monkeypatch, fraction: float, size: int, singles: int) -> None:
    """Products are not boilerplate: val is not made of the few images without a product only."""
    monkeypatch.setattr("coalign.data.splits.look_hashes", lambda source, _: np.zeros(len(source), np.uint64))
    names = [*(f"{n // size}/{n}" for n in range(120)), *(f"-/{n}" for n in range(singles))]
    source = Images({name: name.encode() for name in names})
    found = []
    for seed in range(30):
        parts, _ = assign_splits(source, fraction, seed=seed, group="product")
        found.append(len(parts["val"]) / len(source))
    assert fraction / 3 <= np.mean(found) <= 2.5 * fraction


def test_leaks_of_given_splits_are_counted(tmp_path) -> None:
    for seed in range(20):
        path = tmp_path / "data" / ("train" if seed < 15 else "val") / f"thing {seed}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(drawing(seed)))
    val = tmp_path / "data" / "val"
    (val / "copy.jpg").write_bytes(COPIES["three times"](drawing(3)))
    (val / "same.png").write_bytes(encoded(drawing(4)))
    blank = encoded(Image.new("RGB", (9, 9), "red"))
    for name in ("train/blank.png", "val/also blank.png"):
        (tmp_path / "data" / name).write_bytes(blank)
    source = open_source(str(tmp_path / "data"))
    result = check(source)
    assert (result.leaks["val"].count, result.leaks["val"].samples) == (3, 8)
    keys = [tuple(Path(source.record(index).key).stem for index in pair) for pair in result.leaks["val"].examples]
    assert sorted(keys) == [("also blank", "blank"), ("copy", "thing 3"), ("same", "thing 4")]
    assert [example.note for example in result.gallery["leaks"]] == ["val", "train"] * 3
    assert any("3 of 8 val samples" in warning and "looks like one" in warning for warning in result.warnings)
    found = look_alikes_in_train(source, source.splits["train"], source, source.splits["val"])
    names = {source.record(int(index)).key for index in source.splits["val"][found]}
    assert {name.rpartition("/")[2].partition(".")[0] for name in names} == {"copy", "same", "also blank"}


@pytest.mark.parametrize("kind", ["folders", "column", "json"])
def test_data_check_reports_leaks_of_given_splits(tmp_path, capsys, kind) -> None:
    """On the terminal, on the page and in the account, by split."""
    images = {split: [drawing(100 * number + seed) for seed in range(12)] for number, split in enumerate(SPLITS)}
    leaks = {"train": 0, "val": 2, "test": 3}
    rows = []
    for split, names in SPLITS.items():
        for number, image in enumerate(images[split]):
            if number < leaks[split]:
                image = hue(images["train"][number + 4].resize((70, 70)), 85)
            folder = tmp_path / "data" / (names if kind == "folders" else "images")
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{split} picture number {number}.png"
            image.save(folder / name)
            rows.append({"image": f"images/{name}", "caption": f"a {split} drawing, {number}", "split": names})
    data = tmp_path / "data"
    if kind == "column":
        lines = [f"{row['image']}\t{row['caption']}\t{row['split']}" for row in rows]
        (data / "rows.tsv").write_text("\n".join(["image\tcaption\tsplit", *lines]) + "\n")
        data = data / "rows.tsv"
    if kind == "json":
        (data / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = data / "rows.jsonl"
    files = [tmp_path / "account.json", tmp_path / "page.html"]
    main(["data", "check", str(data), "--json", str(files[0]), "--report", str(files[1])])
    shown = " ".join(capsys.readouterr().out.split())
    assert "Images in test that are in train too, or look like one: 3 of 12 (" in shown
    assert "Images in val that are in train too, or look like one: 2 of 12 (" in shown
    assert "train picture number 4" in shown
    assert json.loads(files[0].read_text())["leaks"] == {"val": 2, "test": 3}
    page = files[1].read_text()
    assert "Held-out images like one of train" in page
    assert "test samples with an image like one of train" in page


def test_data_check_counts_groups_across_given_splits(tmp_path, capsys) -> None:
    rows = []
    for number in range(24):
        drawing(number).save(tmp_path / f"{number}.png")
        product = (
            ["a", "b", "c", "", "e", "f"][number % 6] if number < 18 else ["a", "z", "", "f", "y", "c"][number - 18]
        )
        split = "train" if number < 18 else "test"
        rows.append({"image": f"{number}.png", "caption": f"drawing {number}", "product": product, "split": split})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    main(["data", "check", str(tmp_path / "rows.jsonl"), "--group-column", "product"])
    assert "Samples in test whose product is in train too: 3 of 6" in capsys.readouterr().out


SPLITS = {"train": "train", "val": "dev", "test": "test"}


def test_a_missing_group_column_is_an_error_with_given_splits_too() -> None:
    source = Images({f"{seed % 8}/{seed}": encoded(drawing(seed)) for seed in range(40)})
    for splits in (None, {"train": np.arange(30), "val": np.arange(30, 40)}):
        source.splits = splits
        assert assign_splits(source, 0.3, group="product")
        with pytest.raises(UserError, match="has no column 'prodct'; set --group-column"):
            assign_splits(source, 0.3, group="prodct")
