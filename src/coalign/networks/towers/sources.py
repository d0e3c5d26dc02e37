"""The source of a tower: its configuration and its pretrained weights. Weights of open_clip's models, which both towers may start from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from coalign.errors import UserError, first_line
from coalign.networks.towers.weight_files import SUFFIXES, read_weights

OPEN_CLIP_WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)


@dataclass(frozen=True)
class TowerSource:
    """A pretrained tower.

    Attributes:
        description: As the user named it, for messages.
        cfg: vision_cfg or text_cfg in open_clip's format, with what we add: `quick_gelu` of this tower alone, `preprocess` of images, and
            `embed_dim` of a projection inside the tower. The tower can be built from it alone, without files or downloads.
        embed_dim: Dimension of its pretrained projection, if it has one.
        load: Copies the weights into the built tower, and into its projection if that has dimension `embed_dim`. Raises UserError if they
            do not fit.
        tokenizer: For texts, the value of `--tokenizer` that fits.
    """

    description: str
    cfg: dict[str, Any]
    embed_dim: int | None
    load: Callable[[Any], None]
    tokenizer: str | None = None

    def starts(self, embed_dim: int) -> dict[str, str]:
        """Returns the parts of a tower that start from this source, as in `Tower.starts`, given the dimension of the shared space."""
        parts = ["trunk", "projection"] if self.embed_dim == embed_dim else ["trunk"]
        return dict.fromkeys(parts, self.description)


def first_file(folder: Path, names: tuple[str, ...]) -> Path:
    """Returns the first of the files that exists. Raises UserError if none does."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"The folder {folder} has no weights; it needs {' or '.join(names)}.")


def open_clip_weights(model: str, weights: str) -> tuple[Callable[[], Mapping[str, Tensor]], dict[str, Any] | None]:
    """Returns a function that reads the weights of a model of open_clip, and the settings of a tag, such as the mean of the pixels.

    model: a name of open_clip, or a folder or file of its format. weights: one of its tags, or a file. Raises UserError if there are none.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    if weights in tags:
        return lambda: _tag_state(model, weights), open_clip.get_pretrained_cfg(model, weights) or {}
    if weights.endswith(SUFFIXES):
        if not Path(weights).is_file():
            raise UserError(f"The weights file {weights} does not exist.")
        return lambda: read_weights(weights), None
    hint = f"{', '.join(tags)}, or a file" if tags else "a file"
    problem = f"has no weights named {weights!r}" if weights else "needs weights"
    raise UserError(f"open_clip:{model} {problem}; use open_clip:{model}:WEIGHTS with {hint}.")


def _tag_state(model: str, tag: str) -> Mapping[str, Tensor]:
    try:
        with torch.random.fork_rng(devices=()):
            loaded: Any = open_clip.create_model(model, pretrained=tag, force_custom_text=True, device="cpu")
    except Exception as error:  # the hub's client raises many types: no network, no such file, offline mode
        raise UserError(f"The weights {tag} of {model} could not be downloaded: {first_line(error)}") from error
    return loaded.state_dict()
