"""Loads open_clip's models for evaluation: a name and its weights, a model on the hub, or an exported folder."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor
from torchvision import transforms

from coalign.errors import UserError
from coalign.networks.open_clip_parts import TextTransformer, VisionTransformer
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.pretrained import linear_from_matrix, take_projection
from coalign.networks.towers.spec import check_activation
from coalign.networks.towers.text import TextTower
from coalign.networks.transformer import is_plain
from coalign.types import DualEncoder, Preprocess

_MAX_TOKENS = 4096
CONFIG = "open_clip_config.json"  # identifies a folder as an open_clip model
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # open_clip's first choices


def from_open_clip(spec: str, device: str | torch.device = "cpu") -> DualEncoder:
    """Loads an open_clip model with its own preprocessing.

    `spec` is `NAME:TAG` (one of open_clip's pretrained tags), `NAME:FILE.safetensors`, `hf-hub:OWNER/NAME`, or a folder that open_clip
    reads. Files and folders are read as safetensors only; downloads are read by open_clip, which runs no code from them. Raises UserError
    if the model cannot be loaded.
    """
    name, options = _parse(spec)
    try:
        options |= {"force_custom_text": True, "require_pretrained": True}
        model = open_clip.create_model(name, precision="fp32", device=device, **options).eval()
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the hub client and mismatched weights raise many types
        raise UserError(f"open_clip cannot load {spec}: {str(error).splitlines()[0]}") from error
    cfg = open_clip.get_model_preprocess_cfg(model)
    sides: Sequence[int] = (cfg["size"],) if isinstance(cfg["size"], int) else cfg["size"]
    size = sides[0]
    if len(set(sides)) > 1:
        raise UserError(f"{spec} takes images of {sides[0]} × {sides[1]} pixels; only square ones are supported.")
    settings = Preprocess.from_json(cfg)
    image = _image_tower(model.visual, size, settings).to(device)
    encoders = _ImageEncoder(image), _text_encoder(model.text, tokenizer)
    return DualEncoder(
        encode_image=lambda pixels: encoders[0](pixels.to(device)),
        encode_text=encoders[1],
        image_size=size,
        name=spec,
        logit_scale=float(model.logit_scale.detach().exp()),
        image_features=lambda pixels: image(pixels.to(device)).pooled,
        preprocess=OpenClipPreprocess(size, settings, cfg["fill_color"]),
        modules=lambda: copy.deepcopy(encoders),
        weights=lambda: {**image.state_dict(), **model.state_dict()},
        num_tokens=lambda text: _num_tokens(tokenizer, text),
        context_length=tokenizer.context_length,
    )


def _num_tokens(tokenizer: Any, text: str) -> int:
    """Returns the number of tokens of a text, up to _MAX_TOKENS. All tokenizers of open_clip pad to the context length."""
    ids = tokenizer([text], context_length=_MAX_TOKENS)[0]
    is_padding = (ids == ids[-1]).flip(0).cumprod(0)
    return _MAX_TOKENS - int(is_padding.sum())


class _ImageEncoder(torch.nn.Module):
    def __init__(self, image: ImageTower) -> None:
        super().__init__()
        self.image = image

    def forward(self, pixels: Tensor) -> Tensor:
        return self.image.projection(self.image(pixels).pooled)


class _TextEncoder(torch.nn.Module):
    """open_clip's text tower with its tokenizer."""

    def __init__(self, text: torch.nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.text, self.tokenizer = text, tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        embeds = self.text(self.tokenizer(list(texts)).to(next(self.parameters()).device))
        return embeds[0] if isinstance(embeds, tuple) else embeds  # CoCa's tower also returns its tokens


class _PackedTextEncoder(torch.nn.Module):
    """The same weights in our text tower, which skips the padding."""

    def __init__(self, text: TextTransformer, tokenizer: Any) -> None:
        super().__init__()
        projection = linear_from_matrix(text.text_projection)
        self.tower = TextTower(text, projection.out_features, "causal", "end", projection).eval()
        self.tokenizer = tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(texts)).to(next(self.parameters()).device)
        lengths = ids.argmax(1) + 1  # the end token is the largest id
        return self.tower.projection(self.tower(ids[:, : int(lengths.max())], lengths).pooled)


@dataclass(frozen=True)
class OpenClipPreprocess:
    """open_clip's transform without its normalization: PIL image -> uint8 [3, size, size]."""

    size: int
    settings: Preprocess
    fill_color: int = 0

    @cached_property
    def _transform(self) -> Any:
        transform = open_clip.image_transform(
            self.size,
            is_train=False,
            resize_mode=self.settings.resize_mode,
            interpolation=self.settings.interpolation,
            fill_color=self.fill_color,
        )
        *geometry, _, _ = transform.transforms  # without ToTensor and Normalize
        return transforms.Compose([*geometry, transforms.PILToTensor()])

    def __call__(self, image: Any) -> Tensor:
        return self._transform(image)


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """Returns the name and keyword arguments for open_clip.create_model."""
    if Path(spec).is_dir():
        if not (Path(spec) / CONFIG).is_file():
            raise UserError(f"{spec} is not an open_clip folder: it does not contain {CONFIG}.")
        if not any((Path(spec) / name).is_file() for name in WEIGHTS):
            raise UserError(f"{spec} does not contain {' or '.join(WEIGHTS)}; other weight files are not read.")
        return f"local-dir:{spec}", {}
    if spec.startswith("hf-hub:"):
        return spec, {}
    name, _, tag = spec.partition(":")
    if open_clip.get_model_config(name) is None:
        matches = difflib.get_close_matches(name, open_clip.list_models(), 4, 0.5)
        hint = f"did you mean {', '.join(matches)}?" if matches else "see `coalign models`."
        raise UserError(f"{name!r} is neither an open_clip model nor a folder; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag in tags:
        check_activation(name, tag)
    if tag in tags or (tag.endswith(".safetensors") and Path(tag).is_file()):
        return name, {"pretrained": tag}
    problem = f"has no weights named {tag!r}" if tag else "needs weights"
    known = f"{', '.join(tags)}, or " if tags else ""
    raise UserError(
        f"open_clip:{name} {problem}; give open_clip:{name}:WEIGHTS with {known}an existing .safetensors file."
    )


def _image_tower(visual: Any, size: int, preprocess: Preprocess) -> ImageTower:
    if isinstance(visual, VisionTransformer) and visual.proj is None:
        return ImageTower(visual, visual.output_dim, visual.output_dim, size, torch.nn.Identity(), preprocess)
    width, projection = take_projection(visual, int(getattr(visual, "output_dim", 0)))
    return ImageTower(visual, width, 0, size, projection, preprocess).eval()


def _text_encoder(text: Any, tokenizer: Any) -> torch.nn.Module:
    """Wraps a text tower with its tokenizer, as a TextTower if that can represent it."""
    is_representable = (
        isinstance(text, TextTransformer)
        and is_plain(text.transformer)
        and text.pool_type == "argmax"
        and text.attn_mask is not None
        and text.cls_emb is None
        and isinstance(text.text_projection, torch.nn.Parameter)
    )
    return _PackedTextEncoder(text, tokenizer) if is_representable else _TextEncoder(text, tokenizer)
