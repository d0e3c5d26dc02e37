"""Image towers: open_clip's vision models and timm trunks."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import open_clip
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.batch_norm import group_batch_norms
from coalign.networks.open_clip_parts import (
    ModifiedResNet,
    TimmModel,
    VisionTransformer,
    build_visual,
    embed_patches,
    pool_tokens,
)
from coalign.networks.towers.pretrained import is_trunk_weights, load_pretrained, take_projection, weights_file
from coalign.networks.towers.spec import (
    ONE_TOWER_WEIGHTS,
    ImageFeatures,
    Tower,
    TowerSpec,
    model_config,
    new_projection,
)
from coalign.networks.transformer import is_plain, pack, run_blocks, run_padded_blocks


class ImageTower(Tower):
    """Maps pixels to features: the trunk's output before the projection into the shared space, and its patches.

    The patches are the hidden states of a Transformer's patches after its last norm, or a CNN's last feature map.
    """

    image_size: int
    has_fixed_shapes = True
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

    @property
    def patch_width(self) -> int:
        """Width of the patches. Raises UserError if the trunk has no patch features."""
        trunk: Any = timm_part(self.trunk)
        if isinstance(trunk, VisionTransformer) and trunk.attn_pool is None:
            return trunk.transformer.width
        if isinstance(trunk, ModifiedResNet):
            return trunk.attnpool.k_proj.in_features
        if not hasattr(trunk, "forward_features"):
            raise _no_patches(trunk)
        return int(trunk.num_features)

    def forward(self, pixels: Tensor, with_patches: bool = False) -> ImageFeatures:
        """uint8 pixels [batch, 3, image_size, image_size] -> ImageFeatures. Raises UserError if the trunk has no patch features."""
        trunk, x = self.trunk, self.normalize(pixels)
        if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
            return _trunk_features(trunk, x, with_patches)
        x = embed_patches(trunk, x)  # [batch, token, width]
        (batch, num_tokens), x = x.shape[:2], x.flatten(0, 1)
        packing = pack([num_tokens] * batch, x.device)
        # the last block needs only the class token
        if trunk.pool_type == "tok" and trunk.attn_pool is None and not with_patches:
            read = torch.arange(0, batch * num_tokens, num_tokens, device=x.device)
            return _vit_features(trunk, run_blocks(trunk.transformer, x, packing, read=read)[:, None], False)
        states = run_blocks(trunk.transformer, x, packing).unflatten(0, (batch, num_tokens))
        return _vit_features(trunk, states, with_patches)

    def dense_forward(self, pixels: Tensor, with_patches: bool = False) -> ImageFeatures:
        trunk, x = self.trunk, self.normalize(pixels)
        if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
            return _trunk_features(trunk, x, with_patches)
        return _vit_features(trunk, run_padded_blocks(trunk.transformer, embed_patches(trunk, x)), with_patches)

    def describe_pass(self, pixels: Tensor, *_: Any) -> tuple[str, int]:
        return "image", len(pixels)

    def normalize(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self.mean.dtype) - self.mean) / self.std


def _trunk_features(trunk: Any, x: Tensor, with_patches: bool) -> ImageFeatures:
    """Returns the features of normalized pixels by the trunk's own forward pass."""
    if isinstance(trunk, VisionTransformer):
        return _vit_features(trunk, trunk.transformer(embed_patches(trunk, x)), with_patches)
    if not with_patches:
        return ImageFeatures(trunk(x), None)
    if isinstance(trunk, ModifiedResNet):
        maps = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(trunk.stem(x)))))  # [batch, channel, row, column]
        return ImageFeatures(trunk.attnpool(maps), maps.permute(0, 2, 3, 1))
    timm_trunk = timm_part(trunk)
    if not hasattr(timm_trunk, "forward_features"):
        raise _no_patches(trunk)
    features = timm_trunk.forward_features(x)
    pooled = timm_trunk.forward_head(features)
    return ImageFeatures(trunk.head(pooled) if timm_trunk is not trunk else pooled, _timm_patches(timm_trunk, features))


def _vit_features(trunk: VisionTransformer, states: Tensor, with_patches: bool) -> ImageFeatures:
    """states: outputs of the last block [batch, token, width], of the class token and then the patches."""
    pooled = pool_tokens(trunk, states)[0]
    if not with_patches:
        return ImageFeatures(pooled, None)
    rows, columns = trunk.grid_size
    if (
        trunk.attn_pool is not None or states.shape[1] != 1 + rows * columns
    ):  # the norm follows the pool; dropped patches
        raise _no_patches(trunk)
    return ImageFeatures(pooled, trunk.ln_post(states[:, 1:]).unflatten(1, (rows, columns)))


def _timm_patches(trunk: Any, features: Any) -> Tensor:
    """Returns the tokens of a Transformer, or the feature map of a CNN, as [batch, row, column, width]."""
    if isinstance(features, Tensor) and features.ndim == 4:
        return features if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else features.permute(0, 2, 3, 1)
    if isinstance(features, Tensor) and features.ndim == 3:
        patches = features[:, getattr(trunk, "num_prefix_tokens", 0) :]
        side = math.isqrt(patches.shape[1])
        if patches.shape[1] == side * side > 1:  # a single token stands for the whole image
            return patches.unflatten(1, (side, side))
    raise _no_patches(trunk)


def timm_part(trunk: Any) -> Any:
    """Returns the trunk in open_clip's adapter of timm models, or the trunk itself."""
    return trunk.trunk if isinstance(trunk, TimmModel) else trunk


def _no_patches(trunk: nn.Module) -> UserError:
    return UserError(
        f"The image tower has no patch features: its trunk, a {type(trunk).__name__}, has no single feature map, or drops patches in "
        "training; use a ViT with a class token and no patch dropout, or a ResNet."
    )


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
        trunk: Any = timm_part(tower.trunk)
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
        width: int = getattr(trunk, "head_hidden_size", trunk.num_features)  # some heads widen the features
        return ImageTower(group_batch_norms(trunk, spec.batch_norm_group), width, embed_dim, size)
    else:
        vision.update(image_size=size, timm_model_pretrained=False)
        visual = build_visual(embed_dim, open_clip.CLIPVisionCfg(**vision), config.get("quick_gelu", False))
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
