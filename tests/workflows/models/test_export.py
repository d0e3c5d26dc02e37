"""Exports: other libraries compute the same embeddings and token ids, and models that they cannot represent are rejected."""

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from helpers import tiny
from PIL import Image
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.interop.onnx.load import session
from coalign.networks.towers.spec import model_config
from coalign.runs.card import card
from coalign.runs.folder import read_results
from coalign.runs.run import load
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.models.export import export
from coalign.workflows.models.export_check import check_close

TEXTS = ["a red thing", "Two  BLUE apples,\tstanding!", "", "gray " * 40, "it's 12 o'clock", "café"]
PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
VIT = {**tiny.MODEL, "vision_cfg": {**tiny.MODEL["vision_cfg"], "layers": 2}}
RESNET = {**tiny.MODEL, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet"}}
CUSTOM_RESNET = {
    **tiny.MODEL,
    "vision_cfg": {"image_size": 32, "timm_model_name": "resnet18", "timm_kwargs": {"layers": [1, 1, 1, 1]}},
}
TINY, SMALL = (
    {**model_config(name), "vision_cfg": {**model_config(name)["vision_cfg"], "image_size": 32}}
    for name in ("tiny", "small")
)
TIMM_VIT = {**tiny.MODEL, "vision_cfg": {"image_size": 32, "timm_model_name": "test_vit"}}
UNIFIED = {**VIT, "vision_cfg": {**VIT["vision_cfg"], "patch_size": 16}}


@pytest.fixture(scope="module")
def make(tmp_path_factory, pairs):
    """Trains a run of one epoch, cached by method, model and options."""
    runs = {}

    def make(method="clip", model=VIT, **options):
        key = json.dumps([method, model, options])
        if key not in runs:
            folder = tmp_path_factory.mktemp("run")
            (folder / "model.json").write_text(json.dumps(model))
            small = {"recipe": method, "epochs": 1, "evals": 0, "batch-norm-group": 4}
            assert cli.main(tiny.train_args(pairs, folder / "run", folder / "model.json", **small | options)) == 0
            runs[key] = folder / "run"
        return runs[key]

    return make


def embeds(run):
    encoder = load(run).encoder()
    with torch.no_grad():
        return encoder.encode_image(PIXELS), encoder.encode_text(TEXTS)


def normalize(pixels):
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    return (pixels / 255 - mean) / std


def assert_same(ours, theirs):
    for one, other in zip(ours, theirs):
        torch.testing.assert_close(F.normalize(one, dim=-1), F.normalize(other, dim=-1), rtol=0, atol=1e-5)


RUNS = [
    ("clip", VIT, {}),
    ("clip", VIT, {"tokenizer": "clip"}),
    ("slip", VIT, {}),
    ("declip", VIT, {}),
    ("mcd", VIT, {}),
    ("clip-strong", VIT, {"projector-width": 16}),
]


@pytest.mark.parametrize(("method", "model", "options"), [*RUNS, ("clip", TINY, {}), ("clip", SMALL, {})])
def test_open_clip_computes_the_same_embeddings_and_token_ids(make, tmp_path, method, model, options):
    run = make(method, model, **options)
    export(run, "open_clip", tmp_path / "out")
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    tokenize = open_clip.get_tokenizer(f"local-dir:{tmp_path / 'out'}")
    with torch.no_grad():
        assert_same(embeds(run), (model.eval().encode_image(normalize(PIXELS)), model.encode_text(tokenize(TEXTS))))
    assert model.logit_scale.exp().item() == pytest.approx(load(run).method.scalars()["logit_scale"].item(), rel=1e-5)
    own, lengths = load(run).tokenizer(TEXTS, 12)
    for text, ids, length in zip(tokenize(TEXTS).tolist(), own.tolist(), lengths.tolist()):
        assert text[:length] == ids[:length]
    assert preprocess(Image.fromarray(np.zeros((40, 50, 3), np.uint8))).shape == (3, 32, 32)


@pytest.mark.parametrize(
    ("method", "model", "options"), [*RUNS, *(("clip", model, {}) for model in (TINY, RESNET, CUSTOM_RESNET))]
)
def test_transformers_computes_the_same_embeddings_and_token_ids(make, tmp_path, method, model, options):
    from transformers import AutoModel, AutoTokenizer, CLIPImageProcessor

    run = make(method, model, **options)
    export(run, "transformers", tmp_path / "out")
    model, tokenize = (
        AutoModel.from_pretrained(tmp_path / "out").eval(),
        AutoTokenizer.from_pretrained(tmp_path / "out"),
    )
    inputs = tokenize(TEXTS, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        images = model.visual_projection(model.vision_model(normalize(PIXELS)).pooler_output)
        texts = model.text_projection(model.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)
        assert_same(embeds(run), (images, texts))
        both = model(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask, pixel_values=normalize(PIXELS))
    scale = load(run).method.scalars()["logit_scale"]
    cosines = F.normalize(embeds(run)[0], dim=-1) @ F.normalize(embeds(run)[1], dim=-1).T
    torch.testing.assert_close(both.logits_per_image, scale * cosines, rtol=0, atol=1e-3)
    own, lengths = load(run).tokenizer(TEXTS, 12)
    for text, ids, length in zip(inputs.input_ids.tolist(), own.tolist(), lengths.tolist()):
        assert text[:length] == ids[:length]
    inputs = CLIPImageProcessor.from_pretrained(tmp_path / "out")(Image.fromarray(np.zeros((40, 50, 3), np.uint8)))
    assert inputs["pixel_values"][0].shape == (3, 32, 32)


@pytest.mark.parametrize(("method", "model"), [("clip", RESNET), ("mct", CUSTOM_RESNET), ("uniclip", CUSTOM_RESNET)])
def test_timm_computes_the_same_features(make, tmp_path, method, model):
    import timm

    run = make(method, model)
    export(run, "timm", tmp_path / "out")
    kwargs = json.loads((tmp_path / "out/timm_model.json").read_text())
    trunk = timm.create_model(**kwargs, checkpoint_path=str(tmp_path / "out/model.safetensors")).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            trunk(normalize(PIXELS)), load(run).encoder().image_features(PIXELS), rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("method", "model", "options", "to", "message"),
    [
        ("uniclip", VIT, {}, "open_clip", "attention is bidirectional"),
        ("mct", VIT, {}, "transformers", "is not a pair of towers with linear heads"),
        ("declip", VIT, {"text-attention": "bidirectional"}, "open_clip", "attention is bidirectional"),
        ("declip", VIT, {"text-attention": "bidirectional"}, "transformers", "attention is bidirectional"),
        ("clip", CUSTOM_RESNET, {}, "open_clip", "with a custom architecture"),
        (
            "clip",
            SMALL,
            {},
            "transformers",
            "neither a plain ViT nor a model of timm; .* train a plain ViT, such as ViT-S-32",
        ),
        ("clip", VIT, {}, "timm", "is not a timm model"),
        ("clip", TIMM_VIT, {}, "transformers", "its image embeddings would differ"),
        ("oner", UNIFIED, {}, "timm", "needs the pooled features of an image tower"),
        ("clip", VIT, {}, "tflite", "--to is 'tflite'"),
    ],
)
def test_unsupported_models_are_rejected_and_leave_nothing(make, tmp_path, method, model, options, to, message):
    with pytest.raises(UserError, match=message):
        export(make(method, model, **options), to, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_with_different_embeddings_is_rejected(make, tmp_path, monkeypatch):
    """Whatever the cause; here the exported weights are tampered with."""
    from coalign.workflows.models import export as module

    def tampered(model_cfg, image, text, scale):
        config, state = original(model_cfg, image, text, scale)
        return config, state | {"text.ln_final.bias": state["text.ln_final.bias"] + 0.1}

    original = module.to_open_clip
    monkeypatch.setattr(module, "to_open_clip", tampered)
    with pytest.raises(UserError, match=r"its text embeddings \(such as of 'a photo of a dog'\) would differ by"):
        export(make(), "open_clip", tmp_path / "out")


def test_invalid_output_folders_raise(make, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        export(make(), "open_clip", tmp_path / "full")
    with pytest.raises(UserError, match=r"the folder .* does not exist"):
        export(make(), "open_clip", tmp_path / "none/out")


def test_card_describes_the_run_and_its_code_runs(make, trained, tmp_path, capsys, monkeypatch):
    text = card(trained)
    assert "Radford et al. 2021" in text
    assert re.search(r"Image → text R@1 \| [\d.]+ % \| [\d.]+–[\d.]+", text)
    assert str(Path(trained).parent) not in text
    assert "/" not in re.search(r"A `(.*?)` model", text)[1]
    precision = read_results(Path(trained))["run"]["precision"]
    assert precision in ("fp32", "bf16")
    assert f"- precision: {precision}\n" in text
    assert f'coalign.load("{Path(trained).name}")' in text
    assert "FOLDER" not in text
    assert "this model has the best weights" in card(trained, weights="best")
    assert "this model has" not in text
    several = card(trained, "onnx", similarity="projector", compares_cosines=False)  # as of OneR
    assert "similarity.onnx" in several
    assert "compares by the similarity projector" in several
    assert "similarity.onnx" not in card(trained, "onnx", similarity="projector")
    assert cli.main(["card", str(trained), "--out", str(tmp_path / "card.md")]) == 0
    assert (tmp_path / "card.md").read_text() == text
    monkeypatch.chdir(tmp_path)
    for library in ("open_clip", "transformers"):
        assert cli.main(["export", str(make()), "--to", library, "--out", library]) == 0
        written = (tmp_path / library / "README.md").read_text()
        code = re.search(r"```python\n(.*?)```", written, re.DOTALL)[1]
        exec(compile(code, library, "exec"), {})
    with pytest.raises(UserError, match="is not a run"):
        card(tmp_path)


def test_the_code_of_a_runs_card_embeds(trained, pairs, tmp_path, monkeypatch):
    shutil.copytree(trained, tmp_path / "my run")
    shutil.copy(next(Path(pairs).rglob("*.png")), tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(re.search(r"```python\n(.*?)```", card("my run"), re.DOTALL)[1], names)
    assert names["similarities"].shape == (1, 1)
    shutil.move("my run", 'my "run"')
    assert 'load("FOLDER")' in card('my "run"')


def test_export_without_transformers_raises(make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for to in ("transformers", "open_clip"):  # open_clip needs it for the tokenizer
        with pytest.raises(UserError, match=r'pip install "coalign\[hf\]"'):
            export(make(), to, tmp_path / "out")


# ---------------------------------------------------------------- ONNX


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "model"),
    [
        ("oner", UNIFIED),
        *((name, VIT) for name in ("clip", "slip", "declip", "uniclip", "mcd")),
        ("clip", CUSTOM_RESNET),
        ("mct", RESNET),
    ],
)
def test_onnx_computes_the_same_embeddings_for_any_batch_size(make, tmp_path, monkeypatch, method, model):
    """In a subprocess, as the exporter cannot trace the shape checks of these tests."""
    run, out = make(method, model), tmp_path / "out"
    similarity = "projector" if method == "oner" else None
    options = ["--similarity", similarity] if similarity else []
    process = tiny.start(["export", str(run), "--to", "onnx", "--out", str(out), *options])
    assert process.wait(timeout=300) == 0, process.stderr.read()
    assert not process.stderr.read()
    assert {path.name for path in out.iterdir()} == {
        "image.onnx", "text.onnx", "onnx_model.json", "tokenizer.json", "example.py", "coalign_run.json", "README.md",
        *(["joint.onnx"] if method == "oner" else []),
    }  # fmt: skip
    code = re.search("```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1]
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(code, "card", "exec"), names)
    ours, peer = load(run, similarity=similarity), open_eval_model(str(out)).encoder
    with torch.no_grad():
        for count in (1, 3):
            expected = ours.encoder().encode_image(PIXELS[:count])
            assert_same(
                [expected, expected],
                [peer.encode_image(PIXELS[:count]), torch.tensor(names["embed_images"](PIXELS[:count].numpy()))],
            )
        for texts in (TEXTS, TEXTS[:1], [""]):
            assert_same([ours.encoder().encode_text(texts)], [peer.encode_text(texts)])
        assert_same(
            [ours.encoder().encode_text(["two blue apples"])], [torch.tensor(names["embed_text"]("Two blue apples"))]
        )
        if method == "oner":
            ids, lengths = ours.tokenizer(TEXTS[:3], 12)
            joint = session(out / "joint.onnx")(pixels=PIXELS.numpy(), input_ids=ids.numpy())["embeds"]
            assert_same([ours.method.encode_joint(PIXELS, ids, lengths)], [torch.from_numpy(joint)])
    (out / "image.onnx").write_bytes((out / "image.onnx").read_bytes()[:3000])
    with pytest.raises(UserError, match=r"onnxruntime cannot load .*image.onnx"):
        open_eval_model(str(out))


def test_exported_values_may_differ_in_length_only_if_compared_by_cosines():
    values = torch.randn(3, 4)
    check_close(values, 2 * values, "embeddings", "ONNX")
    with pytest.raises(UserError, match=r"its embeddings would differ by 1\.0e\+00"):
        check_close(values, 2 * values, "embeddings", "ONNX", cosines=False)
    check_close(values, values * (1 + 1e-6), "embeddings", "ONNX", cosines=False)
