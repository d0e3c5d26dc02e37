"""Grad-CAM compared with a manual computation on a trunk that is split in two."""

import pytest
import timm
import torch
from open_clip import CLIPVisionCfg
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.grad_cam import grad_cam
from coalign.networks.open_clip_parts import build_visual
from coalign.networks.towers.image import ImageTower


def manual_grad_cam(maps, finish, text):
    """Computes Grad-CAM from a feature map [batch, channel, row, column] and the layers `finish` after it."""
    maps = maps.detach().requires_grad_()
    embeds = F.normalize(finish(maps), dim=-1)
    (gradients,) = torch.autograd.grad((embeds * text).sum(), maps)
    weights = gradients.mean((2, 3))  # [batch, channel]
    return F.relu(torch.einsum("bc,bchw->bhw", weights, maps))


def normalized(tower, pixels):
    return (pixels.double() - tower.mean) / tower.std


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8), F.normalize(torch.randn(3, 8).double(), dim=-1)


def embed(tower):
    return lambda pixels: F.normalize(tower.projection(tower(pixels).pooled), dim=-1)


def test_convolutional_trunk(inputs):
    pixels, text = inputs
    trunk = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], num_classes=0)
    tower = ImageTower(trunk, 8, 8, 64).double().eval()
    cam = grad_cam(tower, embed(tower), pixels, text)
    assert cam.shape == (3, 4, 4)  # the last map of at least 4 × 4; the very last has 2 × 2
    x = normalized(tower, pixels)
    x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(x))))
    maps = trunk.layer3(trunk.layer2(trunk.layer1(x)))
    expected = manual_grad_cam(maps, lambda m: tower.projection(trunk.forward_head(trunk.layer4(m))), text)
    torch.testing.assert_close(cam, expected.float(), rtol=1e-5, atol=1e-9)
    assert expected.amax() > 0


def test_open_clip_vit(inputs):
    pixels, text = inputs
    cfg = CLIPVisionCfg(image_size=64, layers=2, width=16, patch_size=16, head_width=8)
    trunk = build_visual(8, cfg)
    trunk.proj = None
    tower = ImageTower(trunk, 16, 8, 64).double().eval()
    cam = grad_cam(tower, embed(tower), pixels, text)
    assert cam.shape == (3, 4, 4)

    block = trunk.transformer.resblocks[1]
    # [batch, token, width], open_clip's own forward
    x = trunk.transformer.resblocks[0](trunk._embeds(normalized(tower, pixels)))
    normed = block.ln_1(x)

    def finish(maps):
        tokens = torch.cat([normed[:, :1], maps.flatten(2).transpose(1, 2)], dim=1)
        y = x + block.attention(tokens)
        y = y + block.mlp(block.ln_2(y))
        return tower.projection(trunk._pool(y)[0])

    expected = manual_grad_cam(normed[:, 1:].transpose(1, 2).unflatten(2, (4, 4)), finish, text)
    torch.testing.assert_close(cam, expected.float(), rtol=1e-4, atol=1e-9)
    assert expected.amax() > 0


def test_timm_vit(inputs):
    pixels, text = inputs
    trunk = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=0, depth=2)
    tower = ImageTower(trunk, trunk.num_features, 8, 64).double().eval()
    cam = grad_cam(tower, embed(tower), pixels, text)
    assert cam.shape == (3, 4, 4)
    assert torch.isfinite(cam).all()
    assert cam.amax() > 0


def test_image_too_small_for_a_feature_map(inputs):
    trunk = timm.create_model("resnet18", layers=[1, 1, 1, 1], channels=[8, 8, 8, 8], num_classes=0)
    tower = ImageTower(trunk, 8, 8, 4).double().eval()
    with pytest.raises(UserError, match="at least 4 × 4, but this image tower has none for images of 4 pixels"):
        grad_cam(tower, embed(tower), torch.zeros(1, 3, 4, 4, dtype=torch.uint8), torch.ones(1, 8).double())
