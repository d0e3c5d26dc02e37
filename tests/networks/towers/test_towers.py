import copy
import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file

from coalign.errors import UserError
from coalign.networks.batch_norm import GroupedBatchNorm2d, group_batch_norms
from coalign.networks.towers.image import build_image_tower
from coalign.networks.towers.pretrained import timm_part
from coalign.networks.towers.spec import TowerSpec, model_config, model_names
from coalign.networks.towers.text import build_text_tower

TINY = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def tiny(tmp_path):
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(TINY))
    return TowerSpec(str(path), vocab_size=49408)


def test_equals_open_clip(tiny):
    torch.manual_seed(0)
    peer = open_clip.CustomTextCLIP(**TINY).eval()
    image, text = build_image_tower(tiny).eval(), build_text_tower(tiny).eval()
    image.projection.weight.data = peer.visual.proj.data.T
    text.projection.weight.data = peer.text.text_projection.data.T
    image.trunk.load_state_dict({k: v for k, v in peer.visual.state_dict().items() if k != "proj"})
    text.transformer.load_state_dict(
        {k: v for k, v in peer.text.state_dict().items() if k not in ("text_projection", "attn_mask")}
    )
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    captions = ["a red apple", "!", "a very much longer caption about nothing in particular, and so on"]
    ids = open_clip.tokenize(captions)
    lengths = ids.argmax(1) + 1
    with torch.no_grad():
        torch.testing.assert_close(
            image.projection(image(pixels).pooled), peer.encode_image((pixels / 255 - mean) / std), atol=1e-5, rtol=1e-5
        )
        for trimmed in (ids, ids[:, : lengths.max()]):
            torch.testing.assert_close(
                text.projection(text(trimmed, lengths).pooled), peer.encode_text(ids), atol=1e-5, rtol=1e-5
            )


@pytest.mark.parametrize(
    ("attention", "pooling"),
    [
        ("causal", "end"),
        ("causal", "mean"),
        ("bidirectional", "start"),
        ("bidirectional", "end"),
        ("bidirectional", "mean"),
    ],
)
def test_captions_are_independent_of_batch_and_padding(tiny, attention, pooling):
    torch.manual_seed(0)
    tower = build_text_tower(tiny, attention, pooling).double()
    lengths = torch.randint(3, 60, (70,))
    ids = torch.randint(1, 49406, (70, 77))
    batched = tower(ids, lengths, with_tokens=True)
    assert batched.tokens.shape == (70, 77, 32)
    # id 0 is also the token "!", so padding is determined by length
    zeroed = torch.where(torch.arange(77) < lengths[:, None], ids, 0)
    torch.testing.assert_close(tower(zeroed, lengths).pooled, batched.pooled)
    for mine, their in zip(tower.dense_forward(ids, lengths, with_tokens=True), batched):
        torch.testing.assert_close(mine, their)
    # the last block computes only the pooled token
    torch.testing.assert_close(tower(ids, lengths).pooled, batched.pooled)
    for row in range(70):
        single = tower(ids[row : row + 1, : lengths[row]], lengths[row : row + 1], True)
        torch.testing.assert_close(batched.pooled[row], single.pooled[0])
        torch.testing.assert_close(batched.tokens[row, : lengths[row]], single.tokens[0])
        assert batched.tokens[row, lengths[row] :].abs().sum() == 0


def test_attention_direction(tiny):
    """With causal attention, no token depends on a later one; with bidirectional attention, the start token depends on the last."""
    ids = torch.randint(1, 49406, (1, 6))
    changed = ids.clone()
    changed[0, -1] += 1
    lengths = torch.tensor([6])
    causal, both = (
        build_text_tower(tiny, "causal", "end").double(),
        build_text_tower(tiny, "bidirectional", "start").double(),
    )
    torch.testing.assert_close(causal(ids, lengths, True).tokens[:, :-1], causal(changed, lengths, True).tokens[:, :-1])
    assert not torch.allclose(both(ids, lengths).pooled, both(changed, lengths).pooled)


def test_invalid_text_tower_arguments(tiny):
    with pytest.raises(ValueError, match="start token"):
        build_text_tower(tiny, "causal", "start")
    with pytest.raises(ValueError, match="78 tokens"):
        build_text_tower(tiny)(torch.zeros(1, 78, dtype=torch.long), torch.tensor([78]))


@pytest.mark.parametrize(
    ("name", "image_millions", "text_millions"),
    [("ViT-B-32", 87.85, 63.43), ("RN50", 38.32, 63.69), ("small", 3.11, 2.97), ("tiny", 0.27, 1.16)],
)
def test_parameter_counts(name, image_millions, text_millions):
    config = model_config(name)
    with torch.device("meta"):
        spec = TowerSpec(name, config["text_cfg"]["vocab_size"], config["text_cfg"]["context_length"])
        towers = build_image_tower(spec), build_text_tower(spec)
    for tower, millions in zip(towers, (image_millions, text_millions)):
        # RN50's text tower differs from ViT-B/32's by its projection to 1,024 dimensions
        assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.mark.slow
def test_every_open_clip_model_builds_or_raises_user_error():
    errors = {}
    for name in model_names():
        try:
            with torch.device("meta"):
                spec = TowerSpec(name, vocab_size=49408)
                build_image_tower(spec), build_text_tower(spec)
        except UserError as error:
            errors[name] = str(error)
    # the name, or its text tower on the hub
    assert all(name in message or "could not be loaded" in message for name, message in errors.items())
    assert len(model_names()) - len(errors) >= 70


@pytest.mark.parametrize(
    "vision",
    [
        {},
        {"pool_type": "avg"},
        {"final_ln_after_pool": True},
        {"no_ln_pre": True, "ls_init_value": 0.1},
        {"attentional_pool": True, "attn_pooler_queries": 5},
        {"qk_norm": True},
    ],
)
def test_image_tower_equals_open_clip(tmp_path, vision):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**TINY, "vision_cfg": {**TINY["vision_cfg"], **vision}}))
    torch.manual_seed(0)
    tower = build_image_tower(TowerSpec(str(path), vocab_size=100)).double()
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    expected = tower.trunk((pixels - tower.mean) / tower.std)
    torch.testing.assert_close(tower(pixels).pooled, expected)
    torch.testing.assert_close(tower.dense_forward(pixels).pooled, expected)


VARIANTS = [{}, {"pool_type": "avg"}, {"final_ln_after_pool": True}, {"ls_init_value": 0.1}, {"qk_norm": True}]


def vit_file(folder, **vision):
    path = folder / "model.json"
    path.write_text(json.dumps({**TINY, "vision_cfg": {**TINY["vision_cfg"], "image_size": 48, **vision}}))
    return str(path)


def random_pixels(size):
    return torch.randint(256, (3, 3, size, size), dtype=torch.uint8)


@pytest.mark.parametrize("vision", VARIANTS)
def test_patches_equal_open_clip(tmp_path, vision):
    torch.manual_seed(0)
    tower = build_image_tower(TowerSpec(vit_file(tmp_path, **vision), vocab_size=100)).double()
    for norm in (tower.trunk.ln_post, tower.trunk.ln_pre):
        torch.nn.init.normal_(norm.weight)  # so that a missing norm shows
    pixels = random_pixels(48)
    features = tower(pixels, with_patches=True)
    torch.testing.assert_close(features.pooled, tower(pixels).pooled)
    for mine, their in zip(tower.dense_forward(pixels, with_patches=True), features):
        torch.testing.assert_close(mine, their)
    options = {"indices": 1, "normalize_intermediates": True, "output_fmt": "NCHW"}
    peer = tower.trunk.forward_intermediates(tower.normalize(pixels), **options)
    assert features.patches.shape == (3, 3, 3, tower.patch_width)
    torch.testing.assert_close(features.patches, peer["image_intermediates"][0].permute(0, 2, 3, 1))


# our timm trunk and open_clip's adapter, convolutional and Transformer, channels first and last, with 1 and without prefix tokens
@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("tiny", 64),
        ("small", 64),
        ("convnext_tiny", 64),
        ("timm:vit_medium_patch16_gap_256", 64),
        ("timm:test_vit", 64),
        ("timm:test_efficientnet", 64),
        ("timm:swin_tiny_patch4_window7_224", 224),
        ("timm:mixer_s32_224", 224),
    ],
)
def test_patches_of_timm_trunks(name, size):
    torch.manual_seed(0)
    tower = build_image_tower(TowerSpec(name, vocab_size=100, image_size=size)).eval()
    pixels = random_pixels(size)
    with torch.no_grad():
        pooled, patches = tower(pixels, with_patches=True)
        assert torch.equal(pooled, tower(pixels).pooled)
    trunk = timm_part(tower.trunk)
    reduction = trunk.feature_info[-1]["reduction"] if hasattr(trunk, "feature_info") else 32
    assert patches.shape == (3, size // reduction, size // reduction, tower.patch_width)
    # changing the pixels of the bottom left quarter changes its patches most
    changed = pixels.clone()
    changed[..., -size // 2 :, : size // 2] ^= 255
    with torch.no_grad():
        change = (tower(changed, with_patches=True).patches - patches).square().sum(-1).mean(0)
    row, column = divmod(int(change.argmax()), change.shape[1])
    assert row >= change.shape[0] / 2 > column
    assert change[row, column] > 2 * change[0, -1]


@pytest.mark.parametrize("name", ["tiny", "timm:test_efficientnet"])
def test_patches_average_to_the_pooled_output(name):
    torch.manual_seed(0)
    features = build_image_tower(TowerSpec(name, vocab_size=100)).eval()(random_pixels(64), with_patches=True)
    torch.testing.assert_close(features.patches.mean((1, 2)), features.pooled)


def test_patches_of_open_clips_resnet(tmp_path):
    path = tmp_path / "resnet.json"
    vision = {"image_size": 64, "layers": [1, 1, 1, 1], "width": 16, "patch_size": None, "head_width": 64}
    path.write_text(json.dumps({**TINY, "vision_cfg": vision}))
    torch.manual_seed(0)
    tower = build_image_tower(TowerSpec(str(path), vocab_size=100)).eval()
    maps, pixels = [], random_pixels(64)
    with torch.no_grad():
        pooled, patches = tower(pixels, with_patches=True)
        handle = tower.trunk.layer4.register_forward_hook(lambda module, inputs, output: maps.append(output))
        assert torch.equal(pooled, tower(pixels).pooled)
        handle.remove()
    assert patches.shape == (3, 2, 2, tower.patch_width)
    assert torch.equal(patches, maps[0].permute(0, 2, 3, 1))


def test_towers_without_patches(tmp_path):
    pooler = {"attentional_pool": True, "attn_pooler_queries": 5}
    tower = build_image_tower(TowerSpec(vit_file(tmp_path, **pooler), vocab_size=100))
    with pytest.raises(UserError, match="no patch features: its trunk, a VisionTransformer"):
        tower(random_pixels(48), with_patches=True)
    with pytest.raises(UserError, match="no patch features"):
        tower.patch_width  # noqa: B018
    tower = build_image_tower(TowerSpec("timm:crossvit_9_240", vocab_size=100, image_size=240))
    with pytest.raises(UserError, match="no patch features: its trunk, a CrossVit"):
        tower(random_pixels(240), with_patches=True)


def test_text_towers_with_other_attention_are_rejected(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({**TINY, "text_cfg": {**TINY["text_cfg"], "scale_heads": True}}))
    with pytest.raises(UserError, match=r"model\.json has norms or scales inside its attention"):
        build_text_tower(TowerSpec(str(path), vocab_size=100))


def test_timm_trunk_with_image_size():
    tower = build_image_tower(TowerSpec("timm:test_vit", vocab_size=100, image_size=96))
    assert tower(torch.zeros(2, 3, 96, 96, dtype=torch.uint8)).pooled.shape == (2, tower.width)


def test_timm_trunk_whose_head_widens_the_features():
    tower = build_image_tower(TowerSpec("timm:mobilenetv3_small_050", vocab_size=100)).eval()
    pooled, patches = tower(random_pixels(64), with_patches=True)
    assert tower.projection(pooled).shape == (3, tower.embed_dim)
    assert patches.shape[-1] == tower.patch_width != tower.width


def test_pretrained_weights_from_a_file(tiny, tmp_path):
    torch.manual_seed(0)
    peer = open_clip.CustomTextCLIP(**TINY).eval()
    file = tmp_path / "peer.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in peer.state_dict().items()}, file)
    # with an embedding for [MASK] and a shorter context
    spec = replace(tiny, pretrained=str(file), vocab_size=49409, context_length=20)
    image, text = build_image_tower(spec).eval(), build_text_tower(spec).eval()
    ids = open_clip.tokenize(["a red apple", "two dogs"])
    pixels = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        theirs = peer.encode_image((pixels - image.mean) / image.std)
        torch.testing.assert_close(image.projection(image(pixels).pooled), theirs, atol=1e-5, rtol=1e-5)
        ours = text.projection(text(ids[:, :20], ids.argmax(1) + 1).pooled)
        torch.testing.assert_close(ours, peer.encode_text(ids), atol=1e-5, rtol=1e-5)
    for changes, message in (
        ({"vocab_size": 8192}, "have a vocabulary of 49,408 tokens, but the tokenizer has 8,192; omit --tokenizer"),
        ({"pretrained": "gone.safetensors"}, r"gone\.safetensors does not exist"),
        ({"pretrained": "laion2b"}, "no pretrained weights named 'laion2b'"),
        ({"name": "ViT-B-32"}, "do not fit ViT-B-32"),
    ):
        with pytest.raises(UserError, match=message):
            build_text_tower(replace(spec, **changes))


def test_patches_cover_the_image(model_file):
    """A convolution over patches would ignore the rest without a word."""
    for name in (str(model_file), "timm:test_vit"):
        with pytest.raises(UserError, match=r"do not cover images of 99; use a multiple, such as --image-size 9"):
            build_image_tower(TowerSpec(name, 300, image_size=99))
    assert build_image_tower(TowerSpec("timm:test_vit", 300, image_size=96)).image_size == 96
    assert build_image_tower(TowerSpec("tiny", 300, image_size=100)).image_size == 100


def test_weights_that_cannot_be_downloaded():
    with pytest.raises(UserError, match=r"laion2b_s34b_b79k of ViT-B-32 could not be downloaded"):
        build_image_tower(TowerSpec("ViT-B-32", 49408, pretrained="laion2b_s34b_b79k"))


def test_unknown_models(tmp_path):
    for name, message in (
        ("ViT-B32", "ViT-B-32"),
        ("nonsense-xyz", "coalign models"),
        ("timm:resnet51x", "resnet"),
        ("gone.json", "does not exist"),
    ):
        with pytest.raises(UserError, match=message):
            model_config(name)
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        model_config(str(bad))
    bad.write_text("{}")
    with pytest.raises(UserError, match="embed_dim"):
        model_config(str(bad))


def test_grouped_batch_norm():
    torch.manual_seed(0)
    grouped = GroupedBatchNorm2d(4, group=3, eps=1e-5, momentum=0.1).double()
    x = torch.randn(6, 4, 5, 5, dtype=torch.float64)
    peer = torch.nn.BatchNorm2d(4).double()
    torch.testing.assert_close(grouped(x), torch.cat([peer(x[:3]), peer(x[3:])]))
    assert grouped.running_mean.abs().max() == 0  # unchanged until move_statistics
    grouped.take_statistics()
    assert grouped.running_mean.abs().max() == 0
    with torch.no_grad():
        grouped(x)  # gradient caching's pass without gradient does not count
    grouped(x[:3]), grouped(x[3:])
    grouped.move_statistics(grouped.take_statistics())
    means = torch.stack([x[:3].mean((0, 2, 3)), x[3:].mean((0, 2, 3))]).mean(0)
    torch.testing.assert_close(grouped.running_mean, 0.1 * means)
    with pytest.raises(ValueError, match="multiple"):
        grouped(x[:4])


# timm's BatchNorm is a layer of its own in a ResNet; in the others it includes dropout and activation
@pytest.mark.parametrize("name", ["test_resnet", "test_byobnet", "test_efficientnet", "regnety_002"])
def test_grouped_batch_norms_compute_and_are_named_as_timms(name):
    torch.manual_seed(0)
    peer = timm.create_model(name, num_classes=0)
    grouped = group_batch_norms(copy.deepcopy(peer), group=4)
    assert any(isinstance(module, GroupedBatchNorm2d) for module in grouped.modules())
    assert {key: value.shape for key, value in grouped.state_dict().items()} == {
        key: value.shape for key, value in peer.state_dict().items()
    }
    x = torch.randn(4, 3, 64, 64)
    torch.testing.assert_close(grouped.train()(x), peer.train()(x), atol=1e-4, rtol=1e-4)
    peer.load_state_dict(grouped.state_dict())
    torch.testing.assert_close(grouped.eval()(x), peer.eval()(x))
