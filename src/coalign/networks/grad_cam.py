"""Grad-CAM (Selvaraju et al. 2017) of a two-tower model: the regions of an image that its similarity to a text depends on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.open_clip_parts import ModifiedResNet, VisionTransformer
from coalign.networks.towers.image import ImageTower
from coalign.types import Embeds, Similarity, dot_product

MIN_MAP_SIDE = 4  # smaller feature maps are too coarse; an earlier layer is used instead


def grad_cam(
    tower: ImageTower,
    encode_image: Callable[[Tensor], Any],
    pixels: Tensor,
    text_embeds: Embeds,
    similarity: Similarity = dot_product,
) -> Tensor:
    """Returns the ReLU of the feature map's channels weighted by the mean gradient of the similarity to the text: [batch, row, column].

    `encode_image` must call `tower`. pixels uint8 [batch, 3, side, side]; text_embeds: of one text per image.
    """
    layer, to_maps = _spatial_layer(tower, pixels[:1])
    outputs: list[Tensor] = []

    def capture(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
        outputs.append(output)

    with layer.register_forward_hook(capture), torch.enable_grad():
        similarities = similarity(encode_image(pixels), text_embeds).diagonal()  # of each image to its own text
        (gradient,) = torch.autograd.grad(similarities.sum(), outputs[:1])
    maps, gradients = (to_maps(x.detach().float(), len(pixels)) for x in (outputs[0], gradient))
    return F.relu((gradients.mean((2, 3), keepdim=True) * maps).sum(1))


def _spatial_layer(tower: ImageTower, pixels: Tensor) -> tuple[nn.Module, Callable[[Tensor, int], Tensor]]:
    """Returns the last layer with a spatial output, and a function that converts the output to [batch, channel, row, column]."""
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
    """Returns a function that converts tokens, [batch · token, width] or [batch, token, width], to a map of their patches."""

    def to_maps(tokens: Tensor, batch: int) -> Tensor:
        patches = tokens.view(batch, -1, tokens.shape[-1])[:, num_prefix:]
        side = round(patches.shape[1] ** 0.5)
        return patches.transpose(1, 2).unflatten(2, (side, side))

    return to_maps


@torch.no_grad()
def _last_map(tower: ImageTower, pixels: Tensor) -> nn.Module:
    """Returns the last module of a convolutional trunk with a feature map of at least 4 × 4. Raises UserError if there is none."""
    candidates: list[nn.Module] = []

    def record(module: nn.Module, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim == 4 and min(output.shape[2:]) >= MIN_MAP_SIDE:
            candidates.append(module)

    hooks = [module.register_forward_hook(record) for module in tower.trunk.modules() if module is not tower.trunk]
    try:
        tower(pixels)
    finally:
        for hook in hooks:
            hook.remove()
    if not candidates:
        side = pixels.shape[-1]
        raise UserError(
            f"Grad-CAM needs a feature map of at least {MIN_MAP_SIDE} × {MIN_MAP_SIDE}, "
            f"but this image tower has none for images of {side} pixels."
        )
    return candidates[-1]
