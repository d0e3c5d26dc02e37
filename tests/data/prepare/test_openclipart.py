from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from coalign.data.prepare import openclipart
from coalign.data.prepare.openclipart import prepare_openclipart
from coalign.data.prepare.openclipart_text import (
    Metadata,
    captions_of,
    clean,
    is_informative,
    name_caption,
    read_metadata,
    style_of,
    tags_of,
)
from coalign.data.sources.open import open_source
from coalign.errors import BadSample, UserError

HEAD = '<?xml version="1.0" encoding="UTF-8"?>\n'


def svg(
    title: str = "", description: str = "", creator: str = "", keywords: tuple[str, ...] = (), head: str = HEAD
) -> str:
    """Returns an SVG file with an RDF block as in the archive, including titles that must be ignored."""
    subject = "".join(f"<rdf:li>{keyword}</rdf:li>" for keyword in keywords)
    return f"""{head}<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><title>a layer's title</title>
<metadata><rdf:RDF><cc:Work rdf:about="">
<dc:publisher><cc:Agent rdf:about="http://example.org"><dc:title>the publisher</dc:title></cc:Agent></dc:publisher>
<dc:title>{title}</dc:title><dc:description>{description}</dc:description>
<dc:subject><rdf:Bag>{subject}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>{creator}</dc:title></cc:Agent></dc:creator>
<dc:rights><cc:Agent><dc:title>the owner</dc:title></cc:Agent></dc:rights><dc:date></dc:date>
</cc:Work></rdf:RDF></metadata><rect width="1" height="1"/></svg>"""


def png(width: int = 8, height: int = 8, mode: str = "RGBA", color: Any = (200, 30, 30, 255)) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), color).save(buffer, "PNG")
    return buffer.getvalue()


def huge_png(width: int, height: int) -> bytes:
    """Returns a PNG file that would take `width` × `height` × 4 bytes to decode, without its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


class Tree:
    """A root folder with the files of the packages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.art = root / "usr/share/openclipart"
        for kind in ("png", "svg"):
            (self.art / kind).mkdir(parents=True)

    def add(self, stem: str, drawing: str | bytes | None = None, image: bytes | None = None) -> None:
        for kind, content in (("png", png() if image is None else image), ("svg", drawing)):
            path = self.art / kind / f"{stem}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is not None:
                path.write_bytes(content.encode() if isinstance(content, str) else content)

    def prepare(self, **options: Any) -> dict[str, dict[str, Any]]:
        """Prepares the dataset. Returns the rows of metadata.jsonl by path without extension."""
        out = self.root / "out"
        self.summary = prepare_openclipart(out, self.root, **options)
        return {row["source"].removesuffix(".png"): row for row in lines(out / "metadata.jsonl")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# ---------------------------------------------------------------- datasets


def test_columns_pixels_and_summary(tree: Tree) -> None:
    tree.add("animals/cat_01", svg("A cat", "A cat on a mat", "Ann Lee", ("cat", "animal")), png(600, 300))
    tree.add("animals/dog_01", svg("A dog", creator="Bo"), png(30, 60, "RGBA", (0, 0, 0, 0)))
    rows = tree.prepare(max_side=100)
    assert rows["animals/cat_01"] == {
        "image": "images/animals/cat_01.png",
        "captions": ["A cat", "A cat on a mat"],
        "tags": ["cat", "animal"],
        "style": "ann lee",
        "category": "animals",
        "source": "animals/cat_01.png",
    }
    with Image.open(tree.root / "out" / rows["animals/cat_01"]["image"]) as cat:
        assert (cat.size, cat.mode, cat.format) == ((100, 50), "RGB", "PNG")
        assert np.abs(np.asarray(cat).astype(int) - (200, 30, 30)).max() <= 1
    with Image.open(tree.root / "out" / rows["animals/dog_01"]["image"]) as dog:
        assert dog.size == (30, 60)  # not enlarged
        assert np.asarray(dog).min() == 255  # transparent pixels are white
    summary = json.loads((tree.root / "out/summary.json").read_text())
    assert (summary["pngs"], summary["samples"], summary["skipped"]) == (2, 2, {})
    assert summary["captions_from"] == {"title": 2, "description": 1}


def test_skipped_files_are_reported(tree: Tree) -> None:
    tree.add("good", svg("Good"))
    tree.add("empty", svg("Empty"), b"")
    tree.add("cut", svg("Cut"), png(64, 64, "RGB", (1, 2, 3))[:-30])
    tree.add("page", svg("Page"), b"<html>not found</html>")
    tree.add("bomb", svg("Bomb"), huge_png(60_000, 60_000))
    (tree.art / "png/linked.png").symlink_to("good.png")
    (tree.art / "png/dangling.png").symlink_to("nowhere.png")
    (tree.art / "png/notes.txt").write_text("no image")
    rows = tree.prepare()
    skipped = {row["file"]: row["reason"] for row in lines(tree.root / "out/skipped.jsonl")}
    assert list(rows) == ["good"]
    assert skipped == {
        "bomb.png": "image too large",
        "cut.png": "truncated image",
        "dangling.png": "broken link",
        "empty.png": "empty file",
        "linked.png": "link to another file",
        "page.png": "not an image",
    }
    assert tree.summary.skipped == Counter(skipped.values())
    assert tree.summary.pngs == 7 == tree.summary.samples + sum(tree.summary.skipped.values())


def test_file_name_that_is_not_utf8_is_skipped(tree: Tree) -> None:
    tree.add("good", svg("Good"))
    name = os.fsdecode(b"caf\xe9.png")
    (tree.art / "png" / name).write_bytes(png())
    assert list(tree.prepare()) == ["good"]
    assert [(row["file"], row["reason"]) for row in lines(tree.root / "out/skipped.jsonl")] == [
        (name, "file name is not UTF-8")
    ]


def test_metadata_problems_fall_back_to_the_file_name(tree: Tree) -> None:
    entity_expansion = '<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;">]>\n'
    tree.add("red_house_01", svg("&b;", head=entity_expansion))
    tree.add("old_ship_02", '<svg xmlns="http://www.w3.org/2000/svg"><metadata><oh no')
    tree.add("blue_car")
    tree.add("green_tree", '<svg xmlns="http://www.w3.org/2000/svg"/>')
    tree.add("odd_hat", svg("Hat", head='<?xml version="1.0" encoding="x-klingon"?>'))
    rows = tree.prepare()
    assert {stem: row["captions"] for stem, row in rows.items()} == {
        "red_house_01": ["red house"],
        "old_ship_02": ["old ship"],
        "blue_car": ["blue car"],
        "green_tree": ["green tree"],
        "odd_hat": ["odd hat"],
    }
    problems = {row["file"]: row["reason"] for row in lines(tree.root / "out/metadata_problems.jsonl")}
    assert {stem: problems[f"{stem}.png"] for stem in ("red_house_01", "old_ship_02", "blue_car", "green_tree")} == {
        "red_house_01": "SVG declares entities",
        "old_ship_02": "malformed SVG",
        "blue_car": "no SVG",
        "green_tree": "SVG without metadata",
    }
    assert problems["odd_hat.png"] in ("malformed SVG", "unreadable SVG")
    assert sum(tree.summary.metadata_problems.values()) == 5


def test_external_entity_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("secret words")
    head = f'<?xml version="1.0"?><!DOCTYPE svg [<!ENTITY x SYSTEM "file://{tmp_path}/secret">]>'
    (tmp_path / "a.svg").write_text(svg("&x;", head=head))
    with pytest.raises(BadSample, match="declares entities"):
        read_metadata(tmp_path / "a.svg")


def test_external_dtd_is_not_read(tmp_path: Path) -> None:
    head = '<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.0//EN" "http://localhost:1/svg10.dtd">'
    (tmp_path / "a.svg").write_text(svg("A title", head=head))
    assert read_metadata(tmp_path / "a.svg").title == "A title"


def test_result_does_not_depend_on_worker_processes(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(12):
        tree.add(f"things/thing_{number}", svg(f"Thing {number}"), png(20 + number, 10) if number % 4 else b"")
    alone = tree.prepare()
    (tree.root / "out").rename(tree.root / "alone")
    monkeypatch.setattr(openclipart, "MIN_PARALLEL", 2)
    monkeypatch.setattr("coalign.data.prepare.openclipart.num_cores", lambda: 2)
    assert tree.prepare() == alone
    for row in alone.values():
        assert (tree.root / "out" / row["image"]).read_bytes() == (tree.root / "alone" / row["image"]).read_bytes()


def test_dataset_opens_as_a_source(tree: Tree) -> None:
    tree.add("computer/icons/flat-theme/view", svg("View", "Looking at a file", "Al", ("icon", "hash")))
    tree.prepare()
    source = open_source(str(tree.root / "out"))
    record = source.record(0)
    assert (len(source), record.captions, record.tags) == (1, ("View", "Looking at a file"), ("icon",))
    assert (record.facts["style"], record.facts["category"]) == ("flat", "computer/icons/flat-theme")
    assert isinstance(source.image(0), bytes)


# ---------------------------------------------------------------- captions, style, tags


def test_boilerplate_titles_are_replaced_by_file_names(tree: Tree) -> None:
    for name in ("star_75pt28step", "star_27pt04step", "star_62pt21step"):
        tree.add(f"shapes/{name}", svg("gramastar"))
    for name in ("view_remove", "redo", "math_sum"):
        tree.add(f"icons/{name}", svg("Part of the Flat Icon Collection (Wed Aug 25 23:29:46 2004)"))
    for name in ("candy_10", "candy_31", "candy_32"):
        tree.add(f"food/{name}", svg("Candy"))
    rows = tree.prepare()
    assert rows["shapes/star_75pt28step"]["captions"] == ["star 75pt28step"]
    assert rows["icons/view_remove"]["captions"] == ["view remove"]
    assert rows["icons/view_remove"]["style"] == "flat"
    assert rows["food/candy_31"]["captions"] == ["Candy"]  # shared, but matches the file name
    assert tree.summary.captions_from == {"file name": 6, "title": 3}


@pytest.mark.parametrize(
    ("file", "author", "caption"),
    [
        ("tools/saw_peterm_.png", "peterm", "saw"),
        ("buildings/casa_verde_architetto_fr_01.png", "Architetto Francesco Rollandin", "casa verde"),
        ("animals/dog_02r.png", "", "dog"),
        ("signs/MatieresInflammables.png", "", "Matieres Inflammables"),
        ("games/chesspieces-king.png", "Jakob [someone@example.org]", "chesspieces king"),
        ("cards/simple_h_3.png", "Nicu Buculei", "simple h 3"),
        ("people/stickmen/sm_014.png", "", "stickmen sm"),
        ("shapes/flowchart/fc04.png", "", "flowchart fc04"),
        ("flags/_armenia_ani_ani_02.png", "AnI AnI", "armenia"),
        ("people/jo_jo.png", "Jo Jo", "people jo"),
        ("x/01.png", "", "x 01"),
        ("01.png", "", "01"),
    ],
)
def test_name_caption(file: str, author: str, caption: str) -> None:
    assert name_caption(file, author) == caption


def captions(
    title: str, description: str = "", file: str = "a/some_file_01.png", titles: int = 1, descriptions: int = 1
) -> list[str]:
    metadata = Metadata(title, description)
    return [c for _, c in captions_of(file, metadata, Counter({title: titles}), Counter({description: descriptions}))]


def test_uninformative_titles() -> None:
    for title in ("", "HASH(0x8677e2c)", "a@example.org", "2005-08-21", "(Wed Aug 25 23:29:46 2004)", "42"):
        assert captions(title) == ["some file"], title
    assert captions("02_waxingcrescent") == ["02 waxingcrescent"]
    assert captions("Clipart by Pedro Gracia - Spain - Canary") == ["Spain - Canary"]
    assert captions("Valle d&amp;#39;Aosta") == ["Valle d'Aosta"]


def test_descriptions() -> None:
    assert captions("Bread", "A loaf of bread") == ["Bread", "A loaf of bread"]
    for empty in ("", "bread", "Bread.", "HASH(0x85a4f2c)", "me@example.org", "see http://example.org", "2005/05/30"):
        assert captions("Bread", empty) == ["Bread"], empty
    assert captions("Pass either side", "UK roadsigns", descriptions=29) == ["Pass either side"]
    bulb = "This is a vectorized image of a light bulb."
    assert captions("Light bulb", bulb, descriptions=5) == ["Light bulb", bulb]


def test_style() -> None:
    def style(file: str, title: str = "", creator: str = "", count: int = 1) -> str:
        return style_of(file, Metadata(title, creator=creator), Counter({title: count}))

    assert style("computer/icons/etiquette-theme/apps/firefox.png", "Etiquette Icons", "Andy", 88) == "etiquette"
    assert style("computer/b_plus.png", "Etiquette Icons", "Andy", 88) == "etiquette"
    assert style("computer/a.png", "Lemon SVG theme", "Jose", 411) == "lemon"
    assert style("computer/a.png", "blueberry - iconset", "Marko", 24) == "blueberry"
    assert style("computer/a.png", "computer icons", "Marko") == "marko"  # a title of a single file is not a theme
    assert style("a.png", creator="Jakob [someone@example.org]") == "jakob"
    assert style("a.png", creator="HASH(0x8a0cf9c)") == ""


def test_tags() -> None:
    noisy = (
        "hash",
        "",
        "0x93a3a4c",
        "hash(0x8a0cf54)",
        "11",
        "north_america",
        "Fish",
        "fish",
        "unsorted",
        "ann lee",
        "a@b.c",
    )
    assert tags_of(Metadata(creator="Ann Lee", keywords=noisy)) == ["north america", "fish"]


def test_clean_fixes_doubly_encoded_text() -> None:
    assert clean("Josu&Atilde;&copy; Alcalde") == "Josué Alcalde"
    assert clean("Arag\u00f3n") == "Aragón"
    assert clean(" a\x00b\n c\u200b ") == "a b c"
    assert is_informative("Boîte")
    assert not is_informative("0x93a3a4c")


# ---------------------------------------------------------------- errors


def test_out_must_be_new_or_empty(tree: Tree) -> None:
    tree.add("a", svg("A"))
    (tree.root / "out").mkdir()
    tree.prepare()  # an empty folder is allowed
    before = sorted(path.name for path in (tree.root / "out").iterdir())
    with pytest.raises(UserError, match="not an empty folder"):
        tree.prepare()
    assert sorted(path.name for path in (tree.root / "out").iterdir()) == before


def test_failure_leaves_no_files(tree: Tree) -> None:
    tree.add("a", svg("A"), b"")
    with pytest.raises(UserError, match="None of the 1 PNG files"):
        tree.prepare()
    assert sorted(path.name for path in tree.root.iterdir()) == ["usr"]


def test_missing_packages(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no Open Clip Art in"):
        prepare_openclipart(tmp_path / "out", tmp_path)
    (tmp_path / "usr/share/openclipart/png").mkdir(parents=True)
    with pytest.raises(UserError, match="install the package openclipart-svg"):
        prepare_openclipart(tmp_path / "out", tmp_path)
    (tmp_path / "usr/share/openclipart/svg").mkdir()
    with pytest.raises(UserError, match="no PNG files"):
        prepare_openclipart(tmp_path / "out", tmp_path)


# ---------------------------------------------------------------- download, with fake tools


def tools(folder: Path, **scripts: str) -> str:
    folder.mkdir(exist_ok=True)
    for name, script in scripts.items():
        path = folder / name.replace("_", "-")
        path.write_text("#!/bin/sh\n" + script)
        path.chmod(0o755)
    return str(folder)


def test_download(tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree.add("cat", svg("A cat"))
    fetch = '[ "$1" = download ] || exit 9\nshift\nfor name in "$@"; do echo > "${name}_1%3a0.18_all.deb"; done\n'
    unpack = f'[ "$1" = -x ] && [ -f "$2" ] || exit 9\ncp -r {tree.root}/usr "$3/"\n'
    folder = tools(tmp_path / "bin", apt_get=fetch, dpkg_deb=unpack)
    monkeypatch.setenv("PATH", folder + os.pathsep + os.environ["PATH"])
    assert prepare_openclipart(tmp_path / "new/out", download=True).samples == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]  # the downloaded packages are deleted


def test_download_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", tools(tmp_path / "none"))
    with pytest.raises(UserError, match="requires apt-get"):
        prepare_openclipart(tmp_path / "out", download=True)
    unlisted = 'echo "E: Unable to locate package openclipart-png" >&2; exit 100'
    monkeypatch.setenv("PATH", tools(tmp_path / "some", apt_get=unlisted, dpkg_deb="exit 0"))
    with pytest.raises(UserError, match="apt-get update"):
        prepare_openclipart(tmp_path / "out", download=True)
    broken = 'echo "W: hm" >&2; echo "E: Failed to fetch: no network" >&2; exit 100'
    monkeypatch.setenv("PATH", tools(tmp_path / "some", apt_get=broken))
    with pytest.raises(UserError, match="no network"):
        prepare_openclipart(tmp_path / "out", download=True)
    with pytest.raises(UserError, match="not both"):
        prepare_openclipart(tmp_path / "out", tmp_path, download=True)


# ---------------------------------------------------------------- split by style


def test_style_shift_tests_the_training_concepts_in_other_styles() -> None:
    def row(style: str, *captions: str) -> dict[str, Any]:
        return {"image": f"{style}{captions}", "captions": list(captions), "style": style}

    rows = [
        row("flat", "edit copy", "a long description"),
        row("nicu buculei", "Kühe"),
        row("lemon", "EditCopy", "an icon"),  # the same concept in another spelling
        row("jakob", "kühe"),
        row("jakob", "a boat"),  # not a training concept
        row("flat", "..."),
        row("", "???"),  # without letters, not a concept
        row("lemon", "Kühe"),  # looks like a training image
    ]
    looks = np.random.default_rng(0).integers(1 << 63, 1 << 64, len(rows), dtype=np.uint64)
    looks[-1] = looks[1] ^ np.uint64(0b1011)
    split = openclipart.style_shift(rows, looks)
    assert [(r["split"], r["style"], r["captions"]) for r in split] == [
        ("train", "flat", ["edit copy", "a long description"]),
        ("train", "nicu buculei", ["Kühe"]),
        ("train", "flat", ["..."]),
        ("test", "lemon", ["EditCopy"]),
        ("test", "jakob", ["kühe"]),
    ]
