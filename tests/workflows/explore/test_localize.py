"""localize(): figures of localization maps, and the tasks on scenes."""

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.builders import build_method
from PIL import Image
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.scenes.source import open_scenes
from coalign.errors import UserError
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.evaluate.scene_tasks import guided_queries, scene_queries
from coalign.workflows.explore.localize import localize


def test_patch_maps_are_cosines_with_the_mean_token(tmp_path):
    method = build_method("oner", tmp_path).eval()
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    ids, lengths = torch.randint(1, 50, (2, 7)), torch.tensor([7, 4])
    maps = method.localize(pixels, ids, lengths)
    patches, tokens = method.patch_features(pixels), method.token_features(ids, lengths)
    for number, length in enumerate(lengths.tolist()):
        mean = tokens[number, 1 : length - 1].mean(0)
        for row in range(2):
            for column in range(2):
                cosine = F.cosine_similarity(patches[number, row, column], mean, dim=0)
                torch.testing.assert_close(maps[number, row, column], cosine)


def test_one_figure_for_one_and_two_tower_models(oner, trained, tmp_path, capsys):
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
    assert not np.allclose(maps[0, 0], maps[0, 1])  # the maps depend on the text


def test_invalid_arguments_raise(oner, tmp_path):
    image, out = tmp_path / "image.png", tmp_path / "map.png"
    with pytest.raises(UserError, match="No model is given"):
        localize([], image, ["a heart"], out)
    with pytest.raises(UserError, match="could not be read"):
        localize([oner], image, ["a heart"], out)
    image.write_text("<html>")
    with pytest.raises(UserError, match="cannot be used: not an image"):
        localize([oner], image, ["a heart"], out)
    with pytest.raises(UserError, match="nothing to localize"):
        localize([oner], image, [" "], out)
    with pytest.raises(UserError, match="is not an image file name"):
        localize([oner], image, ["a heart"], tmp_path / "map.txt")
    Image.fromarray(open_scenes("8").image(0)).save(image)
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        localize([oner], image, ["a heart"], tmp_path / "absent" / "map.png")


def test_queries_identify_one_object_and_have_its_mask():
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
        assert query.other_text != query.text


@pytest.mark.slow
def test_scene_tasks_reject_other_data(oner, trained, tmp_path, capsys):
    tasks = ["localization:scenes:32:hard,size=32", "foils:scenes:32:hard,size=32"]
    assert cli.main(["eval", str(oner), "--tasks", *tasks]) == 0
    printed = capsys.readouterr().out
    for name in ("Pointing game, image center", "IoU, other text", "Foils: bigger than"):
        assert name in printed
    values = evaluate(str(oner), tasks[:1])[tasks[0]]
    assert values["maps"] == "patch similarity"
    assert (
        0.02 < values["metrics"]["pointing_center"]["value"] < 0.3
    )  # objects lie in nine cells, and fill a part of them
    tiny.write_pairs(tmp_path / "photos", 16)
    with pytest.raises(UserError, match="which only scenes:… have"):
        evaluate(str(trained), [f"localization:{tmp_path / 'photos'}"])
    with pytest.raises(UserError, match="has no false captions"):
        evaluate(str(trained), [f"foils:{tmp_path / 'photos'}"])


def test_guides_identify_one_object_in_images_with_different_sizes():
    source = open_scenes("80", "train")
    queries = guided_queries(source, np.arange(80))
    assert len(queries) > 40
    for query in queries:
        objects = source.record(query.index).facts["objects"]
        (named,) = [item for item in objects if query.guide == f"a {item['colour']} {item['shape']}"]
        assert query.candidates[query.target] == f"a {named['size']} object"
        assert len({item["size"] for item in objects}) > 1


def test_guidance_needs_a_one_tower_model(oner, trained, tmp_path, capsys):
    tasks = ["guided:scenes:32,size=32", "bootstrap:scenes:32,size=32"]
    assert cli.main(["eval", str(oner), "--tasks", *tasks]) == 0
    printed = capsys.readouterr().out
    assert printed.count("Image with a text") == 2
    assert "Difference, percentage points" in printed
    assert cli.main(["eval", str(trained), "--tasks", tasks[0]]) == 2
    assert "cannot embed an image and a text jointly, which guided needs" in capsys.readouterr().err
