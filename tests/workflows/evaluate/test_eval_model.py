"""Evaluation of other libraries' models, with their preprocessing and ours, and of two callables."""

import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from helpers import tiny
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images
from coalign.evaluation.encoder_wrappers import cached, in_bfloat16, shard_texts
from coalign.types import DualEncoder
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.models.export import export

TEXTS = ["a red thing", "two blue apples", "", "gray " * 100]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for library in ("open_clip", "transformers"):
        export(trained, library, folder / library)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Images of several sizes and shapes, on which the preprocessing pipelines differ."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, shape in enumerate(((40, 60), (90, 50), (33, 32), (200, 300))):
        pixels = rng.integers(0, 256, (shape[0] // 8 + 1, shape[1] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC).save(folder / f"photo {number}.png")
    return folder


def embed(encoder, folder):
    source = open_source(str(folder))
    batches = image_batches(source, range(len(source)), encoder.image_size, preprocess=encoder.preprocess)
    return embed_images(encoder, batches).embeds


def load_images(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def assert_close(one, other, atol=1e-5):
    torch.testing.assert_close(F.normalize(one, dim=-1), F.normalize(other, dim=-1), rtol=0, atol=atol)


@torch.no_grad()
def test_open_clip_model_matches_the_library(exported, photos):
    name = f"local-dir:{exported / 'open_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    encoder = open_eval_model(str(exported / "open_clip")).encoder
    assert_close(embed(encoder, photos), model.encode_image(torch.stack([preprocess(i) for i in load_images(photos)])))
    assert_close(encoder.encode_text(TEXTS), model.encode_text(open_clip.get_tokenizer(name)(TEXTS)))
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "convnext_base"])
def test_named_open_clip_model_with_weights_from_a_file(tmp_path, photos, monkeypatch, name):
    """Shrunken models of open_clip's list: one that our text tower can represent, and one with a timm image tower."""
    config = open_clip.get_model_config(name)
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
    config["vision_cfg"] |= {"image_size": 64}
    if "layers" in config["vision_cfg"]:
        config["vision_cfg"] |= {"layers": 2, "width": 64, "head_width": 32}
    else:
        config["vision_cfg"] |= {"timm_model_name": "test_convnext"}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, name, config)
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    encoder = open_eval_model(f"open_clip:{name}:{tmp_path / 'weights.safetensors'}").encoder
    assert_close(embed(encoder, photos), model.encode_image(torch.stack([preprocess(i) for i in load_images(photos)])))
    assert_close(encoder.encode_text(TEXTS), model.encode_text(open_clip.get_tokenizer(name)(TEXTS)))


@torch.no_grad()
def test_transformers_model_matches_the_library(exported, photos):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = exported / "transformers"
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    encoder = open_eval_model(f"transformers:{folder}").encoder
    pixels = processor(load_images(photos), return_tensors="pt").pixel_values
    theirs = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert_close(embed(encoder, photos), theirs, atol=1e-4)  # the library does not round the resized pixels
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert_close(encoder.encode_text(TEXTS), model.text_projection(model.text_model(**inputs).pooler_output))


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_export_has_the_same_metrics_as_the_run(trained, exported, photos, library):
    for preprocess in ("coalign", library):
        tasks = [f"retrieval:{photos}"]
        ours = evaluate(str(trained), tasks, EvalConfig(preprocess=preprocess))
        theirs = evaluate(str(exported / library), tasks, EvalConfig(preprocess=preprocess))
        gaps = [results[tasks[0]]["metrics"].pop("modality_gap")["value"] for results in (ours, theirs)]
        assert gaps[0] == pytest.approx(gaps[1], abs=1e-4)
        assert ours == theirs
    one, other = (embed(open_eval_model(str(trained), preprocess=p).encoder, photos) for p in ("coalign", library))
    difference = float((one - other).abs().max())
    assert (
        difference == 0 if library == "open_clip" else 0 < difference < 0.2
    )  # transformers rounds and crops otherwise


def test_two_callables(pairs, tmp_path):
    encoder = DualEncoder(
        lambda pixels: pixels.float().mean((2, 3)), lambda texts: torch.rand(len(texts), 3), image_size=8
    )
    result = evaluate(encoder, [f"retrieval:{pairs}"])[f"retrieval:{pairs}"]
    assert (result["split"], result["images"]) == ("all", 64)
    for part in ("train", "test"):
        shutil.copytree(pairs, tmp_path / "split" / part)
    for kind, missing in (
        ("probe", "image features"),
        ("finetune", "its encoders"),
        ("finetune-retrieval", "its encoders"),
    ):
        with pytest.raises(UserError, match=f"does not expose {missing}"):
            evaluate(encoder, [f"{kind}:{tmp_path / 'split'}"])
    with pytest.raises(UserError, match="cannot embed an image and a text jointly, which guided needs"):
        evaluate(encoder, ["guided:scenes:8,size=32"])
    with pytest.raises(UserError, match="is not a coalign run; only runs support localization maps"):
        evaluate(encoder, ["localization:scenes:8,size=32"])


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("runs/nowhere", "runs/nowhere does not exist; the model must be"),
        ("open_clip:ViT-B-33", "'ViT-B-33' is neither an open_clip model nor a folder; did you mean"),
        (
            "open_clip:ViT-B-32:openai",
            "openai were trained with a different activation than ViT-B-32; use the model ViT-B-32-quickgelu",
        ),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32 needs weights; give open_clip:ViT-B-32:WEIGHTS with openai, "),
        ("open_clip:ViT-B-32:mine", "no weights named 'mine'"),
        ("open_clip:ViT-B-32:FOLDER/weights.pt", "no weights named"),
        ("open_clip:FOLDER", "is not an open_clip folder: it does not contain open_clip_config.json"),
        ("transformers:FOLDER", "transformers cannot load"),
        ("FOLDER/cut", "open_clip cannot load"),
        ("FOLDER/other", "open_clip cannot load"),
        ("FOLDER/pickled", "does not contain open_clip_model.safetensors or"),
        ("FOLDER/bert", "is a bert model; only a CLIPModel"),
    ],
)
def test_invalid_models_raise_one_line_errors(exported, tmp_path, capsys, model, message):
    class Payload:
        def __reduce__(self):
            return (open, (str(tmp_path / "unpickled"), "w"))

    torch.save(Payload(), tmp_path / "weights.pt")
    for name in ("cut", "other", "pickled"):
        shutil.copytree(exported / "open_clip", tmp_path / name)
    weights = tmp_path / "cut" / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    save_file({"visual.proj": torch.zeros(3, 3)}, tmp_path / "other" / "open_clip_model.safetensors")
    (tmp_path / "pickled" / "open_clip_model.safetensors").rename(tmp_path / "pickled" / "optimizer.safetensors")
    torch.save(Payload(), tmp_path / "pickled" / "open_clip_pytorch_model.bin")
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    given = model.replace("FOLDER", str(tmp_path))
    assert cli.main(["eval", given, "--tasks", "retrieval:scenes:8"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "unpickled").exists()


@torch.no_grad()
def test_text_tower_that_ours_cannot_represent(tmp_path, monkeypatch):
    """Its attention is bidirectional, and it pools the last position."""
    config = open_clip.get_model_config("ViT-S-32-alt")
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2, "no_causal_mask": True, "pool_type": "last"}
    config["vision_cfg"] |= {"image_size": 64, "layers": 2, "width": 64, "head_width": 32}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-S-32-alt", config)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    encoder = open_eval_model(f"open_clip:ViT-S-32-alt:{tmp_path / 'weights.safetensors'}").encoder
    assert_close(encoder.encode_text(TEXTS), model.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)))


def test_model_keeps_its_own_preprocessing(exported, tmp_path, photos):
    squash = shutil.copytree(exported / "open_clip", tmp_path / "squash")
    config = json.loads((squash / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": "squash", "interpolation": "bilinear"}
    (squash / "open_clip_config.json").write_text(json.dumps(config))
    own, named, ours = (
        embed(open_eval_model(str(squash), preprocess=name).encoder, photos) for name in (None, "open_clip", "coalign")
    )
    assert torch.equal(own, named)
    assert torch.allclose(own, ours, atol=1e-3)  # the same geometry, resized by another library
    shortest = embed(open_eval_model(str(exported / "open_clip")).encoder, photos)
    assert not torch.allclose(own, shortest, atol=1e-3)


def test_invalid_options_raise(trained, capsys):
    for option, value, message in (
        ("--epochs", "0", "--epochs is 0"),
        ("--preprocess", "pil", "--preprocess is 'pil'"),
        ("--precision", "fp8", "--precision is 'fp8'"),
    ):
        assert cli.main(["eval", str(trained), "--tasks", "retrieval:scenes:8", option, value]) == 2
        assert message in capsys.readouterr().err
    arguments = ["eval", str(trained), "--tasks", "localization:scenes:8", "--precision", "bf16"]
    assert cli.main(arguments) == 2
    assert "--precision bf16 is not supported by localization" in capsys.readouterr().err


# ---------------------------------------------------------------- encoder wrappers


def only_cached(encoder, failing, folder):
    """The cache of `encoder` in front of a model that fails on everything that is not cached."""
    allowed = [True]

    def image(pixels):
        return encoder.encode_image(pixels) if allowed[0] else failing.encode_image(pixels)

    wrapped = cached(replace(encoder, encode_image=image), folder)
    allowed[0] = False  # the model's fingerprint has been computed
    return wrapped


def test_cache_is_keyed_by_content(trained, pairs, tmp_path):
    task, folder = f"retrieval:{pairs}", tmp_path / "cache"
    first = evaluate(str(trained), [task], EvalConfig(cache=folder))
    assert first == evaluate(str(trained), [task])

    files = sorted(folder.iterdir())
    moved = shutil.copytree(pairs, tmp_path / "elsewhere")  # the same content under another name

    def must_not_be_called(_):
        raise AssertionError("encoded again")

    run = open_eval_model(str(trained)).run
    failing = replace(run.encoder(), encode_image=must_not_be_called, encode_text=must_not_be_called)
    source = open_source(str(moved))
    indices = assign_splits(source, 0.1)[0]["val"]
    images = embed_images(only_cached(run.encoder(), failing, folder), image_batches(source, indices, 32))
    assert torch.equal(images.embeds, embed_images(run.encoder(), image_batches(source, indices, 32)).embeds)
    assert sorted(folder.iterdir()) == files
    for path in files:
        path.write_bytes(path.read_bytes()[:20])  # truncated: computed again
    assert evaluate(str(trained), [task], EvalConfig(cache=folder)) == first


def test_cache_depends_on_every_weight_and_input(tmp_path):
    weights = {"w": torch.ones(3)}
    calls = []

    def encode(inputs):
        calls.append(inputs)
        return torch.ones(len(inputs), 3)

    model = DualEncoder(encode, encode, 4, image_features=encode, weights=lambda: weights)
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    def num_encoded(encode_again):
        """The number of encoded batches, without the two of the model's fingerprint."""
        calls.clear()
        encode_again()
        return len(calls) - 2

    assert num_encoded(lambda: cached(model, tmp_path).encode_image(pixels)) == 1
    assert num_encoded(lambda: cached(model, tmp_path).encode_image(pixels)) == 0
    pixels[0, 0, 0, 0] = 1
    assert num_encoded(lambda: cached(model, tmp_path).encode_image(pixels)) == 1
    assert num_encoded(lambda: cached(model, tmp_path).image_features(pixels)) == 1
    assert num_encoded(lambda: cached(model, tmp_path, "bf16").encode_image(pixels)) == 1
    for texts, expected in ((["ab", "c"], 1), (["a", "bc"], 1), (["ab", "c"], 0)):
        assert num_encoded(lambda texts=texts: cached(model, tmp_path).encode_text(texts)) == expected
    weights["w"][1] = 2
    assert num_encoded(lambda: cached(model, tmp_path).encode_image(pixels)) == 1
    with pytest.raises(UserError, match="does not expose its weights"):
        cached(replace(model, weights=None), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be created"):
        cached(model, tmp_path / "file" / "folder")


@torch.no_grad()
def test_cache_distinguishes_models_of_equal_weights(exported, tmp_path, photos):
    """Another activation changes no weight."""
    other = shutil.copytree(exported / "open_clip", tmp_path / "other")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (other / "open_clip_config.json").write_text(json.dumps(config))
    one, two = (open_eval_model(str(folder)).encoder for folder in (exported / "open_clip", other))
    embeds = [embed(cached(encoder, tmp_path / "cache"), photos) for encoder in (one, two)]
    assert torch.equal(embeds[0], embed(one, photos))
    assert torch.equal(embeds[1], embed(two, photos))
    assert not torch.equal(*embeds)


def test_bfloat16_is_rejected_if_it_changes_the_embeddings(trained, pairs):
    task = f"retrieval:{pairs}"
    lower, full = (evaluate(str(trained), [task], EvalConfig(precision=p))[task] for p in ("bf16", "fp32"))
    gaps = [results["metrics"]["modality_gap"]["value"] for results in (lower, full)]
    assert gaps[0] != gaps[1]
    assert gaps[0] == pytest.approx(gaps[1], abs=0.02)
    weight = torch.randn(12, 4)

    def cancels(pixels):  # differences of large numbers are lost in bfloat16
        x = pixels.float().flatten(1)[:, :12] / 255
        return (x + 1000) @ weight - (x * 0 + 1000) @ weight

    bad = in_bfloat16(DualEncoder(cancels, cancels, 4), "cpu")
    with pytest.raises(UserError, match="cannot be evaluated in bfloat16: the cosine between its image embeddings"):
        bad.encode_image(torch.randint(256, (4, 3, 4, 4), dtype=torch.uint8))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_texts_are_sharded(count):
    texts = [f"text {number}" for number in range(count)]
    model = DualEncoder(None, lambda batch: torch.tensor([[float(text[5:]), 1.0] for text in batch]), 4)
    parts = [model.encode_text(texts[rank::2]) for rank in range(2)] if count > 1 else []
    sharded = shard_texts(model, 0, 2, lambda own: [own, parts[1]])
    assert torch.equal(sharded.encode_text(texts), model.encode_text(texts))


@pytest.mark.slow
def test_two_processes_match_one(trained, tmp_path):
    data = tiny.write_pairs(tmp_path / "photos", 40)
    (data / "red" / "red_apple_standing.png").write_bytes(b"")
    tasks = ["--tasks", f"retrieval:{data}", f"zeroshot:{data}"]
    for count, out in ((1, tmp_path / "one.json"), (2, tmp_path / "two.json")):
        arguments = ["eval", str(trained), *tasks, "--json", str(out)]
        process = tiny.start(arguments, processes=count)
        assert process.wait(timeout=300) == 0, process.stderr.read()
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())


def test_coca(tmp_path):
    """Its text tower returns tokens beside the embedding."""
    cfg = open_clip.get_model_config("coca_ViT-B-32")
    cfg["vision_cfg"] |= {"layers": 1, "width": 64, "head_width": 32, "image_size": 32, "patch_size": 16}
    cfg["vision_cfg"] |= {"attn_pooler_heads": 2}
    cfg["text_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    cfg["multimodal_cfg"] |= {"layers": 1, "width": 64, "heads": 2}
    cfg["embed_dim"] = 64
    parts = ("embed_dim", "multimodal_cfg", "text_cfg", "vision_cfg")
    torch.manual_seed(0)
    peer = open_clip.CoCa(**{part: cfg[part] for part in parts}).eval()
    save_file({k: v.contiguous() for k, v in peer.state_dict().items()}, tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    encoder = open_eval_model(tmp_path).encoder
    with torch.no_grad():
        theirs = peer.encode_text(open_clip.tokenize(TEXTS, context_length=76), normalize=False)
        torch.testing.assert_close(encoder.encode_text(TEXTS), theirs, atol=1e-5, rtol=1e-5)


def test_similarity_of_a_run_is_replaced(oner, trained, tmp_path):
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    by_default, by_projector = (open_eval_model(oner, similarity=name) for name in (None, "projector"))
    assert not by_default.encoder.compares_cosines
    assert by_projector.encoder.compares_cosines
    assert by_projector.run.config.method_config.similarity == "projector"
    with torch.no_grad():
        assert by_default.encoder.encode_image(pixels)._fields == ("query", "key")
        embeds = by_projector.encoder.encode_image(pixels)
    torch.testing.assert_close(embeds.norm(dim=-1), torch.ones(3))
    with pytest.raises(UserError, match="similarity is 'cosine', but must be trained or projector"):
        open_eval_model(oner, similarity="cosine")
    with pytest.raises(UserError, match="already loaded"):
        open_eval_model(by_default.run, similarity="projector")


def test_similarity_needs_a_method_with_several(exported, trained, tmp_path, capsys):
    message = "clip has a single similarity; omit --similarity."
    for command in (
        ["eval", str(trained), "--tasks", "retrieval:photos"],
        ["export", str(trained), "--to", "onnx", "--out", str(tmp_path / "out")],
        ["space", str(trained), "--data", "photos", "--out", str(tmp_path / "space.png")],
    ):
        assert cli.main([*command, "--similarity", "projector"]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(UserError, match="has a single similarity"):
        open_eval_model(exported / "open_clip", similarity="projector")
