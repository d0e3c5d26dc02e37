"""Pretrained weights of whole open_clip models: tags, and safetensors files."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import open_clip
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from coalign.errors import UserError, first_line
from coalign.networks.open_clip_parts import TimmModel, VisionTransformer
from coalign.networks.towers.spec import (
    OPEN_CLIP_CONFIG,
    TowerSpec,
    check_activation,
    model_config,
)
from coalign.types import Preprocess

# what we add to open_clip's vision_cfg and text_cfg
OWN_SETTINGS = ("preprocess", "quick_gelu", "embed_dim")


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
    return copy.deepcopy(_whole_model(spec))


def pretrained_logit_scale(spec: TowerSpec) -> float | None:
    """Returns 1/τ of the open_clip model that `spec.pretrained` names; None if it does not name a whole model."""
    if spec.pretrained is None:
        return None
    return float(_whole_model(spec).logit_scale.detach().exp())


def _whole_model(spec: TowerSpec) -> Any:
    """Calls `_load_pretrained` with what it depends on, so that both towers share the loaded model."""
    return _load_pretrained(TowerSpec(spec.name, 0, image_size=spec.image_size, pretrained=spec.pretrained))


@lru_cache(maxsize=1)  # both towers load it
def _load_pretrained(spec: TowerSpec) -> Any:
    """Returns open_clip's model with the weights of `spec.pretrained`: one of its tags, or a safetensors file of one of its models. Raises
    UserError if they do not fit or cannot be loaded."""
    tag, file = spec.pretrained or "", weights_file(spec.pretrained)
    config = dict(model_config(spec.name))
    if file:
        if "timm_kwargs" in config["vision_cfg"] or not any(name.startswith("visual.") for name in _names(file)):
            raise UserError(
                f"The weights {tag} are not a whole open_clip model of {spec.name}; use --image-tower or --text-tower for one encoder."
            )
        (vision, _), (text, _) = (take_own_settings(config[key]) for key in ("vision_cfg", "text_cfg"))
        vision["image_size"] = spec.image_size or vision.get("image_size", 224)
        model = open_clip.CustomTextCLIP(
            config["embed_dim"], vision, text, quick_gelu=config.get("quick_gelu", False),
            init_logit_bias=config.get("init_logit_bias"),
        )  # fmt: skip
        try:
            open_clip.load_checkpoint(model, file)
        except (RuntimeError, KeyError, AssertionError, SafetensorError) as error:
            # torch names the tensor in the last line
            reason = (str(error).splitlines() or [type(error).__name__])[-1].strip()
            raise UserError(f"The weights {tag} do not fit {spec.name}: {reason}") from error
        return model
    check_pretrained(spec.name, tag)
    try:
        return open_clip.create_model(
            spec.name, pretrained=tag, force_custom_text=True, force_image_size=spec.image_size, device="cpu"
        )
    except Exception as error:  # the hub's client raises many types: no network, no such file, offline mode
        raise UserError(f"The weights {tag} of {spec.name} could not be downloaded: {first_line(error)}") from error


def check_pretrained(name: str, pretrained: str) -> None:
    """Raises UserError if the model `name` has no weights `pretrained`, or they are for another activation."""
    if weights_file(pretrained):
        return
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained not in tags:
        hint = f"use one of {', '.join(tags)}, or a .safetensors file" if tags else "use a .safetensors file"
        raise UserError(f"The model {name} has no pretrained weights named {pretrained!r}; {hint}.")
    check_activation(name, pretrained)


def _names(file: str) -> list[str]:
    try:
        with safe_open(file, "pt") as weights:
            return list(weights.keys())
    except SafetensorError as error:
        raise UserError(f"The weights file {file} is not a valid safetensors file: {error}") from error


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


def pretrained_preprocess(name: str, pretrained: str) -> Preprocess | None:
    """Returns the preprocessing that the weights were trained with, if it is known: a folder's or a tag's."""
    if pretrained in open_clip.list_pretrained_tags_by_model(name):
        return Preprocess.from_json(open_clip.get_pretrained_cfg(name, pretrained) or {})
    if (Path(pretrained) / OPEN_CLIP_CONFIG).is_file():
        values = model_config(pretrained)["vision_cfg"].get("preprocess")
        return None if values is None else Preprocess.from_json(values)
    return None


def timm_part(trunk: Any) -> Any:
    """Returns the trunk in open_clip's adapter of timm models, or the trunk itself."""
    return trunk.trunk if isinstance(trunk, TimmModel) else trunk


def take_own_settings(vision_cfg: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits a vision_cfg or text_cfg into open_clip's own settings, and those that coalign adds to them."""
    own = {name: value for name, value in vision_cfg.items() if name in OWN_SETTINGS}
    return {name: value for name, value in vision_cfg.items() if name not in own}, own
