"""search(): the images nearest to a text, to an image, and to both."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.scenes.source import open_scenes
from coalign.errors import UserError
from coalign.runs.run import load
from coalign.types import CLIP_PREPROCESS
from coalign.workflows.explore.search import search
from coalign.workflows.image_files import read_image
from coalign.workflows.models.export import export


def normalize(embeds):
    return F.normalize(embeds.float(), dim=-1)


def test_hits_are_the_nearest_images(trained, pairs):
    run = load(trained)
    encoder = run.encoder()
    with torch.no_grad():
        query = normalize(encoder.encode_text(["a red thing"]))[0]
    result = search(trained, str(pairs), "a red thing", top=5, split="val")
    scores = [hit.score for hit in result.hits]
    assert scores == sorted(scores, reverse=True)
    everything = search(trained, str(pairs), "a red thing", top=10_000, split="val")
    assert len(everything.hits) == everything.num_images
    assert [hit.key for hit in everything.hits[:5]] == [hit.key for hit in result.hits]
    for hit in result.hits:
        pixels = read_image(Path(pairs) / hit.key, encoder.image_size, encoder.preprocess)
        with torch.no_grad():
            image = normalize(encoder.encode_image(pixels))[0]
        assert hit.score == pytest.approx(float(image @ query), abs=1e-4)


def test_image_finds_itself_and_a_text_moves_the_query(trained, pairs):
    run, encoder = load(trained), load(trained).encoder()
    first = search(trained, str(pairs), "a red thing", top=1).hits[0]
    path = Path(pairs) / first.key
    alone = search(trained, str(pairs), image=path, top=1)
    assert alone.hits[0].score == pytest.approx(1, abs=1e-4)
    both = search(trained, str(pairs), "a blue thing", path, top=3)
    assert both.query == "image and text, each standardized over the collection"
    with torch.no_grad():
        image = normalize(encoder.encode_image(read_image(path, encoder.image_size, encoder.preprocess)))[0]
        text = normalize(encoder.encode_text(["a blue thing"]))[0]
        keys = sorted(str(file.relative_to(pairs)) for file in Path(pairs).rglob("*.png"))
        pixels = [read_image(Path(pairs) / key, encoder.image_size, encoder.preprocess) for key in keys]
        images = normalize(torch.cat([encoder.encode_image(each) for each in pixels]))
    standardized = [(values - values.mean()) / values.std(correction=0) for values in (images @ image, images @ text)]
    scores = sum(standardized) / 2
    assert both.hits[0].score == pytest.approx(float(scores.max()), abs=1e-3)
    assert float(scores[keys.index(both.hits[0].key)]) == pytest.approx(float(scores.max()), abs=1e-3)
    assert run.path == trained


def test_oner_embeds_both_as_one_sequence(oner, tmp_path, capsys):
    query_path = tmp_path / "query.png"
    Image.fromarray(open_scenes("32,size=32").image(3)).save(query_path)
    command = ["search", str(oner), "--data", "scenes:32,size=32", "--text", "a red ring", "--image", str(query_path)]
    assert cli.main([*command, "--top", "4", "--split", "val", "--report", str(tmp_path / "found.html")]) == 0
    printed = capsys.readouterr().out
    assert "2,000 images searched" in printed
    page = (tmp_path / "found.html").read_text()
    assert page.count("<img") == 5  # the query and its hits
    assert "as one sequence" in page
    run = load(oner)
    pixels = read_image(query_path, run.encoder().image_size, run.encoder().preprocess)
    with torch.no_grad():
        query = run.joint_encoder()(pixels, ["a red ring"])
    best = search(oner, "scenes:32,size=32", "a red ring", query_path, top=1, split="val").hits[0]
    source = open_scenes("32,size=32")
    index = next(i for i in range(len(source)) if source.record(i).key == best.key)
    Image.fromarray(source.image(index)).save(tmp_path / "best.png")
    with torch.no_grad():
        embeds = run.encoder().encode_image(
            read_image(tmp_path / "best.png", run.encoder().image_size, CLIP_PREPROCESS)
        )
    assert best.score == pytest.approx(float(run.method.similarity(embeds, query)), abs=1e-4)


def test_invalid_queries_raise(trained, pairs, tmp_path):
    for query, message in (
        ({}, "nothing to search for"),
        ({"text": " "}, "is empty"),
        ({"text": "a dog", "top": 0}, "--top is 0"),
        ({"image": tmp_path / "none.png"}, "could not be read"),
        ({"text": "a dog", "split": "other"}, "no split named 'other'"),
    ):
        with pytest.raises(UserError, match=message):
            search(trained, str(pairs), **query)
    with pytest.raises(UserError, match="--top is 0"):  # before the data is opened
        search(trained, "no such data", "a dog", top=0)


def test_what_is_skipped_is_counted_by_reason(trained, tmp_path, capsys):
    Image.new("RGB", (32, 32), (200, 30, 30)).save(tmp_path / "0.png")
    (tmp_path / "1.png").write_bytes(b"")
    rows = f"image,caption\n0.png,{'word ' * 30}\n1.png,two\ngone.png,three\nlost.png,four\n"
    (tmp_path / "pairs.csv").write_text(rows)
    assert cli.main(["search", str(trained), "--data", str(tmp_path / "pairs.csv"), "--text", "red"]) == 0
    device, hit, *lines = capsys.readouterr().out.splitlines()
    assert device.startswith("Device: ")
    assert hit.endswith("word…")
    skipped = ["Skipped samples: 2 (image file is missing)", "Skipped samples: 1 (empty file)"]
    assert lines == ["1 images searched", *skipped]


def test_images_without_captions_are_searched(trained, tmp_path):
    for number, color in enumerate(((200, 30, 30), (30, 30, 200))):
        Image.new("RGB", (32, 32), color).save(tmp_path / f"{number}.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "0.png", "caption": "red"}\n{"image": "1.png", "caption": null}\n')
    hits = search(trained, str(tmp_path / "pairs.jsonl"), "a blue thing").hits
    assert {hit.key: hit.captions for hit in hits} == {"0.png": ("red",), "1.png": ()}


def test_exported_model_retrieves_its_own_image(trained, pairs, tmp_path):
    export(trained, "open_clip", tmp_path / "model")
    path = sorted(Path(pairs).rglob("*.png"))[7]
    result = search(tmp_path / "model", str(pairs), image=path, top=2, report=tmp_path / "found.html")
    assert result.hits[0].key == str(path.relative_to(pairs))
    assert result.hits[0].score == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "found.html").exists()
