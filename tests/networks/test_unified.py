import json
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.towers.spec import TowerSpec
from coalign.networks.unified import States, attend, build_unified_tower, grid_positions, join, pool

VISION = {"image_size": 32, "layers": 2, "width": 32, "patch_size": 8, "head_width": 16}
TEXT = {"context_length": 12, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}


def build(folder, image_size=None, vision=None, **spec):
    path = folder / "model.json"
    path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": {**VISION, **(vision or {})}, "text_cfg": TEXT}))
    torch.manual_seed(0)
    return build_unified_tower(TowerSpec(str(path), 50, 12, image_size, **spec), masks_patches=True).double()


@pytest.fixture
def tower(tmp_path):
    return build(tmp_path)


def pixels(count, size=32, seed=0):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


IDS, LENGTHS = torch.randint(1, 48, (3, 9), generator=torch.Generator().manual_seed(1)), torch.tensor([9, 2, 5])


# ---------------------------------------------------------------- positions and sizes


def test_position_tables_equal_mae_and_mocov3(oracles):
    oracle = oracles("positions")
    torch.testing.assert_close(grid_positions(4, 4, 16), oracle["mae_sincos.out.pos_4_16"], rtol=0, atol=1e-12)
    theirs = oracle["mocov3_sincos.out.pos_4x4_16"][0, 1:].view(4, 4, 16).transpose(0, 1)  # column by column
    torch.testing.assert_close(grid_positions(4, 4, 16).float(), theirs.reshape(16, 16), rtol=0, atol=1e-6)


def test_word_positions_are_sinusoids(tower):
    for position, row in enumerate(tower.word_positions.tolist()):
        angles = [position / 10000 ** (2 * k / 32) for k in range(16)]
        assert row == pytest.approx([*map(math.sin, angles), *map(math.cos, angles)], abs=1e-6)


@pytest.mark.parametrize("side", [6, 12, 24])
def test_positions_at_another_size_match_interpolation(side):
    own = grid_positions(12, 12, 64).T.view(1, 64, 12, 12)
    theirs = F.interpolate(own, size=(side, side), mode="bicubic", align_corners=False)
    ours = grid_positions(side, 12, 64).T.view(1, 64, side, side)
    # interpolation extrapolates at the border
    inner = (..., slice(side // 6, -side // 6), slice(side // 6, -side // 6))
    assert (ours - theirs)[inner].abs().max() < 0.05
    assert (ours - grid_positions(side, side, 64).T.view(1, 64, side, side)).abs().max() > 0.5 or side == 12


def test_weights_load_at_any_size(tmp_path, tower):
    larger = build(tmp_path, image_size=64)
    assert (tower.patch_grid, larger.patch_grid) == ((4, 4), (8, 8))
    larger.load_state_dict(tower.state_dict())
    small = pixels(2)
    large = F.interpolate(small.double(), scale_factor=2, mode="nearest").to(torch.uint8)
    patches = larger(larger.embed_image(large)).patches
    assert patches.shape == (2, 64, 32)
    features = [pool(model(model.embed_image(x)), "mean") for model, x in ((tower, small), (larger, large))]
    assert F.cosine_similarity(*features).min() > 0.8  # the same images at two sizes
    assert F.cosine_similarity(features[0], pool(tower(tower.embed_image(pixels(2, seed=9))), "mean")).min() < 0.9999


# ---------------------------------------------------------------- the sequence


def test_packed_forward_equals_open_clip_blocks(tower):
    """Compares the packed forward pass with open_clip's blocks on one sample at a time, without padding."""
    image, text = tower.embed_image(pixels(3)), tower.embed_text(IDS, LENGTHS)
    joint = tower(join(image, text))
    for row, length in enumerate((LENGTHS - 2).tolist()):
        parts = [tower.cls[None], image.patches[row], text.words[row, :length]]
        x = torch.cat(parts)[None]
        for block in tower.transformer.resblocks:
            x = block(x)
        x = F.layer_norm(x[0], (32,), tower.norm.weight, tower.norm.bias)
        torch.testing.assert_close(joint.cls[row], x[0])
        torch.testing.assert_close(joint.patches[row], x[1:17])
        torch.testing.assert_close(joint.words[row, :length], x[17:])
        assert not joint.words[row, length:].any()
        torch.testing.assert_close(pool(joint, "mean")[row], x.mean(0))
        torch.testing.assert_close(pool(joint, "cls")[row], x[0])
        halves = x[:17].mean(0), torch.cat([x[:1], x[17:]]).mean(0)
        torch.testing.assert_close(pool(joint, "balanced")[row], sum(halves) / 2)


def test_dense_forward_equals_packed_forward(tower):
    image, text = tower.embed_image(pixels(3)), tower.embed_text(IDS, LENGTHS)
    for tokens in (image, text, join(image, text)):
        for mine, their in zip(tower.dense_forward(tokens), tower(tokens)):
            torch.testing.assert_close(mine, their)


def test_balanced_pooling_of_one_modality_is_mean_pooling(tower):
    for tokens in (tower.embed_image(pixels(3)), tower.embed_text(IDS, LENGTHS)):
        states = tower(tokens)
        torch.testing.assert_close(pool(states, "balanced"), pool(states, "mean"))


def test_start_end_and_padding_tokens_are_ignored(tower):
    changed = IDS.clone()
    changed[:, 0] = 49
    for row, length in enumerate(LENGTHS.tolist()):
        changed[row, length - 1 :] = 48
    states = [tower(tower.embed_text(ids, LENGTHS)) for ids in (IDS, changed)]
    for original, other in zip(*states):
        torch.testing.assert_close(original, other, rtol=0, atol=0)
    changed[0, 3] = 7
    assert not torch.equal(tower(tower.embed_text(changed, LENGTHS)).cls[0], states[0].cls[0])


def test_captions_without_words(tower):
    states = tower(tower.embed_text(IDS[:, :2], torch.tensor([2, 2, 2])))
    assert states.words.shape == (3, 0, 32)
    torch.testing.assert_close(pool(states, "mean"), states.cls)
    joint = tower(join(tower.embed_image(pixels(3)), tower.embed_text(IDS[:, :2], torch.tensor([2, 2, 2]))))
    torch.testing.assert_close(joint.patches, tower(tower.embed_image(pixels(3))).patches)


def test_patch_pixels_are_in_row_major_order(tower):
    image = pixels(1)
    patches = tower.patch_pixels(image)[0]
    assert patches.shape == (16, 192)
    for row in range(4):
        for column in range(4):
            block = tower.normalize(image)[0, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8]
            torch.testing.assert_close(patches[4 * row + column], block.permute(1, 2, 0).flatten())


def test_masked_patches_do_not_leak_pixels(tower):
    """Neither their own embedding nor, through the stem's receptive field, a neighbor's depends on their pixels."""
    masked = torch.zeros(2, 16, dtype=torch.bool)
    masked[0, 5] = masked[1, 0] = masked[1, 15] = True
    original, other = pixels(2), pixels(2)
    other[0, :, 8:16, 8:16] = 255 - other[0, :, 8:16, 8:16]
    other[1, :, :8, :8] = 3
    other[1, :, 24:, 24:] = 200
    embedded = [tower.embed_image(x, masked).patches for x in (original, other)]
    torch.testing.assert_close(*embedded, rtol=0, atol=0)
    for patch, index in ((embedded[0][0, 5], 5), (embedded[0][1, 15], 15)):
        torch.testing.assert_close(patch, tower.mask_patch + tower.patch_positions[index])
    assert not torch.equal(tower.embed_image(original).patches[0, 6], tower.embed_image(other).patches[0, 6])


# ---------------------------------------------------------------- attention from one sequence to another


def test_given_itself_equals_self_attention(tower):
    for tokens in (tower.embed_image(pixels(3)), tower.embed_text(IDS, LENGTHS)):
        for own, crossed in zip(tower(tokens), tower.given(tokens, tokens)):
            torch.testing.assert_close(own, crossed)


def test_given_uses_keys_and_values_of_the_context(tower):
    """Computes F(T|I) with torch's attention, one sample at a time."""
    image, text = tower.embed_image(pixels(3)), tower.embed_text(IDS, LENGTHS)
    states = tower.given(text, image)
    for row, length in enumerate((LENGTHS - 2).tolist()):
        x = torch.cat([tower.cls[None], text.words[row, :length]])[None]
        y = torch.cat([tower.cls[None], image.patches[row]])[None]
        for block in tower.transformer.resblocks:
            keys = block.ln_1(y)
            x = x + block.attention(block.ln_1(x), keys, keys)
            x = x + block.mlp(block.ln_2(x))
            y = block(y)
        x = tower.norm(x)[0]
        torch.testing.assert_close(states.cls[row], x[0])
        torch.testing.assert_close(states.words[row, :length], x[1:])
        assert not states.words[row, length:].any()
    assert isinstance(states, States)


@pytest.mark.parametrize(("x_length", "y_length"), [(5, 7), (1, 16), (9, 2)])
def test_attention_over_a_concatenation_is_a_weighted_sum(x_length, y_length):
    """App. A, Eqs. 9 to 13, with λ of Eq. 14 (which also needs √d_k), and the means of Eqs. 17 to 20."""
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 1, batch_first=True).double()  # λ is per head, so a single head
    X, Y = torch.randn(1, x_length, 8, dtype=torch.float64), torch.randn(1, y_length, 8, dtype=torch.float64)

    def f(queries, context):
        return attend(attention, queries, context, torch.ones(context.shape[:2], dtype=torch.bool))[0]

    def projected(x, part):
        return F.linear(x[0], attention.in_proj_weight.view(3, 8, 8)[part], attention.in_proj_bias.view(3, 8)[part])

    def lambda_of(own, other):  # Eq. 14
        scores = [(projected(own, 0) @ projected(z, 1).T / 8**0.5).exp().sum(1, keepdim=True) for z in (own, other)]
        return scores[0] / sum(scores)

    concatenated = torch.cat([X, Y], dim=1)
    both = f(concatenated, concatenated)
    sides = {}
    for own, other, rows in ((X, Y, slice(0, x_length)), (Y, X, slice(x_length, None))):
        weight = lambda_of(own, other)
        sides[rows.start] = weight * f(own, own) + (1 - weight) * f(own, other)
        torch.testing.assert_close(both[rows], sides[rows.start], rtol=1e-10, atol=1e-12)  # Eq. 13
    alpha = x_length / (x_length + y_length)
    expected = alpha * sides[0].mean(0) + (1 - alpha) * sides[x_length].mean(0)  # Eqs. 18-20
    torch.testing.assert_close(both.mean(0), expected, rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------- errors


def test_inputs_of_wrong_size_are_rejected(tower):
    with pytest.raises(UserError, match="13 tokens, but this model supports 12"):
        tower.embed_text(torch.ones(1, 13, dtype=torch.int64), torch.tensor([13]))
    with pytest.raises(UserError, match="40 × 40 pixels, but this model needs 32 × 32"):
        tower.embed_image(pixels(1, size=40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision": {"timm_model_name": "test_resnet"}}, "plain ViT"),
        ({"vision": {"layers": [1, 1, 1, 1]}}, "plain ViT"),
        ({"vision": {"patch_size": 14}}, "is 14, but must be a power of two"),
        ({"image_size": 36}, "image size is 36, but must be a multiple of"),
        ({"vision": {"width": 40}}, "is 40, but must be a multiple of 16"),
        ({"vision": {"image_size": [32, 64]}}, "square"),
        ({"pretrained": "openai"}, "from scratch"),
    ],
)
def test_unsupported_models_are_rejected(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        build(tmp_path, **changes)


@pytest.mark.parametrize(("name", "grid", "millions"), [("ViT-B-16", (14, 14), 127.085), ("oner-tiny", (8, 8), 5.253)])
def test_model_sizes(name, grid, millions):
    with torch.device("meta"):
        tower = build_unified_tower(TowerSpec(name, 49409), masks_patches=True)
    assert tower.patch_grid == grid
    assert sum(p.numel() for p in tower.parameters()) / 1e6 == pytest.approx(millions, abs=0.002)
    assert not any("positions" in key for key in tower.state_dict())
