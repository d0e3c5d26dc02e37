"""Shared by all towers: their interface, specification, model configurations, and features."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
from torch import Tensor, nn

from coalign.errors import UserError

OWN_CONFIGS = Path(__file__).parents[1] / "configs"
ONE_TOWER_WEIGHTS = (None, "timm", "hf")  # values of `pretrained` that load a single tower or none


@dataclass(frozen=True)
class TowerSpec:
    """Specifies the towers to build. `name` is a model name, a JSON file, or `timm:TRUNK` (with the text tower of `small`)."""

    name: str
    vocab_size: int
    context_length: int = 77
    image_size: int | None = None  # None: the model's own
    # an open_clip tag, a safetensors file of an open_clip model or a timm trunk, "timm" for the trunk's timm weights, or "hf" for the text
    # tower's Hugging Face weights
    pretrained: str | None = None
    batch_norm_group: int = 32


class ImageFeatures(NamedTuple):
    pooled: Tensor  # [batch, width]
    patches: Tensor | None  # [batch, row, column, patch_width], after the final norm, or a CNN's last feature map


class TextFeatures(NamedTuple):
    pooled: Tensor  # [batch, width]
    tokens: Tensor | None  # [batch, token, width], after the final norm, zero beyond a caption's length


class Tower(nn.Module, ABC):
    """An encoder of images, texts or both, with the information that cost estimates, compilation and export need."""

    image_size: int | None = None  # side of its input images in pixels, if it encodes images
    patch_grid: tuple[int, int] | None = None  # rows and columns of the patches, if it can mask them
    has_fixed_shapes = False  # whether shapes are the same in every step, so that it can be compiled

    @abstractmethod
    def describe_pass(self, *inputs: Any) -> tuple[str, int]:
        """Inputs of `forward` -> the kind of pass, such as "image" or "text", and the number of samples."""

    @abstractmethod
    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `forward` returns, from padded sequences with a mask, as a graph cannot pack sequences."""


def find_towers(module: nn.Module) -> list[Tower]:
    """Returns all towers in `module`, also those of teachers."""
    return [child for child in module.modules() if isinstance(child, Tower)]


def new_projection(width: int, embed_dim: int) -> nn.Linear:
    """Returns a projection into the shared space with CLIP's initialization."""
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def model_names() -> list[str]:
    """Returns all names that `--model` accepts, apart from files and `timm:` trunks."""
    return sorted(path.stem for path in OWN_CONFIGS.glob("*.json")) + open_clip.list_models()


def model_config(name: str) -> dict[str, Any]:
    """Returns the configuration of a model name, a JSON file, an open_clip folder or `timm:TRUNK`, in open_clip's format. Raises UserError
    if there is none or it is invalid."""
    if name.startswith("timm:"):
        trunk = name.removeprefix("timm:")
        if not timm.is_model(trunk):
            near = timm.list_models(f"*{trunk.split('.')[0][:6]}*")[:5]
            hint = f"did you mean {', '.join(near)}?" if near else "see `timm.list_models()`."
            raise UserError(f"timm has no model named {trunk!r}; {hint}")
        config = json.loads((OWN_CONFIGS / "small.json").read_text())
        return {**config, "vision_cfg": {"timm_model_name": trunk, "image_size": config["vision_cfg"]["image_size"]}}
    if (Path(name) / "open_clip_config.json").is_file():
        return model_config(str(Path(name) / "open_clip_config.json"))
    path = OWN_CONFIGS / f"{name}.json"
    if not path.exists() and name.endswith(".json"):
        path = Path(name)
        if not path.exists():
            raise UserError(f"The model file {name} does not exist.")
    if path.exists():
        try:
            config = json.loads(path.read_text())
        except (ValueError, UnicodeDecodeError) as error:
            raise UserError(f"The model file {path} is not valid JSON: {error}.") from error
        if isinstance(config, dict) and "model_cfg" in config:
            config = config["model_cfg"]
    else:
        config = open_clip.get_model_config(name)
    if config is None:
        import difflib

        near = difflib.get_close_matches(name, model_names(), 4, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see `coalign models`."
        raise UserError(f"Unknown model {name!r}; {hint}")
    missing = {"embed_dim", "vision_cfg", "text_cfg"} - set(config)
    if missing:
        raise UserError(f"The configuration of {name} lacks {', '.join(sorted(missing))}; use open_clip's format.")
    return config


def check_activation(name: str, tag: str) -> None:
    """Raises UserError if the weights were trained with a different activation than the model's. open_clip only warns."""
    weights_quick_gelu = bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))
    if weights_quick_gelu != bool(model_config(name).get("quick_gelu", False)):
        matching = f"{name}-quickgelu" if weights_quick_gelu else name.removesuffix("-quickgelu")
        raise UserError(
            f"The weights {tag} were trained with a different activation than {name}; use the model {matching}."
        )
