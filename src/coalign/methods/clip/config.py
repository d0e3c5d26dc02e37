"""CLIP's configuration and recipes. The CC3M and YFCC15M recipes are the baselines of MCD's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import WEAK, AugmentationPolicy


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP (Radford et al. 2021): one image view, one caption, InfoNCE in both directions."""

    # Initial temperature τ, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # Do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    image_view: AugmentationPolicy = WEAK  # Augmentation of the image view.

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be finite and above 0.")
        if not 1 <= self.max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale is {self.max_logit_scale}, but must be finite and at least 1.")


def clip(num_pairs: int) -> TrainConfig:
    """CLIP with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs."""
    return default_config(num_pairs, "clip", CLIPConfig(multi_positive=True))


def clip_cc3m(num_pairs: int) -> TrainConfig:
    """CLIP ViT-B/16 on CC3M, 40 epochs: the baseline of MCD's Table 4 (lr 5e-4, weight decay 0.5, batch 4096)."""
    return TrainConfig(
        method="clip",
        method_config=CLIPConfig(),
        model="ViT-B-16",
        batch_size=4096,
        epochs=40,
        optimizer=OptimizerConfig(lr=5e-4, weight_decay=0.5, warmup_fraction=1 / 40),
    )


def clip_yfcc15m(num_pairs: int) -> TrainConfig:
    """CLIP ViT-B/32 on YFCC15M, 32 epochs: the baseline of MCD's Tables 1 to 3 (lr 1e-3, weight decay 0.2, batch 4096)."""
    return TrainConfig(
        method="clip",
        method_config=CLIPConfig(),
        model="ViT-B-32",
        batch_size=4096,
        epochs=32,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.2, warmup_fraction=1 / 32),
    )


RECIPES = {"clip": clip, "clip-cc3m": clip_cc3m, "clip-yfcc15m": clip_yfcc15m}
