"""Exports to Sentence Transformers: the real library loads the folder and embeds texts and images as the run."""

import json
import sys

import numpy as np
import pytest
from helpers import tiny
from PIL import Image
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.networks.towers.spec import model_config
from coalign.runs.run import load
from coalign.workflows.image_files import read_image
from coalign.workflows.models.export import export

TEXTS = [
    "a red thing",
    "Two  BLUE apples,\tstanding!",
    "",
    "gray " * 40,
    "it’s 12 o'clock",
    "cafe\u0301 <end_of_text>",
    "赤い",
]
SIZES = [(32, 32), (64, 96), (200, 100), (7, 9), (1, 1)]  # of images; an odd margin is cropped one pixel beside


VIT = {**tiny.MODEL, "vision_cfg": {**tiny.MODEL["vision_cfg"], "layers": 2}}  # as a CLIPModel
TINY = {**model_config("tiny"), "vision_cfg": {**model_config("tiny")["vision_cfg"], "image_size": 32}}  # dual encoder


@pytest.fixture(scope="module", params=[VIT, TINY], ids=["vit", "tiny"])
def run(request, tmp_path_factory, pairs):
    folder, model = tmp_path_factory.mktemp("run"), request.param
    (folder / "model.json").write_text(json.dumps(model))
    assert (
        cli.main(tiny.train_args(pairs, folder / "run", folder / "model.json", recipe="slip", epochs=1, evals=0)) == 0
    )
    return folder / "run"


def test_the_library_embeds_texts_and_images_as_the_run(run, tmp_path, capsys):
    from sentence_transformers import SentenceTransformer

    assert cli.main(["export", str(run), "--to", "sentence-transformers", "--out", str(tmp_path / "out")]) == 0
    assert "Checked in sentence-transformers" in capsys.readouterr().out
    model = SentenceTransformer(str(tmp_path / "out"), device="cpu", local_files_only=True)
    encoder = load(run).encoder()
    ours = F.normalize(encoder.encode_text(TEXTS), dim=-1)
    np.testing.assert_allclose(model.encode(TEXTS), ours, rtol=0, atol=1e-5)
    rng, images = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        image.save(tmp_path / f"{number}.png")
        images.append(image)
        pixels = read_image(tmp_path / f"{number}.png", encoder.image_size, encoder.preprocess)
        expected = F.normalize(encoder.encode_image(pixels), dim=-1)
        np.testing.assert_allclose(model.encode([image]), expected, rtol=0, atol=1e-5)
        np.testing.assert_allclose(model.encode([str(tmp_path / f"{number}.png")]), expected, rtol=0, atol=1e-5)
    scores = model.similarity(model.encode(images), model.encode(TEXTS))
    np.testing.assert_allclose(scores, model.encode(images) @ ours.numpy().T, rtol=0, atol=1e-5)
    assert "SentenceTransformer(" in (tmp_path / "out/README.md").read_text()


def test_the_library_saves_and_loads_it_again(run, tmp_path):
    from sentence_transformers import SentenceTransformer

    out = export(run, "sentence-transformers", tmp_path / "out")
    model = SentenceTransformer(str(out), device="cpu")
    model.save_pretrained(str(tmp_path / "again"))
    again = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    np.testing.assert_allclose(model.encode(TEXTS), again.encode(TEXTS), rtol=0, atol=1e-6)


def test_models_that_it_cannot_hold_are_rejected(oner, tmp_path, trained, monkeypatch):
    with pytest.raises(UserError, match="oner has its own similarity; use --to onnx"):
        export(oner, "sentence-transformers", tmp_path / "out")
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(UserError, match='pip install "sentence-transformers>='):
        export(trained, "sentence-transformers", tmp_path / "out")
    assert not list(tmp_path.iterdir())
