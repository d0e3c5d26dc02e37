import pytest
import torch
from torch import nn
from torch.nn import functional as F

from coalign.networks.augmentation_encoder import AugmentationEncoder, build_head

WIDTH, EMBED_DIM, AUGMENTATION_DIM = 6, 4, 5
HEADS = ["linear", "mlp-3", "mlp-6", "residual-1", "residual-3"]


def random_head(name, augmentation_dim=AUGMENTATION_DIM, seed=0):
    """Returns a head with random weights, the tower's projection, and inputs."""
    torch.manual_seed(seed)
    projection = nn.Linear(WIDTH, EMBED_DIM, bias=False)
    head = build_head(name, WIDTH, EMBED_DIM, projection, augmentation_dim)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    augmentation = torch.randn(3, augmentation_dim) if augmentation_dim else None
    return head, projection, torch.randn(3, WIDTH), augmentation


def test_encoder_is_a_two_layer_mlp():
    encoder, params = AugmentationEncoder(), torch.rand(3, 11)
    inner, _, outer = encoder
    assert [tuple(p.shape) for p in encoder.parameters()] == [(256, 11), (256,), (256, 256), (256,)]
    torch.testing.assert_close(
        encoder(params), F.gelu(params @ inner.weight.T + inner.bias) @ outer.weight.T + outer.bias
    )


def test_linear_head_is_linear_in_both_inputs():
    head, projection, x, augmentation = random_head("linear")
    matrix = torch.cat([projection.weight, head.shift.weight], dim=1)
    torch.testing.assert_close(head(x, augmentation), torch.cat([x, augmentation], dim=1) @ matrix.T)


@pytest.mark.parametrize("layers", [3, 6])
def test_mlp_head(layers):
    head, _, x, augmentation = random_head(f"mlp-{layers}")
    matrices = [p for p in head.parameters() if p.ndim == 2]
    shapes = [(WIDTH, WIDTH + AUGMENTATION_DIM), *[(WIDTH, WIDTH)] * (layers - 2), (EMBED_DIM, WIDTH)]
    assert [tuple(m.shape) for m in matrices] == shapes
    expected = torch.cat([x, augmentation], dim=1)
    for number, layer in enumerate(head.layers):
        expected = (F.gelu(expected) if number else expected) @ layer.weight.T + layer.bias
    torch.testing.assert_close(head(x, augmentation), expected)


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("augmentation_dim", [0, AUGMENTATION_DIM])
def test_residual_head(blocks, augmentation_dim):
    head, projection, x, augmentation = random_head(f"residual-{blocks}", augmentation_dim)
    assert len(head.blocks) == blocks
    expected = x
    for block in head.blocks:
        y = expected if augmentation is None else torch.cat([expected, augmentation], dim=1)
        y = (y - y.mean(1, keepdim=True)) / (y.var(1, keepdim=True, correction=0) + 1e-5).sqrt()
        y = F.gelu((y * block.norm.weight + block.norm.bias) @ block.inner.weight.T + block.inner.bias)
        expected = expected + y @ block.outer.weight.T + block.outer.bias
    torch.testing.assert_close(head(x, augmentation), expected @ projection.weight.T)


@pytest.mark.parametrize("blocks", [1, 3])
def test_residual_head_starts_as_the_projection(blocks):
    projection = nn.Linear(WIDTH, EMBED_DIM)
    head, x = build_head(f"residual-{blocks}", WIDTH, EMBED_DIM, projection, AUGMENTATION_DIM), torch.randn(3, WIDTH)
    torch.testing.assert_close(head(x, torch.randn(3, AUGMENTATION_DIM)), projection(x))


@pytest.mark.parametrize("name", HEADS)
def test_head_depends_on_the_augmentation_only_if_given(name):
    head, _, x, augmentation = random_head(name)
    assert not torch.allclose(head(x, augmentation), head(x, augmentation.flip(0)))
    head, projection, x, _ = random_head(name, augmentation_dim=0)
    assert head(x, None).shape == (3, EMBED_DIM)
    if name == "linear":
        torch.testing.assert_close(head(x, None), projection(x))
