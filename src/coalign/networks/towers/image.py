"""Image towers: open_clip's vision models and timm trunks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import open_clip
import timm
import torch
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.batch_norm import group_batch_norms
from coalign.networks.open_clip_parts import (
    ModifiedResNet,
    VisionTransformer,
    build_visual,
    embed_patches,
    pool_tokens,
)
from coalign.networks.towers.composition import compose
from coalign.networks.towers.pretrained import load_pretrained, take_own_settings, take_projection, timm_part
from coalign.networks.towers.spec import ImageFeatures, Tower, TowerSpec, new_projection
from coalign.networks.transformer import is_plain, pack, run_blocks, run_padded_blocks
from coalign.types import CLIP_PREPROCESS, Preprocess


class ImageTower(Tower):
    """Maps pixels to features: the trunk's output before the projection into the shared space, and its patches.

    The patches are the hidden states of a Transformer's patches after its last norm, or a CNN's last feature map.
    """

    image_size: int
    has_fixed_shapes = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        trunk: nn.Module,
        width: int,
        embed_dim: int,
        image_size: int,
        projection: nn.Module | None = None,
        preprocess: Preprocess = CLIP_PREPROCESS,
    ) -> None:
        super().__init__()
        self.trunk, self.width, self.embed_dim, self.image_size = trunk, width, embed_dim, image_size
        self.projection = new_projection(width, embed_dim) if projection is None else projection
        self.preprocess = preprocess
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocess, name)).view(3, 1, 1) * 255
            self.register_buffer(name, values, persistent=False)

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
        """uint8 pixels [batch, 3, image_size, image_size] -> ImageFeatures. Raises UserError if the trunk has no patch features.

        Pooled features, float [batch, width], which a locked tower has computed before, are returned as they are.
        """
        if pixels.ndim == 2:
            return ImageFeatures(pixels, None)
        if pixels.device.type != "mps":  # convolutions are faster, also where the weights are in the other format
            pixels = pixels.contiguous(memory_format=torch.channels_last)
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


def _no_patches(trunk: nn.Module) -> UserError:
    return UserError(
        f"The image tower has no patch features: its trunk, a {type(trunk).__name__}, has no single feature map, or drops patches in "
        "training; use a ViT with a class token and no patch dropout, or a ResNet."
    )


def build_image_tower(spec: TowerSpec) -> ImageTower:
    """Builds the image tower of `spec`, with random or pretrained weights. Raises UserError if model and weights do not fit."""
    model = compose(spec)
    embed_dim, (vision, own) = model.config["embed_dim"], take_own_settings(model.config["vision_cfg"])
    own_size = vision.get("image_size", 224)
    size = spec.image_size or own_size
    if isinstance(size, (list, tuple)):
        raise UserError(
            f"The model {spec.image_tower or spec.name} takes {size[0]} × {size[1]} pixel images, but only square images are supported."
        )
    own_dim: int = own.get("embed_dim", embed_dim)
    if spec.pretrained:
        trunk = load_pretrained(spec).visual
        width, projection = take_projection(trunk, own_dim)
    elif "timm_kwargs" in vision:
        trunk, projection = _timm_trunk(vision, size), None
        width = getattr(trunk, "head_hidden_size", trunk.num_features)  # some heads widen the features
    else:
        vision.update(image_size=size, timm_model_pretrained=False)
        quick_gelu = own.get("quick_gelu", model.config.get("quick_gelu", False))
        trunk = build_visual(own_dim, open_clip.CLIPVisionCfg(**vision), quick_gelu)
        width, projection = take_projection(trunk, own_dim)
    if size != own_size:
        _check_patches(trunk, size, spec.image_tower or spec.name)
    if own_dim != embed_dim or spec.head != "linear":
        projection = new_projection(width, embed_dim, spec.head)
    trunk = group_batch_norms(trunk, spec.batch_norm_group)
    tower = ImageTower(trunk, width, embed_dim, size, projection, Preprocess.from_json(own.get("preprocess", {})))
    if model.image:
        model.image.load(tower)
    tower.starts = dict(model.starts["image"])
    return tower


def _check_patches(trunk: Any, size: int, name: str) -> None:
    """Raises UserError if the patches of a Transformer do not cover images of `size` pixels."""
    part = timm_part(trunk)
    sides = getattr(getattr(part, "patch_embed", part), "patch_size", 1)
    patch = max(sides) if isinstance(sides, tuple) else sides
    if size % patch:
        raise UserError(
            f"The image encoder {name} has patches of {patch} pixels, which do not cover images of {size}; use a multiple, such as "
            f"--image-size {patch * max(1, round(size / patch))}."
        )


def _timm_trunk(vision: Mapping[str, Any], size: int) -> Any:
    name = vision["timm_model_name"]
    options = {**vision["timm_kwargs"], "num_classes": 0}
    sizes: list[dict[str, Any]] = [{"img_size": size}, {}]
    for sized in sizes:  # Transformers need img_size, convolutional trunks reject it
        try:
            return timm.create_model(name, **options, **sized)
        except TypeError as error:
            last_error = error
    raise UserError(f"timm cannot create {name} with {options}: {last_error}.")
