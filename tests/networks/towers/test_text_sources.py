"""Text towers of open_clip, by name or from a folder, compared with open_clip."""

import json

import open_clip
import pytest
import torch
from helpers import tiny
from safetensors.torch import save_file

from coalign.data.text.tokenizer import train_bpe
from coalign.errors import UserError
from coalign.networks.towers.composition import compose
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.towers.text import build_text_tower
from coalign.networks.towers.text_sources import pretrained_tokenizer, text_source

IDS = torch.tensor([[298, 5, 7, 299, 0], [298, 9, 299, 0, 0], [298, 299, 0, 0, 0]])
LENGTHS = torch.tensor([4, 3, 2])


def write_folder(folder, tokenizer=True, quick_gelu=False, **text_cfg):
    """Writes an open_clip model with random weights. Returns the model."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**tiny.MODEL, "text_cfg": {**tiny.MODEL["text_cfg"], **text_cfg}, "quick_gelu": quick_gelu}
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**config).eval()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    save_file(
        {key: value.contiguous() for key, value in model.state_dict().items()}, folder / "open_clip_model.safetensors"
    )
    if tokenizer:
        train_bpe([f"{color} {noun}" for color in tiny.COLORS for noun in tiny.NOUNS], 300).save(
            folder / "tokenizer.json"
        )
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("open_clip")
    write_folder(path)
    return path


def build(source, model_file, **changes):
    return build_text_tower(
        TowerSpec(str(model_file), **{"vocab_size": 300, "text_tower": str(source)} | changes)
    ).eval()


@pytest.mark.parametrize("quick_gelu", [False, True])
def test_equals_open_clip(tmp_path, model_file, quick_gelu):
    peer = write_folder(tmp_path, quick_gelu=quick_gelu, width=24)
    tower = build(tmp_path, model_file)
    padded = torch.nn.functional.pad(IDS, (0, 12 - IDS.shape[1]))
    ours = tower.projection(tower(IDS, LENGTHS).pooled)
    torch.testing.assert_close(ours, peer.encode_text(padded), atol=1e-5, rtol=1e-5)
    assert tower.starts == {"trunk": str(tmp_path), "projection": str(tmp_path)}
    assert tower.context_length == 12


def test_weights_of_a_model_by_name(folder, model_file, tmp_path, monkeypatch):
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "named", tiny.MODEL)
    file = folder / "open_clip_model.safetensors"
    named, own = (build(source, model_file) for source in (f"open_clip:named:{file}", folder))
    assert torch.equal(named(IDS, LENGTHS).pooled, own(IDS, LENGTHS).pooled)
    for weights, message in (
        ("laion9", "has no weights named 'laion9'"),
        ("", "needs weights"),
        ("gone.pt", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            build(f"open_clip:named:{weights}", model_file)


def test_half_precision_is_read_as_float32(folder, model_file, tmp_path):
    peer = write_folder(tmp_path)
    half = {key: value.half().contiguous() for key, value in peer.state_dict().items()}
    save_file(half, tmp_path / "open_clip_model.safetensors")
    tower = build(tmp_path, model_file)
    assert tower.transformer.token_embedding.weight.dtype == torch.float32
    assert torch.equal(tower.transformer.token_embedding.weight, peer.text.token_embedding.weight.half().float())


def test_projection_of_another_dimension_is_not_used(folder, model_file, tmp_path):
    wide = tmp_path / "wide.json"
    wide.write_text(json.dumps({**tiny.MODEL, "embed_dim": 24}))
    tower = build(folder, wide)
    assert tower.starts == {"trunk": str(folder)}
    assert tower.projection(tower(IDS, LENGTHS).pooled).shape == (3, 24)
    assert torch.equal(tower(IDS, LENGTHS).pooled, build(folder, model_file)(IDS, LENGTHS).pooled)


def test_longer_contexts_stretch_the_positions(folder, model_file):
    own, stretched = build(folder, model_file), build(folder, model_file, context_length=30)
    old, new = (tower.transformer.positional_embedding for tower in (own, stretched))
    assert new.shape == (30, 16)
    assert torch.equal(new[:3], old[:3])  # a quarter
    torch.testing.assert_close(new[-1], old[-1])
    expected = torch.nn.functional.interpolate(old[3:].T[None], size=27, mode="linear", align_corners=True)[0].T
    torch.testing.assert_close(new[3:], expected)
    ids = torch.tensor([[298, 5, 299]])
    assert torch.equal(stretched(ids, torch.tensor([3])).pooled, own(ids, torch.tensor([3])).pooled)
    assert stretched.starts["trunk"] == f"{folder} (12 positions stretched to 30, the first 3 unchanged)"
    shorter = build(folder, model_file, context_length=5).transformer.positional_embedding
    assert torch.equal(shorter, old[:5])


def test_mask_tokens_are_added(folder, model_file):
    tower, own = build(folder, model_file, vocab_size=301), build(folder, model_file)
    assert torch.equal(tower(IDS, LENGTHS).pooled, own(IDS, LENGTHS).pooled)
    assert tower(torch.tensor([[298, 300, 299]]), torch.tensor([3])).pooled.isfinite().all()


def test_the_fitting_tokenizer(folder, tmp_path):
    assert text_source(str(folder)).tokenizer == str(folder / "tokenizer.json")
    assert pretrained_tokenizer("ViT-B-32", str(folder)) == str(folder / "tokenizer.json")
    assert pretrained_tokenizer("ViT-B-32", str(folder / "open_clip_model.safetensors")) == str(
        folder / "tokenizer.json"
    )
    assert pretrained_tokenizer("ViT-B-32-quickgelu", "openai") == "clip"
    write_folder(tmp_path / "clip", tokenizer=False, vocab_size=49408)
    assert text_source(str(tmp_path / "clip")).tokenizer == "clip"
    write_folder(tmp_path / "other", tokenizer=False)
    assert text_source(str(tmp_path / "other")).tokenizer is None


@pytest.mark.parametrize(
    "text_cfg",
    [{"no_causal_mask": True}, {"pool_type": "last"}, {"proj_type": "none"}, {"embed_cls": True}, {"proj_bias": True}],
)
def test_towers_other_than_clips_are_rejected(tmp_path, text_cfg):
    config = {**tiny.MODEL, "text_cfg": {**tiny.MODEL["text_cfg"], **text_cfg}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    (tmp_path / "open_clip_model.safetensors").touch()
    with pytest.raises(UserError, match=r"is pooled or projected otherwise than CLIP's, which is not supported"):
        text_source(str(tmp_path))


def test_weights_that_do_not_fit_are_rejected(folder, model_file, tmp_path):
    with pytest.raises(UserError, match="have a vocabulary of 300 tokens, but the tokenizer has 310; omit --tokenizer"):
        build(folder, model_file, vocab_size=310)
    write_folder(tmp_path, layers=2)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"]["layers"] = 1
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"do not fit the text tower: transformer.resblocks.1.* is not a part of the model"
    ):
        build(tmp_path, model_file)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no weights; it needs open_clip_model\.safetensors"):
        text_source(str(tmp_path))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone", "The text tower gone does not exist; use hf:NAME"),
        ("empty", "The folder empty is not a text tower"),
        ("run", "The text tower run is not an encoder of Hugging Face: its config.json has no model_type"),
        ("list", "The text tower list is not an encoder of Hugging Face: its config.json has no model_type"),
        ("unknown", "cannot build a text encoder of type no-such: [^,]*$"),  # not hundreds of types
        ("open_clip/open_clip_model.safetensors", "is a file, which does not say how it is built; use its folder"),
        ("open_clip:wider.json:open_clip/open_clip_model.safetensors", "do not fit the text tower: Sizes of tensors"),
    ],
)
def test_unusable_sources_are_reported_in_one_sentence(tmp_path, monkeypatch, source, message):
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    write_folder(tmp_path / "open_clip")
    wider = {**tiny.MODEL, "text_cfg": {**tiny.MODEL["text_cfg"], "width": 24}}
    (tmp_path / "wider.json").write_text(json.dumps(wider))
    for name, config in (
        ("empty", None),
        ("run", {"method": "clip"}),
        ("list", [1]),
        ("unknown", {"model_type": "no-such"}),
    ):
        (tmp_path / name).mkdir()
        if config is not None:
            (tmp_path / name / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message) as error:
        build(source, tmp_path / "wider.json")
    assert "\n" not in str(error.value)


def test_the_shared_space_has_the_dimension_of_the_pretrained_projections(folder, tmp_path):
    """Of one, of both if they agree; else the default."""
    write_folder(tmp_path / "same")
    other = {**tiny.MODEL, "embed_dim": 24}
    (tmp_path / "other.json").write_text(json.dumps(other))
    dims = {
        source: compose(TowerSpec("tiny", 300, image_tower=source, text_tower=str(folder))).config["embed_dim"]
        for source in (
            "timm:test_vit", str(tmp_path / "same"),
            f"open_clip:{tmp_path}/other.json:{tmp_path}/same/open_clip_model.safetensors",
        )
    }  # fmt: skip
    assert list(dims.values()) == [16, 16, 512]
