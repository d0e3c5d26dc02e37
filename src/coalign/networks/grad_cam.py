"""Grad-CAM (Selvaraju et al. 2017) of a two-tower model: which places of the image tower's last map the similarity to a text hangs on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.towers import ImageTower

LEAST_SIDE = 4  # a map of fewer rows shows no place: an earlier one is taken


def grad_cam(
    tower: ImageTower, encode_image: Callable[[Tensor], Tensor], pixels: Tensor, text_embeds: Tensor
) -> Tensor:
    """ReLU of the maps' channels, weighted by the mean gradient of the cosine with the text: [batch, row, column].

    `encode_image` goes through `tower` to normalised embeds; pixels uint8 [batch, 3, side, side]; text_embeds [batch, dim].
    """
    layer, to_maps = _spatial_layer(tower, pixels[:1])
    caught: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        caught.append(output)

    with layer.register_forward_hook(keep), torch.enable_grad():
        embeds = encode_image(pixels)
        (gradient,) = torch.autograd.grad((embeds * text_embeds).sum(), caught[:1])
    maps, slopes = (to_maps(x.detach().float(), len(pixels)) for x in (caught[0], gradient))
    return F.relu((slopes.mean((2, 3), keepdim=True) * maps).sum(1))


def _spatial_layer(tower: ImageTower, pixels: Tensor) -> tuple[nn.Module, Callable[[Tensor, int], Tensor]]:
    """The last layer whose output has places, and what makes [batch, channel, row, column] of that output."""
    trunk = tower.trunk
    if isinstance(trunk, VisionTransformer):
        return trunk.transformer.resblocks[-1].ln_1, _grid(num_prefix=1)
    blocks = getattr(trunk, "blocks", None)
    if isinstance(blocks, nn.Sequential) and hasattr(blocks[-1], "norm1") and hasattr(trunk, "num_prefix_tokens"):
        return blocks[-1].norm1, _grid(int(trunk.num_prefix_tokens))  # type: ignore[arg-type, return-value]
    if isinstance(trunk, ModifiedResNet):
        return trunk.layer4, lambda maps, batch: maps
    return _last_map(tower, pixels), lambda maps, batch: maps


def _grid(num_prefix: int) -> Callable[[Tensor, int], Tensor]:
    """Tokens, packed [batch · token, width] or [batch, token, width], as the map of the patches among them."""

    def to_maps(tokens: Tensor, batch: int) -> Tensor:
        patches = tokens.view(batch, -1, tokens.shape[-1])[:, num_prefix:]
        side = round(patches.shape[1] ** 0.5)
        return patches.transpose(1, 2).unflatten(2, (side, side))

    return to_maps


@torch.no_grad()
def _last_map(tower: ImageTower, pixels: Tensor) -> nn.Module:
    """Of a convolutional trunk the last module whose output is a map of at least 4 × 4 places."""
    found: list[nn.Module] = []

    def note(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= LEAST_SIDE:
            found.append(module)

    hooks = [module.register_forward_hook(note) for module in tower.trunk.modules() if module is not tower.trunk]
    try:
        tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        side = pixels.shape[-1]
        raise UserError(
            f"This image tower has no map of {LEAST_SIDE} × {LEAST_SIDE} places for images of {side} pixels."
        )
    return found[-1]
