"""Shared by all towers: their interface, specification, model configurations, and features."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import open_clip
import timm
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.networks.heads import GLU
from coalign.types import CLIP_PREPROCESS, Preprocess

OWN_CONFIGS = Path(__file__).parents[1] / "configs"
OPEN_CLIP_CONFIG = "open_clip_config.json"  # identifies a folder in open_clip's format
Head = Literal["linear", "mlp", "glu"]


@dataclass(frozen=True)
class TowerSpec:
    """Specifies the towers to build. `name` is a model name, a JSON file, or `timm:TRUNK` (with the text tower of `small`)."""

    name: str
    vocab_size: int
    context_length: int | None = None  # None: the text tower's own
    image_size: int | None = None  # None: the model's own
    pretrained: str | None = None  # an open_clip tag, or a safetensors file or folder of an open_clip model
    image_tower: str | None = None  # where the image tower comes from, instead of from `name`
    text_tower: str | None = None  # where the text tower comes from, instead of from `name`
    batch_norm_group: int = 32
    head: Head = "linear"  # of new projections; others than linear replace pretrained ones
    # "image" and "text" -> `Tower.starts`, of a run whose weights are loaded afterwards
    starts: Mapping[str, Mapping[str, str]] | None = None


class ImageFeatures(NamedTuple):
    pooled: Tensor  # [batch, width]
    patches: Tensor | None  # [batch, row, column, patch_width], after the final norm, or a CNN's last feature map


class TextFeatures(NamedTuple):
    pooled: Tensor  # [batch, width]
    tokens: Tensor | None  # [batch, token, width], after the final norm, zero beyond a caption's length


class Tower(nn.Module, ABC):
    """An encoder of images, texts or both, with the information that cost estimates, compilation, tuning and export need."""

    image_size: int | None = None  # side of its input images in pixels, if it encodes images
    context_length: int | None = None  # maximum number of tokens of its texts, if it encodes texts
    patch_grid: tuple[int, int] | None = None  # rows and columns of the patches, if it can mask them
    has_fixed_shapes = False  # whether shapes are the same in every step, so that it can be compiled
    preprocess = CLIP_PREPROCESS  # of its input images, if it encodes images

    def __init__(self) -> None:
        super().__init__()
        # "trunk" and "projection" -> the weights that the part starts from; an absent part starts from random values
        self.starts: dict[str, str] = {}
        self.frozen: tuple[nn.Module, ...] = ()  # parts that stay in evaluation mode

    def train(self, mode: bool = True) -> Tower:
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @abstractmethod
    def describe_pass(self, *inputs: Any) -> tuple[str, int]:
        """Inputs of `forward` -> the kind of pass, such as "image" or "text", and the number of samples."""

    @abstractmethod
    def dense_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Returns what `forward` returns, from padded sequences with a mask, as a graph cannot pack sequences."""


def find_towers(module: nn.Module) -> list[Tower]:
    """Returns all towers in `module`, also those of teachers."""
    return [child for child in module.modules() if isinstance(child, Tower)]


def new_projection(width: int, embed_dim: int, head: Head = "linear") -> nn.Module:
    """Returns a projection into the shared space with random weights.

    linear has CLIP's initialization. mlp has one hidden layer of twice the shared dimension with GELU, as open_clip's `timm_proj` "mlp".
    """
    if head == "glu":
        return GLU(width, embed_dim)
    if head == "mlp":
        return nn.Sequential(
            nn.Linear(width, 2 * embed_dim), nn.GELU(), nn.Linear(2 * embed_dim, embed_dim, bias=False)
        )
    projection = nn.Linear(width, embed_dim, bias=False)
    nn.init.normal_(projection.weight, std=width**-0.5)
    return projection


def model_names() -> list[str]:
    """Returns all names that `--model` accepts, apart from files and `timm:` trunks."""
    return sorted(path.stem for path in OWN_CONFIGS.glob("*.json")) + open_clip.list_models()


def check_timm_name(name: str) -> None:
    """Raises UserError if timm has no model `name`, which may end in the tag of its weights."""
    architecture, _, tag = name.partition(".")
    if tag and timm.is_model(name) and name not in (tags := timm.list_models(f"{architecture}.*", pretrained=True)):
        raise UserError(f"timm has no weights {tag!r} of {architecture}; use one of {', '.join(tags)}.")
    if not timm.is_model(name):
        import difflib

        near = difflib.get_close_matches(architecture, timm.list_models(), 4, 0.7)
        hint = f"did you mean {', '.join(near)}?" if near else "see `timm.list_models()`."
        raise UserError(f"timm has no model named {name!r}; {hint}")


def model_config(name: str) -> dict[str, Any]:
    """Returns the configuration of a model name, a JSON file, an open_clip folder or `timm:TRUNK`, in open_clip's format, with what
    `TowerSource.cfg` adds. Raises UserError if there is none or it is invalid."""
    if name.startswith("timm:"):
        trunk = name.removeprefix("timm:")
        check_timm_name(trunk)
        config = json.loads((OWN_CONFIGS / "small.json").read_text())
        size = config["vision_cfg"]["image_size"]
        return {**config, "vision_cfg": {"timm_model_name": trunk, "timm_kwargs": {}, "image_size": size}}
    if (Path(name) / OPEN_CLIP_CONFIG).is_file():
        return model_config(str(Path(name) / OPEN_CLIP_CONFIG))
    path = OWN_CONFIGS / f"{name}.json"
    if not path.exists() and name.endswith(".json"):
        path = Path(name)
        if not path.exists():
            raise UserError(f"The model file {name} does not exist.")
    config = _read_config(path) if path.exists() else open_clip.get_model_config(name)
    if config is None:
        import difflib

        near = difflib.get_close_matches(name, model_names(), 4, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see `coalign models`."
        raise UserError(f"Unknown model {name!r}; {hint}")
    kinds = {"embed_dim": int, "vision_cfg": dict, "text_cfg": dict}
    if missing := [key for key, kind in kinds.items() if not isinstance(config.get(key), kind)]:
        raise UserError(f"The configuration of {name} lacks {', '.join(missing)}; use open_clip's format.")
    return config


def _read_config(path: Path) -> dict[str, Any]:
    """Reads a model file, or the open_clip_config.json of a folder, whose `preprocess_cfg` becomes a part of `vision_cfg`."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, UnicodeDecodeError) as error:
        raise UserError(f"The model file {path} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"The model file {path} is not a JSON object; use open_clip's format.")
    preprocess = config.get("preprocess_cfg")
    config = config.get("model_cfg", config)
    vision = config.get("vision_cfg") if isinstance(config, dict) else None
    if not isinstance(vision, dict):
        return config if isinstance(config, dict) else {}
    try:
        values = Preprocess.from_json(preprocess or vision.get("preprocess", {})).to_json()
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"The preprocessing in {path} is invalid: {error}.") from error
    return {**config, "vision_cfg": {**vision, "preprocess": values}} if preprocess else config


def check_activation(name: str, tag: str) -> None:
    """Raises UserError if the weights were trained with a different activation than the model's. open_clip only warns."""
    weights_quick_gelu = bool((open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu", False))
    if weights_quick_gelu != bool(model_config(name).get("quick_gelu", False)):
        matching = f"{name}-quickgelu" if weights_quick_gelu else name.removesuffix("-quickgelu")
        raise UserError(
            f"The weights {tag} were trained with a different activation than {name}; use the model {matching}."
        )
