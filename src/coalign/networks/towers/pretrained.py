"""Pretrained weights: open_clip tags, and safetensors files of a whole model or of a timm trunk."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.open_clip_parts import VisionTransformer
from coalign.networks.towers.spec import TowerSpec, check_activation, model_config


def take_projection(visual: Any, embed_dim: int) -> tuple[int, nn.Module]:
    """Removes the projection from an open_clip image tower. Returns the tower's output width without it, and the projection."""
    if isinstance(visual, VisionTransformer):
        projection = linear_from_matrix(visual.proj)
        visual.proj = None
        return projection.in_features, projection
    last = getattr(getattr(visual, "head", None), "proj", None)  # in open_clip's timm adapter
    if isinstance(last, nn.Linear):
        visual.head.proj = nn.Identity()
        return last.in_features, last
    return embed_dim, nn.Identity()  # an attention pool or an MLP already maps to the shared space


def linear_from_matrix(matrix: Tensor) -> nn.Linear:
    """Returns an open_clip projection matrix [width, embed_dim] as a linear layer."""
    width, embed_dim = matrix.shape
    projection = nn.Linear(width, embed_dim, bias=False, device=matrix.device)
    projection.weight.data.copy_(matrix.data.T)
    return projection


def load_pretrained(spec: TowerSpec) -> Any:
    """Returns a copy of open_clip's model, as in `_load_pretrained`: the towers remove parts of it."""
    return copy.deepcopy(_load_pretrained(spec))


@lru_cache(maxsize=1)  # both towers load it
def _load_pretrained(spec: TowerSpec) -> Any:
    """Returns open_clip's model with the weights of `spec.pretrained`: one of its tags, or a safetensors file of one of its models. Raises
    UserError if they do not fit or cannot be loaded."""
    tag, file = spec.pretrained or "", weights_file(spec.pretrained)
    config = dict(model_config(spec.name))
    if file:
        vision = {**config["vision_cfg"], "image_size": spec.image_size or config["vision_cfg"].get("image_size", 224)}
        model = open_clip.CustomTextCLIP(
            config["embed_dim"], vision, config["text_cfg"], quick_gelu=config.get("quick_gelu", False)
        )
        try:
            open_clip.load_checkpoint(model, file)
        except (RuntimeError, KeyError, AssertionError, SafetensorError) as error:
            # torch names the tensor in the last line
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(f"The weights {tag} do not fit {spec.name}: {reason}") from error
        return model
    tags = open_clip.list_pretrained_tags_by_model(spec.name)
    if tag in tags:
        check_activation(spec.name, tag)
    if tag not in tags:
        hint = f"use one of {', '.join(tags)}, or a .safetensors file" if tags else "use a .safetensors file"
        raise UserError(f"The model {spec.name} has no pretrained weights named {tag!r}; {hint}.")
    try:
        return open_clip.create_model(
            spec.name, pretrained=tag, force_custom_text=True, force_image_size=spec.image_size, device="cpu"
        )
    except Exception as error:  # the hub's client raises many types: no network, no such file, offline mode
        raise UserError(
            f"The weights {tag} of {spec.name} could not be downloaded: {str(error).splitlines()[0]}"
        ) from error


def weights_file(pretrained: str | None) -> str | None:
    """Returns the safetensors file that `pretrained` names, directly or as the only one in a folder; None if it does not name a file.
    Raises UserError if the file does not exist or the folder does not contain exactly one."""
    if pretrained and Path(pretrained).is_dir():
        files = sorted(Path(pretrained).glob("*.safetensors"))
        if len(files) != 1:
            raise UserError(
                f"The folder {pretrained} contains {len(files)} .safetensors files; pass the path of one file."
            )
        return str(files[0])
    if not pretrained or not pretrained.endswith(".safetensors"):
        return None
    if not Path(pretrained).is_file():
        raise UserError(f"The weights file {pretrained} does not exist.")
    return pretrained


def is_trunk_weights(spec: TowerSpec) -> bool:
    """Whether `spec.pretrained` is a file with the weights of a timm trunk only, as written by `coalign export --to timm`."""
    file = weights_file(spec.pretrained)
    if file is None:
        return False
    try:
        with safe_open(file, "pt") as weights:
            has_towers = any(name.startswith(("visual.", "text.")) for name in weights.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"The weights file {file} is not a valid safetensors file: {error}") from error
    return not has_towers and "timm_model_name" in model_config(spec.name)["vision_cfg"]
