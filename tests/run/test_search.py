"""search(): what is nearest to a text, to an image, and to both."""

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from coalign import cli
from coalign.data.scenes import open_scenes
from coalign.errors import UserError
from coalign.run.export import export
from coalign.run.model import load
from coalign.run.pictures import read_picture
from coalign.run.search import search


def normalised(embeds):
    return F.normalize(embeds.float(), dim=-1)


def test_the_answers_are_the_nearest_images(trained, pairs):
    run = load(trained)
    encoder = run.encoder()
    with torch.no_grad():
        query = normalised(encoder.encode_text(["a red thing"]))[0]
    answers = search(trained, str(pairs), "a red thing", top=5, split="val")
    scores = [hit.score for hit in answers.hits]
    assert scores == sorted(scores, reverse=True)
    everything = search(trained, str(pairs), "a red thing", top=10_000, split="val")
    assert len(everything.hits) == everything.searched
    assert [hit.key for hit in everything.hits[:5]] == [hit.key for hit in answers.hits]
    for hit in answers.hits:
        pixels = read_picture(Path(pairs) / hit.key, encoder.image_size)
        with torch.no_grad():
            own = normalised(encoder.encode_image(pixels))[0]
        assert hit.score == pytest.approx(float(own @ query), abs=1e-4)


def test_an_image_finds_itself_and_a_text_beside_it_moves_the_query(trained, pairs):
    run, encoder = load(trained), load(trained).encoder()
    first = search(trained, str(pairs), "a red thing", top=1).hits[0]
    picture = Path(pairs) / first.key
    alone = search(trained, str(pairs), image=picture, top=1)
    assert alone.hits[0].score == pytest.approx(1, abs=1e-4)
    both = search(trained, str(pairs), "a blue thing", picture, top=3)
    assert both.how == "sum of the embeddings of image and text"
    with torch.no_grad():
        image = normalised(encoder.encode_image(read_picture(picture, encoder.image_size)))[0]
        text = normalised(encoder.encode_text(["a blue thing"]))[0]
        best = normalised(encoder.encode_image(read_picture(Path(pairs) / both.hits[0].key, encoder.image_size)))[0]
    assert both.hits[0].score == pytest.approx(float(F.normalize(image + text, dim=0) @ best), abs=1e-4)
    assert run.path == trained


def test_one_tower_takes_both_as_one_sequence(oner, tmp_path, capsys):
    picture = tmp_path / "query.png"
    Image.fromarray(open_scenes("32,size=32").image(3)).save(picture)
    command = ["search", str(oner), "--data", "scenes:32,size=32", "--text", "a red ring", "--image", str(picture)]
    assert cli.main([*command, "--top", "4", "--split", "val", "--report", str(tmp_path / "found.html")]) == 0
    said = capsys.readouterr().out
    assert "2,000 images searched" in said
    page = (tmp_path / "found.html").read_text()
    assert page.count("<img") == 5  # the query and its answers
    assert "as one sequence" in page
    run = load(oner)
    pixels = read_picture(picture, run.encoder().image_size)
    with torch.no_grad():
        query = normalised(run.joint_encoder()(pixels, ["a red ring"]))[0]
    best = search(oner, "scenes:32,size=32", "a red ring", picture, top=1, split="val").hits[0]
    Image.fromarray(open_scenes("32,size=32").image(best.index)).save(tmp_path / "best.png")
    with torch.no_grad():
        found = run.encoder().encode_image(read_picture(tmp_path / "best.png", run.encoder().image_size))
    assert best.score == pytest.approx(float(normalised(found)[0] @ query), abs=1e-4)


def test_what_cannot_be_asked_is_a_sentence(trained, pairs, tmp_path):
    for query, said in (
        ({}, "nothing to search for"),
        ({"text": " "}, "is empty"),
        ({"text": "a dog", "top": 0}, "--top is 0"),
        ({"image": tmp_path / "none.png"}, "could not be read"),
        ({"text": "a dog", "split": "other"}, "no split named 'other'"),
    ):
        with pytest.raises(UserError, match=said):
            search(trained, str(pairs), **query)


def test_images_without_a_caption_are_found_too(trained, tmp_path):
    for number, colour in enumerate(((200, 30, 30), (30, 30, 200))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{number}.png")
    (tmp_path / "pairs.jsonl").write_text('{"image": "0.png", "caption": "red"}\n{"image": "1.png", "caption": null}\n')
    hits = search(trained, str(tmp_path / "pairs.jsonl"), "a blue thing").hits
    assert {hit.key: hit.captions for hit in hits} == {"0.png": ("red",), "1.png": ()}


def test_another_librarys_model_finds_an_image_by_itself(trained, pairs, tmp_path):
    export(trained, "open_clip", tmp_path / "model")
    picture = sorted(Path(pairs).rglob("*.png"))[7]
    found = search(tmp_path / "model", str(pairs), image=picture, top=2, report=tmp_path / "found.html")
    assert found.hits[0].key == str(picture.relative_to(pairs))
    assert found.hits[0].score == pytest.approx(1, abs=1e-6)
    assert (tmp_path / "found.html").exists()
