"""Loads CLIPModels and VisionTextDualEncoderModels of Hugging Face transformers for evaluation (extra "hf")."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from coalign.errors import UserError
from coalign.interop.transformers.export import read_preprocessor
from coalign.types import DualEncoder, Preprocess


def from_transformers(name: str, device: str | torch.device = "cpu") -> DualEncoder:
    """Loads a CLIPModel or VisionTextDualEncoderModel from a folder or the hub, with its own tokenizer and preprocessing.

    Only safetensors are read. Raises UserError if it cannot be loaded or is of another class.
    """
    try:
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoTokenizer
        from transformers.utils import logging
    except ImportError:
        raise UserError('Models of transformers need the extra "hf": pip install "coalign[hf]".') from None
    logging.disable_progress_bar()
    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except Exception as error:  # the hub client raises many types: no network, no such file, offline mode
        raise UserError(f"transformers cannot load {name}: {str(error).splitlines()[0]}") from error
    if kind not in ("clip", "vision-text-dual-encoder"):
        raise UserError(
            f"{name} is a {kind} model; only a CLIPModel or VisionTextDualEncoderModel of transformers can be evaluated."
        )
    try:
        model = AutoModel.from_pretrained(name, use_safetensors=True).float().eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(name)
        processor = AutoImageProcessor.from_pretrained(name)
    except Exception as error:
        raise UserError(f"transformers cannot load {name}: {str(error).splitlines()[0]}") from error
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (processor.image_mean, processor.image_std))

    def image_features(pixels: Tensor) -> Tensor:
        return model.vision_model((pixels.to(device) / 255 - mean) / std).pooler_output

    def modules() -> tuple[nn.Module, nn.Module]:
        trainable = copy.deepcopy(model)
        return _ImageEncoder(trainable, mean, std), _TextEncoder(trainable, tokenizer)

    return DualEncoder(
        encode_image=lambda pixels: model.visual_projection(image_features(pixels)),
        encode_text=_TextEncoder(model, tokenizer),
        image_size=getattr(model.config.vision_config, "image_size", None) or processor.crop_size["height"],
        name=name,
        logit_scale=float(model.logit_scale.detach().exp()),
        image_features=image_features,
        preprocess=TransformersPreprocess(processor),
        modules=modules,
        weights=model.state_dict,
        num_tokens=lambda text: len(tokenizer(text, verbose=False).input_ids),
        context_length=min(tokenizer.model_max_length, model.config.text_config.max_position_embeddings),
    )


class _ImageEncoder(nn.Module):
    """uint8 pixels -> embeds of a CLIPModel."""

    def __init__(self, model: Any, mean: Tensor, std: Tensor) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = model.vision_model, model.visual_projection
        self.mean, self.std = mean, std

    def forward(self, pixels: Tensor) -> Tensor:
        return self.visual_projection(self.vision_model((pixels / 255 - self.mean) / self.std).pooler_output)


class _TextEncoder(nn.Module):
    """Texts -> embeds of a CLIPModel."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        super().__init__()
        self.text_model, self.text_projection, self.tokenizer = model.text_model, model.text_projection, tokenizer

    def forward(self, texts: Sequence[str]) -> Tensor:
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        inputs = inputs.to(self.text_projection.weight.device)
        return self.text_projection(self.text_model(inputs.input_ids, inputs.attention_mask).pooler_output)


def is_transformers_folder(folder: Path) -> bool:
    """Whether the folder's config.json is from transformers."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


@dataclass(frozen=True)
class TransformersPreprocess:
    """An image processor's geometry, without its scaling and normalization: PIL image -> uint8 [3, size, size]."""

    processor: Any

    @property
    def settings(self) -> Preprocess:
        return read_preprocessor(self.processor)

    def __call__(self, image: Any) -> Tensor:
        values = self.processor(image, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values[0]
        return torch.from_numpy(np.asarray(values)).round().clamp(0, 255).to(torch.uint8)
