"""Image towers: open_clip's vision models and timm trunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import open_clip
import timm
import torch
from jaxtyping import Float
from open_clip.model import CLIPVisionCfg, _build_vision_tower
from open_clip.transformer import VisionTransformer
from safetensors.torch import load_file
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.batch_norm import group_batch_norms
from coalign.networks.towers.pretrained import is_trunk_weights, load_pretrained, take_projection, weights_file
from coalign.networks.towers.spec import ONE_TOWER_WEIGHTS, TowerSpec, model_config, new_projection
from coalign.networks.transformer import is_plain, pack, run_blocks


class ImageTower(nn.Module):
    """Maps pixels to features: the trunk's output before the projection into the shared space."""

    mean: Tensor
    std: Tensor

    def __init__(
        self, trunk: nn.Module, width: int, embed_dim: int, image_size: int, projection: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.trunk, self.width, self.embed_dim, self.image_size = trunk, width, embed_dim, image_size
        self.projection = projection or new_projection(width, embed_dim)
        # CLIP's normalization, also open_clip's default
        self.register_buffer("mean", torch.tensor(open_clip.OPENAI_DATASET_MEAN).view(3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(open_clip.OPENAI_DATASET_STD).view(3, 1, 1) * 255, persistent=False)

    def forward(self, pixels: Tensor) -> Float[Tensor, "batch width"]:
        """uint8 pixels [batch, 3, image_size, image_size] -> features [batch, width]."""
        pixels = (pixels.to(self.mean.dtype) - self.mean) / self.std
        trunk = self.trunk
        if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
            return trunk(pixels)
        x = trunk._embeds(pixels)  # [batch, token, width]
        (batch, num_tokens), x = x.shape[:2], x.flatten(0, 1)
        packing = pack([num_tokens] * batch, x.device)
        if trunk.pool_type == "tok" and trunk.attn_pool is None:  # the last block needs only the class token
            read = torch.arange(0, batch * num_tokens, num_tokens, device=x.device)
            return trunk._pool(run_blocks(trunk.transformer, x, packing, read=read)[:, None])[0]
        return trunk._pool(run_blocks(trunk.transformer, x, packing).unflatten(0, (batch, num_tokens)))[0]


def build_image_tower(spec: TowerSpec) -> ImageTower:
    """Builds the image tower of `spec`, with random or pretrained weights. Raises UserError if model and weights do not fit."""
    config = model_config(spec.name)
    vision, embed_dim = dict(config["vision_cfg"]), config["embed_dim"]
    size = spec.image_size or vision.get("image_size", 224)
    if isinstance(size, (list, tuple)):
        raise UserError(
            f"The model {spec.name} takes {size[0]} × {size[1]} pixel images, but only square images are supported."
        )
    if is_trunk_weights(spec):
        tower = build_image_tower(replace(spec, pretrained=None))
        trunk: Any = getattr(tower.trunk, "trunk", tower.trunk)  # open_clip's adapter wraps it
        weights = load_file(weights_file(spec.pretrained) or "")
        classifiers = trunk.pretrained_cfg.get("classifier") or ()  # in files from the hub, but not in the tower
        for head in (classifiers,) if isinstance(classifiers, str) else classifiers:
            weights = {key: value for key, value in weights.items() if not key.startswith(f"{head}.")}
        try:
            trunk.load_state_dict(weights)
        except RuntimeError as error:
            reason = str(error).splitlines()[1].strip()
            raise UserError(f"The weights {spec.pretrained} do not fit the trunk of {spec.name}: {reason}") from error
        return tower
    if spec.pretrained not in ONE_TOWER_WEIGHTS:
        visual = load_pretrained(spec).visual
    elif spec.name.startswith("timm:") or "timm_kwargs" in vision:
        trunk = _timm_trunk(vision, size, spec.pretrained == "timm")
        width: int = trunk.num_features
        return ImageTower(group_batch_norms(trunk, spec.batch_norm_group), width, embed_dim, size)
    else:
        vision.update(image_size=size, timm_model_pretrained=False)
        visual = _build_vision_tower(embed_dim, CLIPVisionCfg(**vision), config.get("quick_gelu", False))
    width, projection = take_projection(visual, embed_dim)
    return ImageTower(group_batch_norms(visual, spec.batch_norm_group), width, embed_dim, size, projection)


def _timm_trunk(vision: dict[str, Any], size: int, pretrained: bool) -> nn.Module:
    name = vision["timm_model_name"]
    options = dict(vision.get("timm_kwargs", {}), num_classes=0, pretrained=pretrained)
    sizes: list[dict[str, Any]] = [{"img_size": size}, {}]
    for sized in sizes:  # Transformers need img_size, convolutional trunks reject it
        try:
            return timm.create_model(name, **options, **sized)
        except TypeError as error:
            last_error = error
    raise UserError(f"timm cannot create {name} with {options}: {last_error}.")
