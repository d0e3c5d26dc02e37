"""Two-tower models in open_clip's format: the configuration, and the weights by open_clip's names."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.open_clip_parts import TimmModel, VisionTransformer
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.pretrained import take_own_settings
from coalign.networks.towers.text import TextTower


def to_open_clip(
    model_cfg: dict[str, Any], image: ImageTower, text: TextTower, log_logit_scale: Tensor
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns the content of open_clip_config.json, and a state_dict of open_clip's CustomTextCLIP.

    `model_cfg` is the configuration that the towers were built from. Raises UserError for towers that open_clip cannot represent.
    """
    if text.attention != "causal" or text.pooling != "end":
        raise UserError(
            "open_clip cannot represent this text tower, whose attention is bidirectional: open_clip would attend to padding."
        )
    vision, vision_own = take_own_settings(model_cfg["vision_cfg"])
    text_cfg, text_own = take_own_settings(model_cfg["text_cfg"])
    shared = model_cfg.get("quick_gelu", False)
    image_gelu, text_gelu = (bool(own.get("quick_gelu", shared)) for own in (vision_own, text_own))
    if image_gelu != text_gelu and "timm_model_name" not in vision:  # timm's models have their own activations
        raise UserError(
            "open_clip cannot represent towers of which only one has QuickGELU; use --to transformers or onnx."
        )
    vision, image_state = _image(vision, image)
    transformer = text.transformer
    text_cfg = {
        **text_cfg,
        "context_length": text.context_length,
        "vocab_size": transformer.token_embedding.num_embeddings,
        "proj_type": "linear",
        "proj_bias": False,
        "pool_type": "argmax",  # the end token has the largest id of a caption
    }
    state = {f"visual.{name}": value for name, value in image_state.items()}
    state |= {f"text.{name}": value for name, value in transformer.state_dict().items()}
    state |= {"text.text_projection": _matrix(text.projection), "logit_scale": log_logit_scale.reshape(())}
    config = {
        "model_cfg": {
            "embed_dim": image.embed_dim,
            "vision_cfg": vision,
            "text_cfg": text_cfg,
            "quick_gelu": text_gelu,
            "custom_text": True,
        },
        "preprocess_cfg": image.preprocess.to_json(),
    }
    return config, {name: value.detach().cpu().contiguous() for name, value in state.items()}


def _image(vision: dict[str, Any], tower: ImageTower) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Returns vision_cfg, and the state_dict of open_clip's image tower."""
    if vision.pop("timm_kwargs", None):
        raise UserError(
            f"open_clip cannot represent this image tower: timm's {vision['timm_model_name']} with a custom architecture "
            "(`timm_kwargs`); train a model file without `timm_kwargs` to export it."
        )
    vision["image_size"] = tower.image_size
    trunk, projection = tower.trunk, tower.projection
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    if isinstance(trunk, VisionTransformer):
        return vision, {**trunk.state_dict(), "proj": _matrix(projection)}
    if isinstance(projection, nn.Identity):  # the trunk includes the projection
        return vision, dict(trunk.state_dict())
    weight = {"head.proj.weight": projection.get_parameter("weight")}
    if isinstance(trunk, TimmModel):
        if not vision.get("timm_proj"):  # a new projection after a trunk that had none
            vision["timm_proj"] = "linear"
        return vision, {**trunk.state_dict(), **weight}
    vision |= {"timm_pool": "", "timm_proj": "linear"}  # keep the trunk's own pooling
    return vision, {**{f"trunk.{name}": value for name, value in trunk.state_dict().items()}, **weight}


def _matrix(projection: nn.Module) -> Tensor:
    """Returns the weight of a linear layer without bias as open_clip stores it, [width, embed_dim]."""
    return projection.get_parameter("weight").T
