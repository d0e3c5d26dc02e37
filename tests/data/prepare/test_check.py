from __future__ import annotations

import io
import json
from collections import Counter
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coalign.data.prepare import check as module
from coalign.data.prepare.check import check, gallery_images
from coalign.data.prepare.check_result import DataCheck, Distribution, warnings
from coalign.data.sources.base import LeftOut, Source
from coalign.errors import BadSample
from coalign.types import Record


def encoded_image(seed: int, width: int = 40, height: int = 30, kind: str = "PNG", mode: str = "RGB") -> bytes:
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((width, height)).convert(mode).save(buffer, kind)
    return buffer.getvalue()


class ListSource(Source):
    """A source of (captions, tags, image). An exception in place of the image is raised."""

    name = "a list"

    def __init__(self, samples: list[tuple[tuple[str, ...], tuple[str, ...], Any]]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def record(self, index: int) -> Record:
        captions, tags, _ = self.samples[index]
        return Record(f"key {index}", captions, tags)

    def image(self, index: int) -> bytes | np.ndarray:
        image = self.samples[index][2]
        if isinstance(image, Exception):
            raise image
        return image


def mixed() -> ListSource:
    samples: list[tuple[tuple[str, ...], tuple[str, ...], Any]] = [
        (("a red house by the river", "a house"), ("house", "river"), encoded_image(0, 64, 32, "JPEG")),
        (("a house",), ("house", "house"), encoded_image(1)),
        (("ein rotes Haus am Fluss",), (), encoded_image(1)),  # the same file as the one before
        (("dog cat tree",), (), encoded_image(3, mode="P")),
        (("a dog runs over the green hill",), ("dog",), encoded_image(4, mode="L")),
        (("a blank page",), (), np.full((20, 20, 3), 255, np.uint8)),
        (("a house",), (), encoded_image(6)[:-400]),
        (("gone",), (), BadSample("image file is missing", "gone.png")),
        ((), (), encoded_image(8)),
        (("an empty file", "said twice", "said twice"), (), b""),
    ]
    return ListSource(samples)


class LetterTokenizer:
    def encode(self, text: str, context_length: int) -> list[int]:
        return [0, *map(ord, text), 1][:context_length]


def test_counts_of_a_known_dataset() -> None:
    result = check(mixed(), tokenizer=LetterTokenizer())
    assert (result.name, result.samples, result.checked, result.usable) == ("a list", 10, 10, 6)
    broken = {row.reason: (row.count, row.examples) for row in result.broken}
    assert {reason: count for reason, (count, _) in broken.items()} == {
        "truncated image": 1,
        "image file is missing": 1,
        "no caption": 1,
        "empty file": 1,
    }
    assert broken["image file is missing"][1] == ["key 7: gone.png"]
    assert broken["no caption"][1] == ["key 8"]
    assert result.formats == {"PNG": 4, "JPEG": 1, "pixels": 1}
    assert result.modes == {"RGB": 4, "P": 1, "L": 1}
    assert result.blank == 1
    assert result.captions == 7  # of usable samples only
    assert result.captions_per_sample == {"1": 5, "2": 1}
    assert (result.tagged, result.num_tags) == (3, 3)
    assert dict(result.tags) == {"house": 2, "river": 1, "dog": 1}
    assert result.single_part_of_speech == {"nouns": 1}
    assert result.hardly_english == 1
    assert result.same_caption is not None
    assert (result.same_caption.groups, result.same_caption.samples) == (1, 2)  # the broken sample does not count
    assert result.same_caption.largest == [("a house", 2, [0, 1])]
    assert result.same_image is not None
    assert result.same_image.largest == [("key 1", 2, [1, 2])]
    assert result.width is not None
    assert (result.width.smallest, result.width.largest) == (20, 64)
    assert result.tokens is not None
    assert result.tokens.largest == 2 + len("a dog runs over the green hill")
    assert result.cut == 0


def test_problems_of_the_source_are_listed() -> None:
    source = mixed()
    source.left_out = [LeftOut(f"line {number}", "wrong number of columns") for number in range(70)]
    result = check(source)
    assert result.left_out == {"wrong number of columns": 70}
    assert result.left_out_where[:1] == [("line 0", "wrong number of columns")]
    assert 0 < len(result.left_out_where) < 70
    assert any("70 images or rows were left out" in warning for warning in result.warnings)


def many(count: int) -> ListSource:
    generator = np.random.default_rng(0)
    nouns = ["dog", "cat", "Haus", "tree", "boat"]
    samples: list[tuple[tuple[str, ...], tuple[str, ...], Any]] = []
    for number in range(count):
        captions = tuple(" ".join(generator.choice(nouns, generator.integers(1, 4))) for _ in range(1 + number % 2))
        samples.append((captions, (captions[0].split()[0],), b"" if number % 9 == 0 else encoded_image(number % 60)))
    return ListSource(samples)


def test_duplicates_and_lengths_against_a_naive_count() -> None:
    source = many(150)
    result = check(source)
    usable = [index for index in range(150) if index % 9]
    by_caption: dict[str, set[int]] = {}
    by_image: dict[bytes, set[int]] = {}
    for index in usable:
        captions, _, image = source.samples[index]
        by_image.setdefault(image, set()).add(index)
        for caption in captions:
            by_caption.setdefault(caption, set()).add(index)
    for duplicates, groups in ((result.same_caption, by_caption), (result.same_image, by_image)):
        assert duplicates is not None
        shared = [group for group in groups.values() if len(group) > 1]
        assert duplicates.groups == len(shared)
        assert duplicates.samples == len(set().union(*shared))
        counts = [count for _, count, _ in duplicates.largest]
        assert counts == sorted(map(len, shared), reverse=True)[: module.MAX_ROWS]
        for _, count, indices in duplicates.largest:
            assert any(set(indices) <= group and len(group) == count for group in shared)
    for text, count, _ in result.same_caption.largest if result.same_caption else ():
        assert len(by_caption[text]) == count
    words = Counter(len(caption.split()) for index in usable for caption in source.samples[index][0])
    assert result.words is not None
    assert result.words.counts == [words[number] for number in range(len(result.words.counts))]
    assert result.words.mean == pytest.approx(sum(n * c for n, c in words.items()) / sum(words.values()))
    assert dict(result.tags) == Counter(source.samples[index][1][0] for index in usable)


def test_result_does_not_depend_on_worker_processes(
    monkeypatch: pytest.MonkeyPatch, every_update: None, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = check(many(150))
    monkeypatch.setattr(module, "MIN_PARALLEL", 2)
    monkeypatch.setattr("coalign.data.prepare.check.num_cores", lambda: 2)
    capsys.readouterr()
    assert check(many(150)) == alone
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"Checking samples: {done} of 150" for done in (64, 128, 150)]


def test_result_round_trips_through_json() -> None:
    plain = asdict(check(mixed()))
    assert json.loads(json.dumps(plain, allow_nan=False)) == json.loads(json.dumps(plain))
    assert json.loads(json.dumps(plain))["captions_per_sample"] == plain["captions_per_sample"]


def test_limit_selects_a_seeded_random_subset() -> None:
    source = many(150)
    first, again, other = check(source, limit=40), check(source, limit=40), check(source, limit=40, seed=1)
    assert (first.samples, first.checked) == (150, 40)
    assert first == again
    assert first.gallery["random"] != other.gallery["random"]
    assert check(source, limit=1000).checked == 150


def test_empty_and_unusable_sources() -> None:
    empty = check(ListSource([]))
    assert (empty.samples, empty.usable, empty.words, empty.width) == (0, 0, None, None)
    broken = check(ListSource([(("a",), (), b"")] * 3))
    assert broken.warnings == ["None of the 3 samples can be used."]
    assert not any(broken.gallery.values())


def test_gallery_images_are_resized() -> None:
    source = mixed()
    result = check(source)
    assert {row.index for row in result.gallery["random"]} == {0, 1, 2, 3, 4, 5}
    assert [row.index for row in result.gallery["blank images"]] == [5]
    assert [row.index for row in result.gallery["identical images"]] == [1, 2]
    assert result.gallery["longest captions"][0].caption == "a dog runs over the green hill"
    assert result.gallery["hardly English"][0].caption == "ein rotes Haus am Fluss"
    images = gallery_images(source, result, side=16)
    assert set(images) == {0, 1, 2, 3, 4, 5}
    assert images[0].shape == (8, 16, 3)
    assert all(pixels.dtype == np.uint8 for pixels in images.values())


def test_look_alikes_are_different_files() -> None:
    samples = [
        ((f"image {n}",), (), image) for n, image in enumerate([encoded_image(1), encoded_image(1), encoded_image(2)])
    ]
    samples.append((("another format",), (), encoded_image(1, kind="BMP")))
    result = check(ListSource(samples))
    assert result.look_alikes is not None
    assert [(count, indices) for _, count, indices in result.look_alikes.largest] == [(2, [0, 3])]


def test_long_captions_are_counted_as_truncated() -> None:
    samples = [(("x" * length,), (), encoded_image(length)) for length in (75, 76)]  # 77 and 78 tokens
    assert check(ListSource(samples), tokenizer=LetterTokenizer()).cut == 1


# ---------------------------------------------------------------- warnings


def test_warnings_are_ordered_by_severity() -> None:
    fine = DataCheck("d", samples=100_000, checked=100_000, usable=100_000, captions=100_000)
    assert warnings(fine) == []
    fine.usable = 99_500
    assert warnings(fine) == ["500 of 100,000 samples (0.5 %) cannot be used; training replaces them."]
    fine.usable, fine.blank = 80_000, 200
    first, second = warnings(fine)
    assert first == "20,000 of 100,000 samples (20.0 %) cannot be used; training stops at 1 %."
    assert second.startswith("200 of 80,000 images (0.25 %) are blank")
    for bad, consequence in (
        (10, "training replaces them."),
        (11, "training stops at 1 %."),
    ):  # ten are always tolerated
        small = DataCheck("d", samples=40, checked=40, usable=40 - bad)
        assert any(message.endswith(consequence) for message in warnings(small))


def test_warnings_about_short_captions_and_small_datasets() -> None:
    short = Distribution(1, 2, 2.0, 3, [0.5, 1.5, 2.5, 3.5], [1, 8, 1])
    messages = warnings(DataCheck("d", samples=10, checked=10, usable=10, captions=10, words=short))
    assert messages[0].startswith("The dataset has only 10 samples")
    assert "Half of the captions have at most 2 words." in messages
