"""Image towers from timm and open_clip: their features equal those of the library, with its own preprocessing."""

import json
from collections import OrderedDict

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from coalign.errors import UserError
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HALF = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 16, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 300, "width": 16, "heads": 2, "layers": 1}
CLIP = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
SQUASH = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"}


@pytest.fixture(autouse=True)
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.json").write_text(json.dumps({**CLIP, "embed_dim": 16}))
    torch.manual_seed(0)


def build(source, **changes):
    return build_image_tower(TowerSpec("model.json", 300, 12, image_tower=str(source), **changes)).eval()


def random_pixels(side):
    return torch.randint(256, (2, 3, side, side), dtype=torch.uint8)


def normalize(pixels, statistics):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in statistics)
    return (pixels / 255 - mean) / std


def trained(name, **options):
    """A model of timm whose weights and statistics are random."""
    model = timm.create_model(name, **options)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) * 0.1 + 0.05)
    return model.eval()


def tensors(model):
    return {name: value.contiguous() for name, value in model.state_dict().items()}


def foreign(state):
    """The weights as another library would name them, with its classifier and without the number of batches of BatchNorm."""
    kept = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    return OrderedDict((f"part{n}.{name.rpartition('.')[2]}", value) for n, (name, value) in enumerate(kept.items()))


@torch.no_grad()
def assert_features(tower, peer, statistics):
    pixels = random_pixels(tower.image_size)
    expected = peer.forward_head(peer.forward_features(normalize(pixels, statistics)), pre_logits=True)
    torch.testing.assert_close(tower(pixels).pooled, expected, atol=1e-4, rtol=1e-4)


# ---------------------------------------------------------------- timm


@pytest.mark.parametrize("name", ["test_efficientnet", "test_vit"])
@pytest.mark.parametrize("kind", ["own names", "foreign names", "training checkpoint", "half precision", "safetensors"])
def test_a_file_is_recognized_by_its_name_and_its_tensors(name, kind):
    peer = trained(name)
    state, file = tensors(peer), f"{name.replace('_', '-')}-57934424.pth"
    if kind == "foreign names":
        state = foreign(state)
    if kind == "training checkpoint":
        state = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in state.items()}, "optimizer": {}}
    if kind == "half precision":
        state = {key: value.to(torch.bfloat16) for key, value in state.items()}
        peer.load_state_dict(state)
    if kind == "safetensors":
        file = f"{name}.safetensors"
        save_file(state, file)
    else:
        torch.save(state, file, _use_new_zipfile_serialization=kind != "own names")  # both formats of PyTorch
    cfg = timm.get_pretrained_cfg(name)
    tower = build(file)
    assert tower.starts == {"trunk": file}
    assert (tower.preprocess.mean, tower.preprocess.std, tower.image_size) == (cfg.mean, cfg.std, cfg.input_size[1])
    assert all(tensor.dtype != torch.bfloat16 for tensor in tower.parameters())
    assert_features(tower, peer, (cfg.mean, cfg.std))


def test_a_file_whose_model_is_named():
    peer = trained("test_resnet")
    torch.save(foreign(tensors(peer)), "weights.bin")
    with pytest.raises(UserError, match=r"which model of timm it belongs to; name the model: timm:NAME:weights\.bin"):
        build("weights.bin")
    tower = build("timm:test_resnet:weights.bin")
    assert tower.preprocess.mean == pytest.approx(timm.get_pretrained_cfg("test_resnet").mean)
    assert_features(tower, peer, (tower.preprocess.mean, tower.preprocess.std))


def test_the_tag_in_a_files_name_has_its_preprocessing():
    """The same architecture was trained with several means."""
    name = "vit_tiny_patch16_224.augreg_in21k"
    save_file(tensors(timm.create_model("vit_tiny_patch16_224", num_classes=0)), f"{name}.safetensors")
    assert build(f"{name}.safetensors").preprocess.mean == timm.get_pretrained_cfg(name).mean == (0.5, 0.5, 0.5)


def test_a_folder_of_timm(tmp_path):
    peer = trained("test_efficientnet", num_classes=7)
    save_file(tensors(peer), "model.safetensors")
    cfg = {
        "mean": HALF[0],
        "std": HALF[1],
        "interpolation": "bilinear",
        "input_size": [3, 64, 64],
        "classifier": "classifier",
    }
    (tmp_path / "config.json").write_text(
        json.dumps({"architecture": "test_efficientnet", "num_classes": 7, "pretrained_cfg": cfg})
    )
    tower = build(tmp_path)
    assert (tower.image_size, tower.preprocess.interpolation) == (64, "bilinear")
    assert_features(tower, peer, HALF)


def test_positions_of_timms_transformers_are_resized():
    peer = trained("test_vit", num_classes=0)
    torch.save(peer.state_dict(), "test_vit.pth")
    tower = build("test_vit.pth", image_size=96)
    peer.set_input_size(img_size=96)
    assert_features(tower, peer, (tower.preprocess.mean, tower.preprocess.std))


def test_other_draws_do_not_depend_on_the_source():
    torch.save(tensors(trained("test_vit")), "test_vit.pth")
    states = []
    for source in ("test_vit.pth", None):
        torch.manual_seed(3)
        states.append(build_text_tower(TowerSpec("model.json", 300, 12, image_tower=source)).state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


# ---------------------------------------------------------------- open_clip


def write_open_clip(folder, config=CLIP, preprocess=None, **options):
    """A folder in open_clip's format. Returns open_clip's model."""
    torch.manual_seed(1)
    peer = open_clip.CustomTextCLIP(**config).eval()
    folder.mkdir()
    cfg = {"model_cfg": {**config, "custom_text": True}}
    (folder / "open_clip_config.json").write_text(
        json.dumps(cfg | ({"preprocess_cfg": preprocess} if preprocess else {}))
    )
    save_file(tensors(peer), folder / "open_clip_model.safetensors")
    return peer


@torch.no_grad()
def assert_embeds(tower, peer, statistics):
    pixels = random_pixels(tower.image_size)
    ours = tower.projection(tower(pixels).pooled)
    torch.testing.assert_close(ours, peer.encode_image(normalize(pixels, statistics)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("quick_gelu", [False, True])
@pytest.mark.parametrize("size", [32, 64])
def test_an_open_clip_folder_at_any_image_size(tmp_path, quick_gelu, size):
    """The other tower keeps its own activation."""
    write_open_clip(tmp_path / "clip", {**CLIP, "quick_gelu": quick_gelu}, SQUASH)
    (tmp_path / "model.json").write_text(json.dumps({**CLIP, "quick_gelu": not quick_gelu}))
    peer = open_clip.create_model(f"local-dir:{tmp_path / 'clip'}", force_image_size=size).eval()
    spec = TowerSpec("model.json", 300, 12, size, image_tower="clip")
    tower = build_image_tower(spec).eval()
    assert tower.starts == {"trunk": "clip", "projection": "clip"}
    assert tower.preprocess.to_json() == SQUASH
    assert_embeds(tower, peer, HALF)
    activation = type(build_text_tower(spec).transformer.transformer.resblocks[0].mlp.gelu).__name__
    assert activation == ("GELU" if quick_gelu else "QuickGELU")


def test_an_open_clip_file_needs_its_configuration(tmp_path):
    (tmp_path / "model.json").write_text(json.dumps(CLIP))
    peer = write_open_clip(tmp_path / "clip", preprocess=SQUASH)
    assert_embeds(build("clip/open_clip_model.safetensors"), peer, HALF)
    (tmp_path / "clip/open_clip_model.safetensors").rename("lone.safetensors")
    with pytest.raises(UserError, match=r"name the model: open_clip:NAME:lone\.safetensors"):
        build("lone.safetensors")
    (tmp_path / "named.json").write_text(json.dumps(CLIP))
    tower = build("open_clip:named.json:lone.safetensors")
    assert_embeds(tower, peer, (tower.preprocess.mean, tower.preprocess.std))


RESNET = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 64}
TIMM = {"image_size": 64, "timm_model_name": "test_resnet", "timm_pool": "avg", "timm_proj": "linear"}
TIMM_VIT = {"image_size": 64, "timm_model_name": "test_vit", "timm_pool": "map", "timm_proj": ""}


@pytest.mark.parametrize(("vision", "dim"), [(VISION, 24), (RESNET, 24), (TIMM, 24), (TIMM_VIT, 64)])
def test_a_projection_of_another_dimension_is_not_used(tmp_path, vision, dim):
    """The rest of the tower is. An image tower whose last layer is its projection is kept whole."""
    peer = write_open_clip(tmp_path / "clip", {**CLIP, "embed_dim": dim, "vision_cfg": vision})
    tower = build("clip")  # the model's embed_dim is 16
    assert tower.starts == {"trunk": "clip"}
    pixels = random_pixels(tower.image_size)
    x = normalize(pixels, (tower.preprocess.mean, tower.preprocess.std))
    with torch.no_grad():
        pooled = tower(pixels).pooled
        assert tower.projection(pooled).shape == (2, 16)
        if vision is VISION:
            expected = peer.visual.transformer(peer.visual._embeds(x))
            expected = peer.visual.ln_post(expected[:, 0])
        else:
            expected = peer.visual.trunk(x) if vision is TIMM else peer.encode_image(x)
        torch.testing.assert_close(pooled, expected, atol=1e-5, rtol=1e-5)
    (tmp_path / "model.json").write_text(json.dumps({**CLIP, "embed_dim": dim}))
    same = build("clip")
    assert same.starts == {"trunk": "clip", "projection": "clip"}
    assert_embeds(same, peer, (same.preprocess.mean, same.preprocess.std))


def test_a_tag_has_its_own_activation_and_preprocessing(tmp_path, monkeypatch):
    peer = write_open_clip(tmp_path / "peer", {**CLIP, "quick_gelu": True})
    (tmp_path / "named.json").write_text(json.dumps(CLIP))
    monkeypatch.setattr(open_clip, "list_pretrained_tags_by_model", lambda model: ["first"] * (model == "named.json"))
    monkeypatch.setattr(
        open_clip, "get_pretrained_cfg", lambda model, tag: {"quick_gelu": True, **SQUASH, "hf_hub": "x"}
    )
    monkeypatch.setattr(open_clip, "create_model", lambda model, pretrained, **_: {"first": peer}[pretrained])
    (tmp_path / "model.json").write_text(json.dumps(CLIP))
    tower = build("open_clip:named.json:first")
    assert tower.preprocess.to_json() == SQUASH
    assert_embeds(tower, peer, HALF)


def test_whole_models_start_with_their_preprocessing(tmp_path):
    peer = write_open_clip(tmp_path / "clip", preprocess=SQUASH)
    (tmp_path / "model.json").write_text(json.dumps(CLIP))
    for name in ("clip", "model.json"):
        spec = TowerSpec(name, 300, 12, pretrained="clip")
        tower, text = build_image_tower(spec).eval(), build_text_tower(spec)
        assert tower.preprocess.to_json() == SQUASH
        assert tower.starts == text.starts == {"trunk": "clip", "projection": "clip"}
        assert_embeds(tower, peer, HALF)


# ---------------------------------------------------------------- errors


class Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self):
        return open, ("executed", "w")


@pytest.fixture
def bad_files(tmp_path):
    state = tensors(timm.create_model("test_vit", num_classes=0))
    torch.save(state, "test_vit.pth")
    torch.save({"state_dict": state, "payload": Payload()}, "code_test_vit.pth")
    torch.save(timm.create_model("test_vit"), "whole_test_vit.pth")
    torch.save({"state_dict": {**state, "epoch": 3}}, "numbers.pth")
    torch.save({"weight": torch.zeros(3)}, "other_test_vit.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "test_vit.pth").read_bytes()[:5000])
    (tmp_path / "cut.safetensors").write_bytes(b"12345678")
    (tmp_path / "text.txt").write_text("weights")
    save_file({"visual.x": torch.zeros(1)}, "other.safetensors")
    (tmp_path / "empty").mkdir()
    (tmp_path / "no weights").mkdir()
    (tmp_path / "no weights/open_clip_config.json").write_text(json.dumps({"model_cfg": CLIP}))
    (tmp_path / "page.pth").write_text("<html>")
    (tmp_path / "no name").mkdir()
    (tmp_path / "no name/timm_model.json").write_text('{"model_name": 3}')
    save_file(state, "no name/model.safetensors")
    for name, config in (("no text", {**CLIP, "text_cfg": 3}), ("no vision", {**CLIP, "vision_cfg": 3})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        save_file(state, f"{name}/open_clip_model.safetensors")
    (tmp_path / "bad preprocessing").mkdir()
    bad = {"model_cfg": CLIP, "preprocess_cfg": {"mean": [0.5]}}
    (tmp_path / "bad preprocessing/open_clip_config.json").write_text(json.dumps(bad))
    save_file(state, "bad preprocessing/open_clip_model.safetensors")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.pth", r"gone\.pth does not exist"),
        ("timm:test_vit:gone.pth", r"gone\.pth does not exist"),
        ("test_vitt", "does not exist; use timm:NAME"),
        ("test_vit", "did you mean timm:test_vit?"),
        ("timm:test_vitt", "timm has no model named 'test_vitt'; did you mean test_vit"),
        ("timm:efficientnet_lite00", "did you mean efficientnet_lite0"),
        ("timm:test_vit.no_such_tag", "timm has no weights 'no_such_tag' of test_vit; use one of test_vit.r160_in1k"),
        ("timm:test_resnet:test_vit.pth", "test_vit.pth do not fit timm's test_resnet: "),
        ("timm:test_vit2:test_vit.pth", "do not fit timm's test_vit2: "),
        ("open_clip:ViT-B-32:no-such-tag", "ViT-B-32 has no weights named 'no-such-tag'; use open_clip:ViT-B-32:WEIGHTS"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32 needs weights"),
        ("open_clip:ViT-B-3:openai", "Unknown model 'ViT-B-3'; did you mean ViT-B-32"),
        ("open_clip:model.json:other.safetensors", r"do not fit the image tower of model\.json: .* is missing"),
        ("open_clip:model.json:test_vit.pth", "contain no image tower of open_clip"),
        ("code_test_vit.pth", "pickled objects other than tensors, which are never loaded"),
        ("whole_test_vit.pth", "pickled objects other than tensors, which are never loaded"),
        ("numbers.pth", "is not a dictionary of tensors"),
        ("other_test_vit.pth", r"belongs to \(it does not fit test_vit: .* is missing\); name the model: timm:NAME:other_test_vit"),
        ("cut.pth", r"cut\.pth cannot be read: .*; if it is cut off, download it again"),
        ("cut.safetensors", r"cut\.safetensors cannot be read: .*; if it is cut off, download it again"),
        ("text.txt", "has an unknown type; use one of .safetensors"),
        ("empty", "The folder empty is not an image tower: it has no open_clip_config.json"),
        ("no weights", r"The folder no weights has no weights; it needs open_clip_model\.safetensors"),
        ("page.pth", r"page\.pth is not a file of PyTorch; download it again"),
        ("no name", "timm has no model named '3'"),
        ("no text", "The configuration of .* lacks text_cfg"),
        ("no vision", "The configuration of .* lacks vision_cfg"),
        ("bad preprocessing", "is invalid: mean is .* must have three values"),
    ],
)  # fmt: skip
def test_unusable_sources_are_reported_in_one_sentence(bad_files, tmp_path, source, message):
    with pytest.raises(UserError, match=message) as error:
        build(source)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "executed").exists()


def test_whole_models_do_not_take_the_weights_of_one_encoder(tmp_path):
    save_file(tensors(timm.create_model("test_vit", num_classes=0)), "trunk.safetensors")
    for name in ("model.json", "timm:test_vit"):
        with pytest.raises(UserError, match=r"not a whole open_clip model of .*; use --image-tower"):
            build_image_tower(TowerSpec(name, 300, 12, pretrained="trunk.safetensors"))
