"""open_clip's models as evaluation takes them: a name and its weights, a model of the hub, or an exported folder."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor
from torchvision import transforms

from coalign.errors import UserError
from coalign.networks.towers import ImageTower, TextTower, check_activation, take_projection, transposed
from coalign.networks.transformer import is_plain
from coalign.types import DualEncoder

CONFIG = "open_clip_config.json"  # what makes a folder one of open_clip's models
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")  # which it takes before all others


def from_open_clip(spec: str, device: str | torch.device = "cpu") -> DualEncoder:
    """The model `NAME:TAG` (one of open_clip's pretrained), `NAME:FILE.safetensors`, `hf-hub:OWNER/NAME`, or a folder that open_clip reads,
    with open_clip's own preprocessing. Files and folders are read as safetensors alone; what open_clip fetches, as it reads it, which runs
    no code of theirs. UserError for what is not there."""
    name, options = _parse(spec)
    try:
        options |= {"force_custom_text": True, "require_pretrained": True}
        model = open_clip.create_model(name, precision="fp32", device=device, **options).eval()
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the hub's client has many, and so have weights that do not fit
        raise UserError(f"open_clip cannot load {spec}: {str(error).splitlines()[0]}") from error
    cfg = PreprocessCfg(**open_clip.get_model_preprocess_cfg(model))
    size = cfg.size if isinstance(cfg.size, int) else cfg.size[0]
    if not isinstance(cfg.size, int) and len(set(cfg.size)) > 1:
        raise UserError(f"{spec} takes images of {cfg.size[0]} × {cfg.size[1]} pixels; only square ones are supported.")
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (cfg.mean, cfg.std))
    image = _image_tower(model.visual, size)
    image.mean, image.std = mean * 255, std * 255
    encoders = _ImageEncoder(image), _text_encoder(model.text, tokenizer)
    return DualEncoder(
        encode_image=lambda pixels: encoders[0](pixels.to(device)),
        encode_text=encoders[1],
        image_size=size,
        name=spec,
        logit_scale=float(model.logit_scale.detach().exp()),
        image_features=lambda pixels: image(pixels.to(device)),
        preprocess=open_clip_preprocess(cfg),
        modules=lambda: copy.deepcopy(encoders),
        weights=lambda: {**image.state_dict(), **model.state_dict()},
    )


class _ImageEncoder(torch.nn.Module):
    def __init__(self, image: ImageTower) -> None:
        super().__init__()
        self.image = image

    def forward(self, pixels: Tensor) -> Tensor:
        return self.image.projection(self.image(pixels))


class _TextEncoder(torch.nn.Module):
    """open_clip's text tower with its tokenizer."""

    def __init__(self, text: torch.nn.Module, tokenizer: Any) -> None:
        super().__init__()
        self.text, self.tokenizer = text, tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        embeds = self.text(self.tokenizer(list(texts)).to(next(self.parameters()).device))
        return embeds[0] if isinstance(embeds, tuple) else embeds  # CoCa's tower gives its tokens, too


class _PackedTextEncoder(torch.nn.Module):
    """The same by our text tower, which spares the padding."""

    def __init__(self, text: TextTransformer, tokenizer: Any) -> None:
        super().__init__()
        projection = transposed(text.text_projection)
        self.tower = TextTower(text, projection.out_features, "causal", "end", projection).eval()
        self.tokenizer = tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        ids = self.tokenizer(list(texts)).to(next(self.parameters()).device)
        lengths = ids.argmax(1) + 1  # the end token is the largest id
        return self.tower.projection(self.tower(ids[:, : int(lengths.max())], lengths).pooled)


def open_clip_preprocess(cfg: PreprocessCfg) -> Any:
    """open_clip's transform as far as the pixels: PIL image -> uint8 [3, size, size]."""
    *geometry, _, _ = image_transform_v2(cfg, is_train=False).transforms  # without ToTensor and Normalize
    return transforms.Compose([*geometry, transforms.PILToTensor()])


def _parse(spec: str) -> tuple[str, dict[str, Any]]:
    """What open_clip.create_model takes."""
    if Path(spec).is_dir():
        if not (Path(spec) / CONFIG).is_file():
            raise UserError(f"{spec} is no folder of open_clip's: there is no {CONFIG} in it.")
        if not any((Path(spec) / name).is_file() for name in WEIGHTS):
            raise UserError(f"{spec} holds no weights in {' or '.join(WEIGHTS)}; others are not read.")
        return f"local-dir:{spec}", {}
    if spec.startswith("hf-hub:"):
        return spec, {}
    name, _, tag = spec.partition(":")
    if open_clip.get_model_config(name) is None:
        near = difflib.get_close_matches(name, open_clip.list_models(), 4, 0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see `coalign models`."
        raise UserError(f"open_clip has no model named {name!r}, nor is there such a folder; {hint}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if tag in tags:
        check_activation(name, tag)
    if tag in tags or (tag.endswith(".safetensors") and Path(tag).is_file()):
        return name, {"pretrained": tag}
    what = f"has no weights named {tag!r}" if tag else "needs weights"
    known = f"{', '.join(tags)}, or " if tags else ""
    raise UserError(
        f"open_clip:{name} {what}; give open_clip:{name}:WEIGHTS with {known}a .safetensors file that is there."
    )


def _image_tower(visual: Any, size: int) -> ImageTower:
    if isinstance(visual, VisionTransformer) and visual.proj is None:
        return ImageTower(visual, visual.output_dim, visual.output_dim, size, torch.nn.Identity())
    width, projection = take_projection(visual, int(getattr(visual, "output_dim", 0)))
    return ImageTower(visual, width, 0, size, projection).eval()


def _text_encoder(text: Any, tokenizer: Any) -> torch.nn.Module:
    """Packed, unless it is a tower that ours cannot stand for."""
    fits = (
        isinstance(text, TextTransformer)
        and is_plain(text.transformer)
        and text.pool_type == "argmax"
        and text.attn_mask is not None
        and text.cls_emb is None
        and isinstance(text.text_projection, torch.nn.Parameter)
    )
    return _PackedTextEncoder(text, tokenizer) if fits else _TextEncoder(text, tokenizer)
