"""The data commands, run through the command line on small datasets."""

import json
import re
from functools import partial

import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.data.scenes import source as scenes
from coalign.data.sources.open import open_source

TITLE = """<svg xmlns="http://www.w3.org/2000/svg" xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"
 xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><rdf:RDF><cc:Work rdf:about="">
 <dc:title>{}</dc:title><dc:subject><rdf:Bag><rdf:li>{}</rdf:li></rdf:Bag></dc:subject></cc:Work></rdf:RDF></metadata></svg>"""


def run(*args):
    assert cli.main(["data", *map(str, args)]) == 0


@pytest.fixture
def messy(tmp_path):
    """12 usable pairs and 2 broken images, with one duplicate caption and one caption that is not English."""
    data = tiny.write_pairs(tmp_path / "messy", 12)
    images = sorted(data.rglob("*.png"))
    for path in images:
        path.with_suffix(".txt").write_text(f"a photo of a {path.stem.replace('_', ' ')}")
    for number, content in enumerate((b"", b"<html>")):
        path = data / f"broken{number}.jpg"
        path.write_bytes(content)
        path.with_suffix(".txt").write_text("a broken cup on a table")
    images[1].with_suffix(".txt").write_text(images[0].with_suffix(".txt").read_text())
    images[2].with_suffix(".txt").write_text("xqzw vvkk zzrt pplw")
    return data


def test_check(messy, tmp_path, capsys):
    page = tmp_path / "check.html"
    run("check", messy, "--report", page)
    printed = capsys.readouterr().out
    assert "12 of 14 checked samples are usable" in printed
    assert "Bad samples: 1 (empty file), such as broken0.jpg" in printed
    assert "Bad samples: 1 (not an image), such as broken1.jpg" in printed
    assert f"Report: {page}" in printed
    text = page.read_text()
    assert "data:image/" in text
    assert not re.search(r'(src|href)="https?://', text)
    run("check", messy, "--limit", "5")
    assert "of 5 checked samples" in capsys.readouterr().out


def test_a_missing_group_column_is_an_error_before_images_are_read(messy, capsys):
    table = messy / "x.csv"
    table.write_text("image,caption,sku\nbroken0.jpg,a cup,1\n")
    assert cli.main(["data", "check", str(table), "--group-column", "product"]) == 2
    printed = capsys.readouterr()
    assert "has no column 'product'; set --group-column to a column of the data: sku." in printed.err
    assert printed.out == ""


def test_curated_data_can_be_trained_on(messy, tmp_path, capsys, model_file):
    out = tmp_path / "kept"
    run("curate", messy, "--out", out)
    printed = capsys.readouterr().out
    kept = open_source(str(out))
    dropped = tiny.rows(out / "dropped.jsonl")
    assert f"kept {len(kept)} of 14 samples" in printed
    assert len(kept) == 11
    assert len({row["key"] for row in dropped}) == 3
    captions = [kept.record(index).captions[0] for index in range(len(kept))]
    assert all("photo" in caption for caption in captions)
    for index in range(len(kept)):
        assert kept.image(index)
    assert (
        cli.main(tiny.train_args(out, tmp_path / "run", model_file, batch_size=4, epochs=1, **{"dry-run": None})) == 0
    )
    assert cli.main(["data", "curate", str(messy), "--out", str(out)]) == 2
    assert str(out) in capsys.readouterr().err


def test_queries(messy, tmp_path, capsys):
    run("queries", messy, "--out", tmp_path / "queries.txt")
    queries = (tmp_path / "queries.txt").read_text().splitlines()
    assert "apple" in queries
    assert len(queries) == len(set(queries)) > 3
    printed = capsys.readouterr().out
    assert f"{len(queries):,} queries" in printed


def test_tokenizer(pairs, tmp_path, capsys):
    file = tmp_path / "tokens.json"
    run("tokenizer", pairs, "--out", file, "--vocab-size", 300)
    assert re.search(r"tokens.json: \d+ tokens from \d+ samples", capsys.readouterr().out)
    assert len(json.loads(file.read_text())["model"]["vocab"]) <= 300
    assert cli.main(["data", "tokenizer", str(pairs), "--out", str(file), "--vocab-size", "3"]) == 2
    assert "258" in capsys.readouterr().err


def test_scenes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(scenes, "EVALUATION_SIZE", 12)  # writing 2,000 images per split takes half a minute
    monkeypatch.setattr(scenes, "write_scenes", partial(scenes.write_scenes, num_foils=15))
    out = tmp_path / "scenes"
    run("scenes", "--out", out, "--level", "standard", "--train", 24, "--size", 32)
    printed = capsys.readouterr().out
    written = open_source(str(out))
    assert written.record(0).captions == open_source("scenes:24:standard").record(0).captions
    assert "train 24, val 12" in printed
    assert len(written.splits["train"]) == 24
    with Image.open(next(out.rglob("*.png"))) as image:
        assert image.size == (32, 32)
    assert cli.main(["data", "scenes", "--out", str(out), "--train", "24"]) == 2
    assert str(out) in capsys.readouterr().err


def test_openclipart_from_an_unpacked_tree(tmp_path, capsys):
    art = tmp_path / "root" / "usr/share/openclipart"
    for name, title in (
        ("animals/cat_01", "A sleeping cat"),
        ("animals/dog_02", "A brown dog"),
        ("food/pie_03", "Apple pie"),
    ):
        for kind in ("png", "svg"):
            (art / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (60, 40), (200, 30, 30, 255)).save(art / "png" / f"{name}.png")
        (art / "svg" / f"{name}.svg").write_text(TITLE.format(title, name.split("/")[0]))
    (art / "png" / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    (art / "svg" / "cut.svg").write_text(TITLE.format("Cut", "tag"))
    out = tmp_path / "out"
    run("openclipart", "--from", tmp_path / "root", "--out", out, "--max-side", 32)
    printed = capsys.readouterr().out
    assert "3 pairs from 4 images" in printed
    assert "Skipped (see" in printed
    source = open_source(str(out))
    captions = {caption for index in range(len(source)) for caption in source.record(index).captions}
    assert {"A sleeping cat", "A brown dog", "Apple pie"} <= captions
    assert cli.main(["data", "openclipart", "--from", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert "nowhere" in capsys.readouterr().err
