"""An image tower's trunk as a timm model: the arguments of timm.create_model, and the weights by timm's names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from torch import nn

from coalign.errors import UserError
from coalign.files import save_tensors, write_json
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.image_sources import CROP_MODES, TIMM_EXPORT
from coalign.networks.towers.pretrained import timm_part

CONFIG, WEIGHTS = TIMM_EXPORT, "model.safetensors"


def to_timm(name: str, vision_cfg: Mapping[str, Any], image: ImageTower, folder: Path) -> None:
    """Writes the trunk of the model `name` into `folder`. `vision_cfg` is the configuration that the image tower was built from.

    Raises UserError for a trunk that is not a timm model.
    """
    if "timm_model_name" not in vision_cfg:
        raise UserError(
            f"timm cannot represent the image tower of {name}, which is not a timm model; export the model to open_clip or transformers."
        )
    preprocess = image.preprocess
    data = {"mean": preprocess.mean, "std": preprocess.std, "interpolation": preprocess.interpolation}
    size = {"input_size": (3, image.image_size, image.image_size)}
    crop = {"crop_mode": CROP_MODES[preprocess.resize_mode], "crop_pct": 1.0}
    kwargs: dict[str, Any] = {
        "model_name": vision_cfg["timm_model_name"],
        "num_classes": 0,
        **vision_cfg.get("timm_kwargs", {}),
        # of timm.data.resolve_model_data_config
        "pretrained_cfg_overlay": {**data, **size, **crop},
    }
    if hasattr(timm_part(image.trunk), "set_input_size"):  # a Transformer, whose positions are those of its image size
        kwargs["img_size"] = image.image_size
    write_json(folder / CONFIG, kwargs)
    weights = {name: value.detach().cpu().contiguous() for name, value in timm_part(image.trunk).state_dict().items()}
    save_tensors(folder / WEIGHTS, weights)


def from_timm(folder: Path) -> nn.Module:
    """Loads an exported folder: normalized pixels [batch, 3, size, size] -> image features [batch, width]."""
    kwargs = json.loads((folder / CONFIG).read_text())
    return timm.create_model(**kwargs, checkpoint_path=str(folder / WEIGHTS))
