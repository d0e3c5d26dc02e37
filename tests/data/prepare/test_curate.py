from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coalign.data.images import decode as images
from coalign.data.prepare.curate import (
    DECLIP_YFCC,
    CurationReport,
    CurationRules,
    build_queries,
    caption_nouns,
    curate,
    english_ratio,
    has_chinese,
    single_part_of_speech,
    tag_counts,
    write_curated,
    write_queries,
)
from coalign.data.sources.base import Source
from coalign.data.sources.tables.table import open_table
from coalign.data.text.captions import clean_caption
from coalign.data.text.lexicon import synonyms
from coalign.errors import BadSample, UserError
from coalign.types import Record

GOOD = "A small dog chases the red ball"


def encoded_image(width: int = 80, height: int = 70, kind: str = "PNG", **options: Any) -> bytes:
    noise = np.random.default_rng(width).integers(256, size=(height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, kind, **options)
    return buffer.getvalue()


class Pairs(Source):
    """A source of (captions, image) or (captions, image, tags, facts). An exception in place of captions or image is raised."""

    name = "pairs"

    def __init__(self, *samples: tuple[Any, ...]) -> None:
        self.samples = samples
        self.decoded: list[int] = []

    def __len__(self) -> int:
        return len(self.samples)

    def record(self, index: int) -> Record:
        captions, _, *rest = self.samples[index]
        if isinstance(captions, BadSample):
            raise captions
        return Record(f"sample-{index}", tuple(captions), *rest)

    def image(self, index: int) -> Any:
        self.decoded.append(index)
        if isinstance(self.samples[index][1], BadSample):
            raise self.samples[index][1]
        return self.samples[index][1]


def drops(report: CurationReport) -> list[tuple[int, str, bool]]:
    return [(drop.index, drop.rule, drop.sample) for drop in report.dropped]


# ---------------------------------------------------------------- single captions


@pytest.mark.parametrize(
    ("raw", "cleaned"),
    [
        (b"a dog", "a dog"),
        ("  two\t\n spaces \u3000here ", "two spaces here"),
        ("caf\u00e9 \U0001f600".encode(), "caf\u00e9 \U0001f600"),
        (b"\xef\xbb\xbfmarked", "marked"),
        ("...", "..."),
        ("x" * 10_000, "x" * 10_000),
        (" " * 20_000 + "far off", "far off"),
    ],
)
def test_clean_caption(raw: bytes | str, cleaned: str) -> None:
    assert clean_caption(raw) == cleaned


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty caption"),
        (" \t\n\u3000", "empty caption"),
        ("\u200b \ufeff\u200d", "empty caption"),
        ("\x07\x1b", "empty caption"),
        (b"caf\xe9", "caption is not UTF-8"),
        (b"caf\xe9".decode("utf-8", "surrogateescape"), "caption is not UTF-8"),
        ("\ud83d", "caption is not UTF-8"),
        ("a dog".encode("utf-16"), "caption is not UTF-8"),
        ("a dog".encode("utf-16-le"), "caption contains NUL"),
        ("a\0b", "caption contains NUL"),
        ("x" * 10_001, "caption too long"),
        ("dog " * 262_144, "caption too long"),
    ],
)
def test_clean_caption_rejects(raw: bytes | str, reason: str) -> None:
    with pytest.raises(BadSample) as caught:
        clean_caption(raw)
    assert caught.value.reason == reason
    assert len(caught.value.detail) < 500
    caught.value.detail.encode("utf-8")


@pytest.mark.parametrize(
    ("caption", "ratio"),
    [
        (GOOD, 1.0),
        ("Sunset over the harbour, 2021!", 1.0),
        ("Soul Crab's Munich gramastar", 3 / 4),
        ("Das ist ein Haus am Meer", 1 / 6),
        ("la maison bleue dans la forêt", 2 / 6),  # "la" is a note
        ("狗在雪地里跑 dog", 1 / 2),
        ("IMG_1234.jpg", 0.0),
        ("2021-07-04", 0.0),
        ("", 0.0),
    ],
)
def test_english_ratio(caption: str, ratio: float) -> None:
    assert english_ratio(caption) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("caption", "part"),
    [
        ("river", "nouns"),
        ("Dogs, cats & trees 2021", "nouns"),
        ("gramastar", "nouns"),
        ("IMG_1234", "nouns"),
        ("beautiful", "adjectives"),
        ("quickly slowly", "adverbs"),
        ("eat", "verbs"),
        ("what is this", "function words"),
        ("a river", None),
        ("beautiful river", None),
        ("dog running", None),
        ("dog eats bone", None),
        ("light", None),  # noun, verb or adjective
        ("2021", None),
        (GOOD, None),
    ],
)
def test_single_part_of_speech(caption: str, part: str | None) -> None:
    assert single_part_of_speech(caption) == part


def test_chinese() -> None:
    assert [has_chinese(text) for text in ("a 狗", "𠀀", "〇")] == 3 * [True]
    assert [has_chinese(text) for text in ("a dog", "ひらがな", "한국어", "「quotes」", "😀")] == 5 * [False]


# ---------------------------------------------------------------- a whole source


def test_declip_rules() -> None:
    whole = encoded_image()
    source = Pairs(
        ([GOOD], whole),
        ([GOOD], whole[: len(whole) // 2]),
        ([GOOD], b"<!doctype html>"),
        ([GOOD], BadSample("image file is missing")),
        ([], whole),
        (["  "], whole),
        (["Das ist ein Haus"], whole),
        (["river"], whole),
        (BadSample("caption is not UTF-8", "b'\\xe9'"), whole),
        (["狗 and a very small dog on the grass"], encoded_image(8, 8)),
    )
    report = curate(source)
    assert report.kept == {0: (GOOD,), 9: ("狗 and a very small dog on the grass",)}
    assert drops(report) == [
        (1, "truncated image", True),
        (2, "not an image", True),
        (3, "image file is missing", True),
        (4, "no caption", True),
        (5, "empty caption", True),
        (6, "too few English words", True),
        (7, "single part of speech", True),
        (8, "caption is not UTF-8", True),
    ]
    assert report.total == 10
    assert sum(samples for samples, _ in report.counts().values()) == 8
    assert [drop.key for drop in report.dropped] == [*(f"sample-{i}" for i in range(1, 8)), "pairs, sample 8"]
    details = {drop.rule: drop.detail for drop in report.dropped}
    assert details["too few English words"] == "0.00 of Das ist ein Haus"
    assert details["single part of speech"] == "nouns: river"
    assert source.decoded == [0, 1, 2, 3, 9]  # only images with a usable caption


def test_rules_for_images_from_the_web() -> None:
    source = Pairs(
        (["Das ist ein Haus", "river"], encoded_image(64, 64)),
        ([GOOD], encoded_image(63, 640)),
        (["a 狗"], encoded_image()),
        ([GOOD, "a 狗"], np.zeros((64, 65, 3), np.uint8)),
    )
    rules = CurationRules(min_english_ratio=0.0, several_parts_of_speech=False, min_side=64, no_chinese=True)
    report = curate(source, rules)
    assert report.kept == {0: ("Das ist ein Haus", "river"), 3: (GOOD,)}
    assert drops(report) == [(1, "small image", True), (2, "Chinese caption", True), (3, "Chinese caption", False)]
    assert report.dropped[0].detail == "63×640 pixels"


def test_captions_are_dropped_individually_and_samples_with_their_last_caption() -> None:
    source = Pairs(
        (["river", GOOD, " ", "a  cat sleeps"], encoded_image()),
        (["river", "x" * 20_000, "Das ist ein Haus"], encoded_image()),
        (["river", GOOD], b""),
    )
    report = curate(source)
    assert report.kept == {0: (GOOD, "a cat sleeps")}
    assert drops(report) == [
        (0, "single part of speech", False),
        (0, "empty caption", False),
        (1, "single part of speech", False),
        (1, "caption too long", False),
        (1, "too few English words", True),
        (2, "empty file", True),
    ]
    assert report.counts()["single part of speech"] == (0, 2)
    assert report.counts()["too few English words"] == (1, 0)


def test_thresholds() -> None:
    caption = "a red dog chases gramastar"  # four of five words are English
    for ratio, kept in [(0.8, True), (0.81, False)]:
        assert bool(curate(Pairs(([caption], encoded_image())), CurationRules(min_english_ratio=ratio)).kept) is kept
    off = CurationRules(min_english_ratio=0.0, several_parts_of_speech=False)
    assert curate(Pairs((["gramastar"], encoded_image())), off).kept == {0: ("gramastar",)}
    assert CurationRules() == DECLIP_YFCC


def test_custom_decoder() -> None:
    def decode(image: Any) -> tuple[int, int]:
        if image == b"bad":
            raise BadSample("damaged")
        return 10, 20

    report = curate(Pairs(([GOOD], b"x"), ([GOOD], b"bad")), CurationRules(min_side=10), decode)
    assert (list(report.kept), drops(report)) == ([0], [(1, "damaged", True)])


def test_huge_images_are_kept_if_they_can_be_decoded_at_reduced_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Large images are usable because views are made from a reduced decoding."""
    buffer = io.BytesIO()
    Image.new("L", (4200, 4200)).save(buffer, "PNG")
    monkeypatch.setattr(images, "MAX_BYTES", 50_000_000)
    with pytest.raises(BadSample, match="too large"):
        images.open_image(buffer.getvalue()).decode()
    assert list(curate(Pairs(([GOOD], buffer.getvalue()))).kept) == [0]


# ---------------------------------------------------------------- output


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_write_curated_from_an_archive(tmp_path: Path) -> None:
    encoded = [encoded_image(kind=kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")]
    pixels = np.random.default_rng(0).integers(256, size=(70, 80, 3), dtype=np.uint8)
    source = Pairs(
        ([GOOD, "river", "Café in the snow ☃"], encoded[0], ("a", "b"), {"style": "flat"}),
        (["river"], encoded[0]),
        *(([GOOD], image) for image in [*encoded[1:], pixels]),
    )
    report = curate(source)
    table = write_curated(source, report, tmp_path / "out")
    rows = lines(table)
    assert rows[0] == {
        "image": "images/00000/00000000.png",
        "captions": [GOOD, "Café in the snow ☃"],
        "tags": ["a", "b"],
        "facts": {"style": "flat"},
    }
    assert [Path(row["image"]).suffix for row in rows] == [".png", ".jpg", ".gif", ".webp", ".bmp", ".tif", ".png"]
    assert [(table.parent / row["image"]).read_bytes() for row in rows[:-1]] == encoded
    assert (np.asarray(Image.open(table.parent / rows[-1]["image"])) == pixels).all()
    assert lines(tmp_path / "out" / "dropped.jsonl") == [
        {"key": "sample-0", "rule": "single part of speech", "detail": "nouns: river", "sample": False},
        {"key": "sample-1", "rule": "single part of speech", "detail": "nouns: river", "sample": True},
    ]
    assert sorted(path.name for path in table.parent.iterdir()) == ["dropped.jsonl", "images", "metadata.jsonl"]


def test_written_dataset_opens_as_a_source(tmp_path: Path) -> None:
    captions: Sequence[str] = (GOOD, "Café in the snow ☃")
    source = Pairs(
        (captions, encoded_image(), ("red", "small dog"), {"style": "flat"}), ([GOOD], encoded_image(90), (), {})
    )
    written = open_table(write_curated(source, curate(source), tmp_path / "out"))
    assert len(written) == 2
    record = written.record(0)
    assert (record.captions, record.tags, dict(record.facts)) == (captions, ("red", "small dog"), {"style": "flat"})
    assert (written.record(1).captions, written.record(1).tags, dict(written.record(1).facts)) == ((GOOD,), (), {})
    assert [written.image(i) for i in range(2)] == [encoded_image(), encoded_image(90)]


def test_write_curated_references_image_files(tmp_path: Path) -> None:
    class Files(Pairs):
        splits = {"train": np.array([1]), "val": np.array([0])}  # noqa: RUF012

        def image_path(self, index: int) -> str:
            return str(folder / ("é.png", b"\xe9.png".decode("utf-8", "surrogateescape"))[index])

    folder = tmp_path / "in"
    folder.mkdir()
    source = Files(([GOOD], encoded_image()), ([GOOD], encoded_image(90)))
    for index in range(2):
        Path(source.image_path(index)).write_bytes(source.image(index))
    table = write_curated(source, curate(source), tmp_path / "out")
    assert not (table.parent / "images").exists()
    rows = lines(table)
    assert [row["image"] for row in rows] == [source.image_path(0), source.image_path(1)]
    assert [row["split"] for row in rows] == ["val", "train"]
    assert "é.png" in table.read_text(encoding="utf-8")
    assert open_table(table).image(1) == encoded_image(90)


def test_write_curated_does_not_change_a_folder_in_use(tmp_path: Path) -> None:
    source = Pairs(([GOOD], encoded_image()))
    report = curate(source)
    write_curated(source, report, tmp_path / "out")
    before = (tmp_path / "out" / "metadata.jsonl").read_bytes()
    with pytest.raises(UserError, match="not empty"):
        write_curated(source, CurationReport(DECLIP_YFCC), tmp_path / "out")
    assert (tmp_path / "out" / "metadata.jsonl").read_bytes() == before
    with pytest.raises(UserError, match="cannot be written"):
        write_curated(source, report, tmp_path / "out" / "metadata.jsonl")


# ---------------------------------------------------------------- the query list


def test_tag_counts() -> None:
    source = Pairs(
        ([GOOD], b"", ("Polar+Bear", "polar_bear", "Snow ")),
        ([GOOD], b"", ("snow", "", "+")),
        (BadSample("no caption"), b""),
        ([GOOD], b""),
    )
    assert tag_counts(source) == (Counter({"snow": 2, "polar bear": 1}), Counter({"no caption": 1}))


def test_queries_are_tags_followed_by_synonyms() -> None:
    tags = Counter({"snow": 2, "polar bear": 1, "car": 5, "auto": 1, "gramastar": 3})
    queries = build_queries(tags)
    assert queries[:5] == ["car", "gramastar", "snow", "auto", "polar bear"]
    expected = [synonym for tag in queries[:5] for synonym in synonyms(tag)]
    assert queries[5:] == list(dict.fromkeys(word for word in expected if word not in tags))
    assert {"automobile", "ice bear"} <= set(queries)
    assert len(queries) == len(set(queries))
    assert build_queries(list(tags.elements())) == queries
    assert build_queries(["", " "]) == []


def test_queries_are_written_one_per_line(tmp_path: Path) -> None:
    write_queries(["car", "café au lait"], tmp_path / "queries.txt")
    assert (tmp_path / "queries.txt").read_bytes() == "car\ncafé au lait\n".encode()
    with pytest.raises(UserError, match="cannot be written"):
        write_queries(["car"], tmp_path / "absent" / "queries.txt")


def test_caption_nouns() -> None:
    caption = "Two dogs and a dog chase geese; the women's car, gramastar"
    assert caption_nouns(caption) == ("dog", "goose", "woman", "car")
    assert caption_nouns("what is this") == ()
