"""localize(): a picture of what a run looks at, and the queries that scenes give."""

import numpy as np
import pytest
import tiny
import torch
from builders import build_method
from PIL import Image
from torch.nn import functional as F

from coalign import cli
from coalign.data.scenes import open_scenes
from coalign.errors import UserError
from coalign.run.evaluate import evaluate
from coalign.run.localize import localize
from coalign.run.scene_tasks import guided_queries, scene_queries


def test_patches_are_compared_with_the_mean_token(tmp_path):
    method = build_method("oner", tmp_path).eval()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    ids, lengths = torch.randint(1, 50, (2, 7)), torch.tensor([7, 4])
    found = method.localize(pixels, ids, lengths)
    patches, tokens = method.patch_features(pixels), method.token_features(ids, lengths)
    for number, length in enumerate(lengths.tolist()):
        mean = tokens[number, 1 : length - 1].mean(0)
        for row in range(2):
            for column in range(2):
                cosine = F.cosine_similarity(patches[number, row, column], mean, dim=0)
                torch.testing.assert_close(found[number, row, column], cosine)


def test_one_picture_for_models_of_both_kinds(oner, trained, tmp_path, capsys):
    image = tmp_path / "image.png"
    Image.fromarray(open_scenes("8").image(0)).save(image)
    out = tmp_path / "map.png"
    command = [
        "localize",
        str(oner),
        str(trained),
        "--image",
        str(image),
        "--text",
        "a heart",
        "a ring",
        "--out",
        str(out),
    ]
    assert cli.main(command) == 0
    assert Image.open(out).size[0] > 500
    maps = localize([oner, trained], image, ["a heart", "a ring"], out)
    assert maps.shape == (2, 2, 32, 32)
    assert np.isfinite(maps).all()
    assert not np.allclose(maps[0, 0], maps[0, 1])  # the text counts


def test_what_is_wrong_is_said(oner, tmp_path):
    image, out = tmp_path / "image.png", tmp_path / "map.png"
    with pytest.raises(UserError, match="There is no model to ask"):
        localize([], image, ["a heart"], out)
    with pytest.raises(UserError, match="could not be read"):
        localize([oner], image, ["a heart"], out)
    image.write_text("<html>")
    with pytest.raises(UserError, match="cannot be used: not an image"):
        localize([oner], image, ["a heart"], out)
    with pytest.raises(UserError, match="nothing to look for"):
        localize([oner], image, [" "], out)
    with pytest.raises(UserError, match="no picture's name"):
        localize([oner], image, ["a heart"], tmp_path / "map.txt")
    Image.fromarray(open_scenes("8").image(0)).save(image)
    with pytest.raises(UserError, match="there is no folder"):
        localize([oner], image, ["a heart"], tmp_path / "absent" / "map.png")


def test_queries_name_one_object_and_have_its_mask():
    source = open_scenes("60", "train")
    queries = scene_queries(source, np.arange(60), 48)
    assert len(queries) > 60
    for query in queries:
        objects = source.record(query.index).facts["objects"]
        named = [item for item in objects if query.text == f"a {item['colour']} {item['shape']}"]
        assert len(named) == 1
        left, top, right, bottom = (edge * 48 for edge in named[0]["box"])
        rows, columns = np.nonzero(query.mask)
        assert left - 1 <= columns.min() <= columns.max() <= right + 1
        assert top - 1 <= rows.min() <= rows.max() <= bottom + 1
        assert query.other != query.text


def test_scenes_are_scored_and_other_data_refused(oner, trained, tmp_path, capsys):
    tasks = ["localization:scenes:32,size=32", "foils:scenes:32,size=32"]
    assert cli.main(["eval", str(oner), "--tasks", *tasks]) == 0
    shown = capsys.readouterr().out
    for words in ("pointing centre", "iou other text", "accuracy, bigger than"):
        assert words in shown
    values = evaluate(str(oner), tasks[:1])[tasks[0]]
    assert values["maps"] == "patch similarity"
    assert 0.02 < values["pointing_centre"]["value"] < 0.3  # objects lie in nine cells, and fill a part of theirs
    tiny.write_pairs(tmp_path / "photos", 16)
    with pytest.raises(UserError, match="only scenes"):
        evaluate(str(trained), [f"localization:{tmp_path / 'photos'}"])
    with pytest.raises(UserError, match="no false captions"):
        evaluate(str(trained), [f"foils:{tmp_path / 'photos'}"])


def test_guides_name_one_object_of_pictures_whose_objects_differ_in_size():
    source = open_scenes("80", "train")
    queries = guided_queries(source, np.arange(80))
    assert len(queries) > 40
    for query in queries:
        objects = source.record(query.index).facts["objects"]
        (named,) = [item for item in objects if query.guide == f"a {item['colour']} {item['shape']}"]
        assert query.answers[query.right] == f"a {named['size']} object"
        assert len({item["size"] for item in objects}) > 1


def test_guidance_is_asked_of_a_model_with_one_tower(oner, trained, tmp_path, capsys):
    tasks = ["guided:scenes:32,size=32", "bootstrap:scenes:32,size=32"]
    assert cli.main(["eval", str(oner), "--tasks", *tasks]) == 0
    shown = capsys.readouterr().out
    assert shown.count("guided") >= 2
    assert "difference" in shown
    assert cli.main(["eval", str(trained), "--tasks", tasks[0]]) == 2
    assert "is a model of two towers" in capsys.readouterr().err
