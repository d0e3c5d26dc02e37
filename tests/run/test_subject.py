"""What can be evaluated besides a run: other libraries' models, with their preprocessing and ours, and pairs of callables."""

import json
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import tiny
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F

from coalign import cli
from coalign.data.evaluation_views import image_batches
from coalign.data.sources import open_source
from coalign.data.splits import assign_splits
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images
from coalign.evaluation.encoders import cached, in_bfloat16, shared_texts
from coalign.run.evaluate import evaluate
from coalign.run.export import export
from coalign.run.subject import open_subject
from coalign.types import DualEncoder

TEXTS = ["a red thing", "two blue apples", "", "grey " * 100]


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    for library in ("open_clip", "transformers"):
        export(trained, library, folder / library)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Pictures of several sizes and shapes, which no two ways of resizing treat alike."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, shape in enumerate(((40, 60), (90, 50), (33, 32), (200, 300))):
        pixels = rng.integers(0, 256, (shape[0] // 8 + 1, shape[1] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC).save(folder / f"picture {number}.png")
    return folder


def embed(encoder, folder):
    source = open_source(str(folder))
    batches = image_batches(source, range(len(source)), encoder.image_size, preprocess=encoder.preprocess)
    return embed_images(encoder, batches).embeds


def pictures(folder):
    return [Image.open(path).convert("RGB") for path in sorted(folder.iterdir())]


def assert_close(one, other, atol=1e-5):
    torch.testing.assert_close(F.normalize(one, dim=-1), F.normalize(other, dim=-1), rtol=0, atol=atol)


@torch.no_grad()
def test_an_open_clip_model_gives_what_the_library_gives(exported, photos):
    name = f"local-dir:{exported / 'open_clip'}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    encoder = open_subject(str(exported / "open_clip")).encoder
    assert_close(embed(encoder, photos), model.encode_image(torch.stack([preprocess(i) for i in pictures(photos)])))
    assert_close(encoder.encode_text(TEXTS), model.encode_text(open_clip.get_tokenizer(name)(TEXTS)))
    assert encoder.logit_scale == pytest.approx(float(model.logit_scale.exp()))


@torch.no_grad()
@pytest.mark.parametrize("name", ["ViT-S-32-alt", "convnext_base"])
def test_a_named_open_clip_model_with_weights_of_a_file(tmp_path, photos, monkeypatch, name):
    """A model of open_clip's list, shrunken: one that our text tower can stand for, and a timm image tower."""
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
    encoder = open_subject(f"open_clip:{name}:{tmp_path / 'weights.safetensors'}").encoder
    assert_close(embed(encoder, photos), model.encode_image(torch.stack([preprocess(i) for i in pictures(photos)])))
    assert_close(encoder.encode_text(TEXTS), model.encode_text(open_clip.get_tokenizer(name)(TEXTS)))


@torch.no_grad()
def test_a_model_of_transformers_gives_what_the_library_gives(exported, photos):
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel

    folder = exported / "transformers"
    model, processor = CLIPModel.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)
    encoder = open_subject(f"transformers:{folder}").encoder
    pixels = processor(pictures(photos), return_tensors="pt").pixel_values
    theirs = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert_close(embed(encoder, photos), theirs, atol=1e-4)  # the library does not round the resized pixels
    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, truncation=True, return_tensors="pt")
    assert_close(encoder.encode_text(TEXTS), model.text_projection(model.text_model(**inputs).pooler_output))


@pytest.mark.parametrize("library", ["open_clip", "transformers"])
def test_an_export_has_the_runs_figures_under_either_preprocessing(trained, exported, photos, library):
    for preprocess in ("coalign", library):
        tasks = [f"retrieval:{photos}"]
        ours = evaluate(str(trained), tasks, preprocess=preprocess)
        theirs = evaluate(str(exported / library), tasks, preprocess=preprocess)
        assert ours == {task: {**values, "modality_gap": ours[task]["modality_gap"]} for task, values in theirs.items()}
        assert ours[tasks[0]]["modality_gap"] == pytest.approx(theirs[tasks[0]]["modality_gap"], abs=1e-4)
    one, other = (embed(open_subject(str(trained), preprocess=p).encoder, photos) for p in ("coalign", library))
    assert 0 < (one - other).abs().max() < 0.2  # they do differ


def test_two_callables(pairs, tmp_path):
    encoder = DualEncoder(
        lambda pixels: pixels.float().mean((2, 3)), lambda texts: torch.rand(len(texts), 3), image_size=8
    )
    result = evaluate(encoder, [f"retrieval:{pairs}"])[f"retrieval:{pairs}"]
    assert (result["split"], result["images"]) == ("all", 64)
    for part in ("train", "test"):
        shutil.copytree(pairs, tmp_path / "split" / part)
    for kind, what in (
        ("probe", "its image features"),
        ("finetune", "its encoders"),
        ("finetune-retrieval", "its encoders"),
    ):
        with pytest.raises(UserError, match=f"does not give {what}"):
            evaluate(encoder, [f"{kind}:{tmp_path / 'split'}"])
    with pytest.raises(UserError, match="no run of coalign's, which alone can be asked for image and text as one"):
        evaluate(encoder, ["guided:scenes:8,size=32"])
    with pytest.raises(UserError, match="no run of coalign's, which alone can be asked for maps"):
        evaluate(encoder, ["localization:scenes:8,size=32"])


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("runs/nowhere", "runs/nowhere does not exist; a model is"),
        ("open_clip:ViT-B-33", "no model named 'ViT-B-33', nor is there such a folder; did you mean"),
        (
            "open_clip:ViT-B-32:openai",
            "openai were trained with the activation of ViT-B-32-quickgelu; use this model's name",
        ),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32 needs weights; give open_clip:ViT-B-32:WEIGHTS with openai, "),
        ("open_clip:ViT-B-32:mine", "no weights named 'mine'"),
        ("open_clip:ViT-B-32:FOLDER/weights.pt", "no weights named"),
        ("open_clip:FOLDER", "is no folder of open_clip's: there is no open_clip_config.json"),
        ("transformers:FOLDER", "transformers cannot load"),
        ("FOLDER/cut", "open_clip cannot load"),
        ("FOLDER/other", "open_clip cannot load"),
        ("FOLDER/pickled", "holds no weights in open_clip_model.safetensors or"),
        ("FOLDER/bert", "is a bert, not a CLIPModel"),
    ],
)
def test_what_is_no_model_is_a_sentence(exported, tmp_path, capsys, model, words):
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
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "unpickled").exists()


@torch.no_grad()
def test_a_text_tower_that_ours_cannot_stand_for(tmp_path, monkeypatch):
    """It attends both ways, and is read at its last position."""
    config = open_clip.get_model_config("ViT-S-32-alt")
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2, "no_causal_mask": True, "pool_type": "last"}
    config["vision_cfg"] |= {"image_size": 64, "layers": 2, "width": 64, "head_width": 32}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "ViT-S-32-alt", config)
    model = open_clip.create_model("ViT-S-32-alt").eval()
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "weights.safetensors")
    encoder = open_subject(f"open_clip:ViT-S-32-alt:{tmp_path / 'weights.safetensors'}").encoder
    assert_close(encoder.encode_text(TEXTS), model.encode_text(open_clip.get_tokenizer("ViT-S-32-alt")(TEXTS)))


def test_a_library_keeps_its_models_own_preprocessing(exported, tmp_path, photos):
    squash = shutil.copytree(exported / "open_clip", tmp_path / "squash")
    config = json.loads((squash / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= {"resize_mode": "squash", "interpolation": "bilinear"}
    (squash / "open_clip_config.json").write_text(json.dumps(config))
    own, named, other = (
        embed(open_subject(str(squash), preprocess=name).encoder, photos) for name in (None, "open_clip", "coalign")
    )
    assert torch.equal(own, named)
    assert not torch.allclose(own, other, atol=1e-3)


def test_wrong_words(trained, capsys):
    for option, value, words in (
        ("--epochs", "0", "--epochs is 0"),
        ("--preprocess", "pil", "There is no preprocessing 'pil'"),
        ("--precision", "fp8", "--precision is 'fp8'"),
    ):
        assert cli.main(["eval", str(trained), "--tasks", "retrieval:scenes:8", option, value]) == 2
        assert words in capsys.readouterr().err
    words = ["eval", str(trained), "--tasks", "localization:scenes:8", "--precision", "bf16"]
    assert cli.main(words) == 2
    assert "--precision bf16 is for embeddings alone" in capsys.readouterr().err


# ---------------------------------------------------------------- ways to encode


def only_kept(encoder, silent, folder):
    """The cache of `encoder`, before a model that may not be asked for anything that is not in it."""
    allowed = [True]

    def image(pixels):
        return encoder.encode_image(pixels) if allowed[0] else silent.encode_image(pixels)

    found = cached(replace(encoder, encode_image=image), folder)
    allowed[0] = False  # the sample that tells models apart has been taken
    return found


def test_kept_embeddings_are_found_by_content(trained, pairs, tmp_path):
    task, folder = f"retrieval:{pairs}", tmp_path / "cache"
    first = evaluate(str(trained), [task], cache=folder)
    assert first == evaluate(str(trained), [task])

    kept = sorted(folder.iterdir())
    moved = shutil.copytree(pairs, tmp_path / "elsewhere")  # the same content under another name

    def must_not_be_called(_):
        raise AssertionError("encoded again")

    run = open_subject(str(trained)).run
    silent = replace(run.encoder(), encode_image=must_not_be_called, encode_text=must_not_be_called)
    source = open_source(str(moved))
    indices = assign_splits(source, 0.1)[0]["val"]
    found = embed_images(only_kept(run.encoder(), silent, folder), image_batches(source, indices, 32))
    assert torch.equal(found.embeds, embed_images(run.encoder(), image_batches(source, indices, 32)).embeds)
    assert sorted(folder.iterdir()) == kept
    for path in kept:
        path.write_bytes(path.read_bytes()[:20])  # cut off: made again
    assert evaluate(str(trained), [task], cache=folder) == first


def test_kept_embeddings_depend_on_every_weight_and_input(tmp_path):
    weights = {"w": torch.ones(3)}
    calls = []

    def encode(inputs):
        calls.append(inputs)
        return torch.ones(len(inputs), 3)

    model = DualEncoder(encode, encode, 4, image_features=encode, weights=lambda: weights)
    pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)

    def made(encode_again):
        """How many inputs are encoded beside the two that tell models apart."""
        calls.clear()
        encode_again()
        return len(calls) - 2

    assert made(lambda: cached(model, tmp_path).encode_image(pixels)) == 1
    assert made(lambda: cached(model, tmp_path).encode_image(pixels)) == 0
    pixels[0, 0, 0, 0] = 1
    assert made(lambda: cached(model, tmp_path).encode_image(pixels)) == 1
    assert made(lambda: cached(model, tmp_path).image_features(pixels)) == 1
    assert made(lambda: cached(model, tmp_path, "bf16").encode_image(pixels)) == 1
    for texts, expected in ((["ab", "c"], 1), (["a", "bc"], 1), (["ab", "c"], 0)):
        assert made(lambda texts=texts: cached(model, tmp_path).encode_text(texts)) == expected
    weights["w"][1] = 2
    assert made(lambda: cached(model, tmp_path).encode_image(pixels)) == 1
    with pytest.raises(UserError, match="does not show its weights"):
        cached(replace(model, weights=None), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be made"):
        cached(model, tmp_path / "file" / "folder")


@torch.no_grad()
def test_models_of_equal_weights_are_told_apart(exported, tmp_path, photos):
    """Another activation changes no weight."""
    other = shutil.copytree(exported / "open_clip", tmp_path / "other")
    config = json.loads((other / "open_clip_config.json").read_text())
    config["model_cfg"]["quick_gelu"] = True
    (other / "open_clip_config.json").write_text(json.dumps(config))
    one, two = (open_subject(str(folder)).encoder for folder in (exported / "open_clip", other))
    kept = [embed(cached(encoder, tmp_path / "cache"), photos) for encoder in (one, two)]
    assert torch.equal(kept[0], embed(one, photos))
    assert torch.equal(kept[1], embed(two, photos))
    assert not torch.equal(*kept)


def test_bfloat16_is_refused_where_it_gives_something_else(trained, pairs):
    task = f"retrieval:{pairs}"
    lower, full = (evaluate(str(trained), [task], precision=p)[task] for p in ("bf16", "fp32"))
    assert lower["modality_gap"] != full["modality_gap"]
    assert lower["modality_gap"] == pytest.approx(full["modality_gap"], abs=0.02)
    weight = torch.randn(12, 4)

    def cancels(pixels):  # what is left of large numbers is lost in bfloat16
        x = pixels.float().flatten(1)[:, :12] / 255
        return (x + 1000) @ weight - (x * 0 + 1000) @ weight

    bad = in_bfloat16(DualEncoder(cancels, cancels, 4), "cpu")
    with pytest.raises(UserError, match="cannot be evaluated in bfloat16: its embeddings of images have a cosine of"):
        bad.encode_image(torch.randint(256, (4, 3, 4, 4), dtype=torch.uint8))


@pytest.mark.parametrize("count", [1, 2, 7])
def test_texts_are_shared(count):
    texts = [f"text {number}" for number in range(count)]
    model = DualEncoder(None, lambda words: torch.tensor([[float(word[5:]), 1.0] for word in words]), 4)
    parts = [model.encode_text(texts[rank::2]) for rank in range(2)] if count > 1 else []
    shared = shared_texts(model, 0, 2, lambda own: [own, parts[1]])
    assert torch.equal(shared.encode_text(texts), model.encode_text(texts))


@pytest.mark.slow
def test_two_processes_find_what_one_does(trained, tmp_path):
    data = tiny.write_pairs(tmp_path / "photos", 40)
    (data / "red" / "red_apple_standing.png").write_bytes(b"")
    tasks = ["--tasks", f"retrieval:{data}", f"zeroshot:{data}"]
    for count, out in ((1, tmp_path / "one.json"), (2, tmp_path / "two.json")):
        words = ["eval", str(trained), *tasks, "--json", str(out)]
        process = tiny.start(words, processes=count)
        assert process.wait(timeout=300) == 0, process.stderr.read()
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())


def test_coca(tmp_path):
    """Its text tower gives tokens beside the embedding."""
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
    encoder = open_subject(tmp_path).encoder
    with torch.no_grad():
        theirs = peer.encode_text(open_clip.tokenize(TEXTS, context_length=76), normalize=False)
        torch.testing.assert_close(encoder.encode_text(TEXTS), theirs, atol=1e-5, rtol=1e-5)
