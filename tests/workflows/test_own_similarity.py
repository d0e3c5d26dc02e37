"""A run of a method with its own similarity, in every workflow: the run has CLIP's weights, compared token by token."""

import json
import os
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.token_wise import TokenWise, TwoVectors, loop_similarity

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.networks.grad_cam import grad_cam
from coalign.runs import run as runs
from coalign.runs.run import load
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.explore.localize import localize
from coalign.workflows.explore.search import search
from coalign.workflows.explore.space import space
from coalign.workflows.image_files import read_image
from coalign.workflows.models.export import export


@pytest.fixture(autouse=True)
def token_wise(monkeypatch):
    monkeypatch.setattr(runs, "method_class", lambda name: TokenWise)


def standardized(scores):
    return (scores - scores.mean()) / scores.std(correction=0)


@torch.no_grad()
def test_search_ranks_by_the_similarity(trained, pairs, tmp_path):
    encoder = load(trained).encoder()
    files = sorted(Path(pairs).rglob("*.png"))
    images = encoder.encode_image(
        torch.cat([read_image(file, encoder.image_size, encoder.preprocess) for file in files])
    )
    text = encoder.encode_text(["a blue apple, standing"])
    query = encoder.encode_image(read_image(files[5], encoder.image_size, encoder.preprocess))
    to_text, to_image = loop_similarity(images, text)[:, 0], loop_similarity(images, query)[:, 0]
    for options, scores in (
        ({"text": "a blue apple, standing"}, to_text),
        ({"image": files[5]}, to_image),
        ({"text": "a blue apple, standing", "image": files[5]}, sum(map(standardized, (to_text, to_image))) / 2),
    ):
        hits = search(trained, str(pairs), top=64, report=tmp_path / "found.html", **options).hits
        expected = {str(file.relative_to(pairs)): float(score) for file, score in zip(files, scores)}
        assert {hit.key: hit.score for hit in hits} == pytest.approx(expected, abs=1e-5 if len(options) == 1 else 1e-3)
        assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)


def test_grad_cam_is_of_the_similarity_to_the_own_text(trained, pairs, tmp_path):
    """Each image's map is that of a batch of it alone, and follows from the gradient of the loops' similarity."""
    method = load(trained).method
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        texts = load(trained).encoder().encode_text(["a red apple", "a boat", "two blue doors"])
    maps = grad_cam(method.image, method.encode_image, pixels, texts, method.similarity)
    assert maps.amax() > 0
    for row in range(3):
        one = slice(row, row + 1)
        own = type(texts)(*(field[one] for field in texts))
        for similarity in (method.similarity, loop_similarity):
            alone = grad_cam(method.image, method.encode_image, pixels[one], own, similarity)
            torch.testing.assert_close(maps[one], alone, rtol=1e-3, atol=1e-7)
    image = next(Path(pairs).rglob("*.png"))
    shown = localize([trained], image, ["a red apple", "a boat"], tmp_path / "map.png")
    assert shown.shape == (1, 2, 32, 32)


def test_space_needs_one_vector(trained, pairs, tmp_path):
    with pytest.raises(UserError, match=r"does not compare one vector per sample, which the plot needs\.$"):
        space(trained, str(pairs), tmp_path / "space.png")


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_other_libraries_have_no_such_similarity(trained, tmp_path, library):
    with pytest.raises(UserError, match=f"{library} compares one vector per sample"):
        export(trained, library, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_evaluation_tasks(trained, pairs, tmp_path):
    tasks = [f"{kind}:{pairs}" for kind in ("retrieval", "zeroshot", "finetune", "finetune-retrieval")]
    results = evaluate(str(trained), tasks, EvalConfig(cache=tmp_path / "cache"))
    assert "modality_gap" not in results[tasks[0]]["metrics"]
    encoded = evaluate(str(trained), tasks[:2], EvalConfig(cache=tmp_path / "cache"))
    assert encoded == {task: results[task] for task in tasks[:2]}


def test_training_run_and_its_report(pairs, model_file, tmp_path, monkeypatch):
    from coalign.workflows.train import run_report

    summaries = []
    page = run_report.run_page
    monkeypatch.setattr(run_report, "run_page", lambda summary: summaries.append(summary) or page(summary))
    out = tmp_path / "run"
    assert cli.main(tiny.train_args(pairs, out, model_file, epochs=1)) == 0
    assert "modality_gap" not in json.loads((out / "results.json").read_text())["tasks"]["retrieval"]["metrics"]
    html = (out / "report.html").read_text()
    assert "with their similarities" in html
    assert "osine" not in html.replace(">cosine</td>", "")  # the schedule
    assert {path.stem for path in out.glob("*.png")} == {"metrics", "curves", "similarity", "similarities"}
    (summary,) = summaries
    assert summary.similarities.diagonal() == pytest.approx(summary.matching[: len(summary.similarities)], abs=1e-6)
    assert summary.similarities.diagonal(1) == pytest.approx(summary.others[1 : len(summary.similarities)], abs=1e-6)


EXPORT = """
import sys
from coalign.runs import card, run
from helpers.token_wise import {method}
run.method_class = card.method_class = lambda name: {method}
from coalign.workflows.models.export import export
export(sys.argv[1], "onnx", sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", [TokenWise, TwoVectors])
def test_onnx_export_has_the_same_similarity(trained, pairs, tmp_path, monkeypatch, method):
    """In a subprocess, as the exporter cannot trace the shape checks of these tests."""
    monkeypatch.setattr(runs, "method_class", lambda name: method)
    out = tmp_path / "out"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])}
    command = [sys.executable, "-c", EXPORT.format(method=method.__name__), str(trained), str(out)]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    info = json.loads((out / "onnx_model.json").read_text())
    assert info["similarity"] == "similarity.onnx"
    ours, peer = load(trained).encoder(), open_eval_model(str(out)).encoder
    texts = ["a red apple", "", "two blue doors and a boat", "of " * 40]
    pixels = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        for count in (1, 4):
            own = ours.encode_image(pixels[: count + 1]), ours.encode_text(texts[:count])
            exported = peer.encode_image(pixels[: count + 1]), peer.encode_text(texts[:count])
            for one, other, kind in zip(own, exported, ("image", "text")):
                assert list(one._fields) == list(other._fields) == info["outputs"][kind]
                for field, other_field in zip(one, other):
                    torch.testing.assert_close(field, other_field, rtol=0, atol=1e-5)
            torch.testing.assert_close(ours.similarity(*own), peer.similarity(*exported), rtol=0, atol=1e-5)
            assert pickle.loads(pickle.dumps(exported[1]))._fields == exported[1]._fields
    exported, own = (
        next(iter(evaluate(str(m), [f"retrieval:{pairs}"], EvalConfig(split="all")).values())) for m in (out, trained)
    )
    assert exported["images"] == own["images"] == 64
    for name, metric in own["metrics"].items():
        tolerance = 1 / 64 if metric["kind"] == "rate" else 1  # a near tie
        assert exported["metrics"][name]["value"] == pytest.approx(metric["value"], abs=tolerance)
    names = {}
    code = re.search("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "card", "exec"), names)
    score = names["compare"](names["embed_images"](pixels.numpy()), names["embed_text"]("a red apple"))
    with torch.no_grad():
        expected = ours.similarity(ours.encode_image(pixels), ours.encode_text(["a red apple"]))
    torch.testing.assert_close(torch.from_numpy(score), expected, rtol=0, atol=1e-5)
