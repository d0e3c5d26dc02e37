"""Two-tower models with an image encoder of timm as transformers' VisionTextDualEncoderModel (extra "hf")."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from coalign.errors import UserError
from coalign.interop.transformers.export import check_text_tower, text_config, text_state
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.pretrained import timm_part
from coalign.networks.towers.text import TextTower


def to_dual_encoder(
    vision_cfg: Mapping[str, Any],
    image: ImageTower,
    text: TextTower,
    log_logit_scale: Tensor,
    start_id: int,
    end_id: int,
) -> Any:
    """Returns a transformers.VisionTextDualEncoderModel of a timm model, and CLIP's text encoder.

    `vision_cfg` is the configuration that the image tower was built from. Raises UserError for towers that it cannot represent.
    """
    from transformers import (
        CLIPTextConfig,
        TimmWrapperConfig,
        VisionTextDualEncoderConfig,
        VisionTextDualEncoderModel,
    )

    check_text_tower(text, "VisionTextDualEncoderModel")
    trunk = timm_part(image.trunk)
    if not isinstance(image.projection, torch.nn.Linear) or image.projection.in_features != trunk.num_features:
        raise UserError(
            "VisionTextDualEncoderModel cannot represent this image tower, whose pooling is not timm's; use --to open_clip."
        )
    kwargs = dict(vision_cfg.get("timm_kwargs", {}))
    if hasattr(trunk, "set_input_size"):  # a Transformer, whose positions are those of its image size
        kwargs["img_size"] = trunk.patch_embed.img_size
        kwargs["dynamic_img_size"] = getattr(trunk, "dynamic_img_size", False)
    settings: dict[str, Any] = {"hidden_size": trunk.num_features, "num_labels": 0, "model_args": kwargs or None}
    vision = TimmWrapperConfig(architecture=vision_cfg["timm_model_name"], **settings)
    config = VisionTextDualEncoderConfig.from_vision_text_configs(
        vision, CLIPTextConfig(**text_config(text, start_id, end_id)), projection_dim=image.embed_dim
    )
    model = VisionTextDualEncoderModel(config).eval()
    state = {
        "logit_scale": log_logit_scale.reshape(()),
        "visual_projection.weight": image.projection.weight,
        **{f"vision_model.timm_model.{name}": value for name, value in trunk.state_dict().items()},
        **text_state(text),
    }
    names = set(model.state_dict())
    missing = {name for name in names ^ set(state) if not name.endswith("position_ids")}
    if missing:
        raise UserError(
            f"The installed transformers has a VisionTextDualEncoderModel with different weights: {', '.join(sorted(missing)[:3])}."
        )
    model.load_state_dict({name: value.detach().cpu() for name, value in state.items()}, strict=False)
    return model
