"""ONNX exports: the example runs without coalign, quantization is measured, and own similarities evaluate as the run.

Exports run in subprocesses, as the exporter cannot trace the shape checks of these tests.
"""

import ast
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from PIL import Image
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.text.tokenizer import train_bpe
from coalign.errors import UserError
from coalign.networks.towers.spec import model_config
from coalign.runs.run import load
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.image_files import read_image
from coalign.workflows.models.export import export
from coalign.workflows.models.quantize import quantize_folder

VIT = {**tiny.MODEL, "vision_cfg": {**tiny.MODEL["vision_cfg"], "layers": 2}}
TINY = {**model_config("tiny"), "vision_cfg": {**model_config("tiny")["vision_cfg"], "image_size": 32}}
TEXTS = [
    "a red thing",
    "Two  BLUE apples,\tstanding!",
    "",
    "gray " * 40,
    "it’s 12 o'clock",
    "cafe\u0301 &amp; ﬁsh",
    "赤い",
]


@pytest.fixture(scope="module")
def run_and_export(tmp_path_factory, pairs):
    """Trains a run of one epoch and exports it; both are cached. Returns their folders, and what the export printed."""
    made = {}

    def make(method="clip", model=VIT, options=()):
        key = json.dumps([method, model, options])
        if key not in made:
            folder = tmp_path_factory.mktemp("run")
            (folder / "model.json").write_text(json.dumps(model))
            small = {"recipe": method, "epochs": 1, "evals": 0, "batch-norm-group": 4, "val-fraction": 0.3}
            assert cli.main(tiny.train_args(pairs, folder / "run", folder / "model.json", **small)) == 0
            process = tiny.start(
                ["export", str(folder / "run"), "--to", "onnx", "--out", str(folder / "out"), *options]
            )
            printed, errors = process.communicate(timeout=400)
            assert process.returncode == 0, errors
            made[key] = folder / "run", folder / "out", printed
        return made[key]

    return make


def write_images(folder):
    """Images of many kinds, of which each differs from what its file has in at least one way: size, orientation, mode, alpha."""
    rng = np.random.default_rng(0)

    def smooth(width, height):
        pixels = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)

    folder.mkdir()
    turned = Image.Exif()
    turned[274] = 6
    transparent = smooth(90, 61)
    transparent.putalpha(smooth(90, 61).convert("L"))
    smooth(32, 32).save(folder / "exact.png")
    smooth(1001, 667).save(folder / "photo.jpg")
    smooth(640, 481).save(folder / "turned.jpg", exif=turned)
    smooth(200, 300).convert("CMYK").save(folder / "cmyk.jpg")
    smooth(70, 50).convert("L").save(folder / "gray.png")
    smooth(70, 51).convert("P").save(folder / "palette.gif")
    transparent.save(folder / "transparent.png")
    smooth(1, 1).save(folder / "pixel.png")
    smooth(400, 9).save(folder / "wide.png")
    return sorted(folder.iterdir())


WITHOUT_COALIGN = """
import pickle, runpy, sys
sys.modules["coalign"] = sys.modules["torch"] = None  # an import raises ImportError
script, images, texts = pickle.loads(bytes.fromhex(sys.argv[1]))
names = runpy.run_path(script)
images, texts = [names["embed_image"](each) for each in images], [names["embed_text"](each) for each in texts]
similarity = names.get("similarity", lambda image, text: image @ text.T)
similarities = [[similarity(image, text) for text in texts] for image in images]
print(pickle.dumps((images, texts, similarities)).hex())
"""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "model"), [("clip", TINY), ("filip", VIT)])
def test_the_example_embeds_as_the_run_without_coalign(run_and_export, tmp_path, method, model):
    run, out, _ = run_and_export(method, model)
    images = write_images(tmp_path / "images")
    argument = pickle.dumps((str(out / "example.py"), [str(each) for each in images], TEXTS)).hex()
    command = [sys.executable, "-c", WITHOUT_COALIGN, argument]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert process.returncode == 0, process.stderr
    *embeds, similarities = pickle.loads(bytes.fromhex(process.stdout))
    encoder = load(run).encoder()
    ours = (
        [encoder.encode_image(read_image(each, encoder.image_size, encoder.preprocess)) for each in images],
        [encoder.encode_text([text]) for text in TEXTS],
    )
    for one, other in ((one, other) for pair in zip(ours, embeds) for one, other in zip(*pair, strict=True)):
        if method == "clip":
            np.testing.assert_allclose(F.normalize(one, dim=-1), other, rtol=0, atol=1e-5)
        else:
            for field, value in zip(one, other, strict=True):
                np.testing.assert_allclose(field, value, rtol=0, atol=1e-5)
    for image, row in zip(ours[0], similarities, strict=True):
        for text, value in zip(ours[1], row, strict=True):
            pair = [F.normalize(each, dim=-1) for each in (image, text)] if method == "clip" else [image, text]
            np.testing.assert_allclose(encoder.similarity(*pair), value, rtol=0, atol=1e-5)
    command = [sys.executable, str(out / "example.py"), str(images[0]), TEXTS[0]]
    printed = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True).stdout
    assert float(printed.strip(" []\n")) == pytest.approx(float(similarities[0][0][0, 0]), abs=1e-5)
    body = ast.parse((out / "example.py").read_text()).body[1:]  # without the docstring
    lines = {node.lineno for each in body for node in ast.walk(each) if hasattr(node, "lineno")}
    assert len(lines) <= 20 + 3 * (method == "filip")


@pytest.mark.slow
def test_an_export_has_no_path_of_this_machine(run_and_export):
    _, out, _ = run_and_export("clip", TINY)
    for file in out.iterdir():
        content = file.read_bytes()
        for path in (Path(__file__).parents[3], out.parent, sys.prefix, Path.home()):
            assert str(path).encode() not in content or str(path) == "/", (file, path)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "smaller"), [("int8", 3), ("fp16", 1.8)])
def test_quantization_is_smaller_and_its_loss_measured(run_and_export, pairs, kind, smaller):
    """The recalls are those of `coalign eval`; on the held-out pairs, which the export knows."""
    run, whole, _ = run_and_export("clip", TINY)
    _, out, printed = run_and_export("clip", TINY, ("--quantize", kind))
    for name in ("image.onnx", "text.onnx"):
        assert (whole / name).stat().st_size > smaller * (out / name).stat().st_size
    found = json.loads((out / "onnx_model.json").read_text())["quantization"]
    assert found["kind"] == kind
    assert found["bytes"] == {
        side: sum((folder / name).stat().st_size for name in ("image.onnx", "text.onnx"))
        for side, folder in (("before", whole), ("after", out))
    }
    for side, model in (("before", run), ("after", out)):
        (result,) = evaluate(str(model), [f"retrieval:{pairs}"], EvalConfig(split="val")).values()
        assert found["pairs"] == result["samples"] == 16
        for name in ("image_to_text.r1", "image_to_text.r10", "text_to_image.r1", "text_to_image.r10"):
            assert found["retrieval"][name][side] == pytest.approx(result["metrics"][name]["value"])
    for values in found["retrieval"].values():
        assert values["difference"] == pytest.approx(values["after"] - values["before"])
        assert values["low"] <= values["difference"] <= values["high"]
        assert values["title"] in printed
    assert "16 held-out pairs" in printed
    assert f"The weights were quantized to {kind}" in (out / "README.md").read_text()
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    cosines = (load(run).encoder(), open_eval_model(str(out)).encoder)
    one, other = (F.normalize(torch.cat([m.encode_image(pixels), m.encode_text(TEXTS)]), dim=-1) for m in cosines)
    assert (one * other).sum(1).min() > 0.98


@pytest.mark.slow
def test_a_loss_that_cannot_be_measured_is_said(run_and_export, tmp_path, capsys):
    run, whole, _ = run_and_export("clip", TINY)
    shutil.copytree(whole, tmp_path / "out")
    shutil.copytree(run, tmp_path / "moved")
    config = json.loads((run / "config.json").read_text())
    (tmp_path / "moved/config.json").write_text(json.dumps({**config, "data": str(tmp_path / "gone")}))
    note = quantize_folder(load(tmp_path / "moved"), tmp_path / "out", "fp16")
    printed = capsys.readouterr().out
    assert "The loss in retrieval was not measured: " in printed
    assert str(tmp_path / "gone") in printed
    assert note == "The weights were quantized to fp16 after training and after these checks and results."
    content = (tmp_path / "out/onnx_model.json").read_text()
    assert json.loads(content)["quantization"]["retrieval"] == {}
    assert str(tmp_path) not in content


def test_an_export_of_an_older_version_is_rejected(tmp_path):
    """Its tokenizer adds no start and end tokens."""
    info = {"image_size": 32, "context_length": 12, "logit_scale": 10.0}
    (tmp_path / "onnx_model.json").write_text(json.dumps(info))
    train_bpe(["a red dog"], 300).save(tmp_path / "tokenizer.json")
    with pytest.raises(
        UserError, match=r"tokenizer.json is of an export by an older version .*; export the run again\."
    ):
        open_eval_model(tmp_path)


def test_only_onnx_is_quantized(trained, tmp_path):
    for to, kind in (("open_clip", "int8"), ("onnx", "int4")):
        with pytest.raises(UserError, match="only ONNX can be quantized: to int8 or fp16"):
            export(trained, to, tmp_path / "out", quantize=kind)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["filip", "oner", "uniclip"])
def test_an_export_evaluates_as_the_run(run_and_export, pairs, method):
    """Also with a similarity of its own, or other heads."""
    run, out, _ = run_and_export(method)
    assert (out / "similarity.onnx").exists() == (method != "uniclip")
    for split in ("all", "val"):
        own, exported = (
            next(iter(evaluate(str(each), [f"retrieval:{pairs}"], EvalConfig(split=split)).values()))
            for each in (run, out)
        )
        assert own["samples"] == exported["samples"]
        assert own["metrics"].keys() == exported["metrics"].keys()
        for name, metric in own["metrics"].items():
            assert exported["metrics"][name]["value"] == pytest.approx(metric["value"], abs=1e-5), name
