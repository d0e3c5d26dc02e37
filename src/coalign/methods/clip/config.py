"""CLIP's configuration and recipes: `clip-strong` follows Fini et al. 2023, those for CC3M and YFCC15M are baselines of MCD's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class CLIPConfig:
    """CLIP (Radford et al. 2021): one image view, one caption, InfoNCE in both directions."""

    # Initial temperature τ, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # Do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    image_view: AugmentationPolicy = WEAK  # Augmentation of the image view.
    # The options below are those of Fini et al. (2023), whose released code has strong views of images and captions.
    # Number of strongly augmented images and captions per pair, which are contrasted after MLP projectors. 2 in Fini et al.
    strong_views: int = 0
    strong_image_view: AugmentationPolicy = STRONG  # Augmentation of the strong image views.
    # Strong text views: the caption after EDA, one of its paraphrases, or the caption itself.
    strong_text: Literal["eda", "paraphrase", "original"] = "eda"
    # Label smoothing of the contrast of strong views: the share of the target that is spread over the batch. 0.1 in Fini et al.
    label_smoothing: float = 0.0
    # Dropout before each block of the text encoder, for strong views. 0.2 on CC3M, 0.05 on CC12M and 0 on YFCC15M in Fini et al.
    text_dropout: float = 0.0
    projector_width: int = 4096  # Width of the two hidden layers of the projectors of strong views.
    strong_temperature: float = 0.1  # Initial temperature of the contrast of strong views, learned as its logarithm.

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, requirement: str) -> None:
            if not condition:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {requirement}.")

        check(self.temperature is None or 0 < self.temperature < math.inf, "temperature", "finite and above 0")
        check(0 < self.strong_temperature < math.inf, "strong_temperature", "finite and above 0")
        check(self.strong_views >= 0, "strong_views", "at least 0")
        check(self.strong_text in ("eda", "paraphrase", "original"), "strong_text", "eda, paraphrase or original")
        for name in ("max_logit_scale", "projector_width"):
            check(1 <= getattr(self, name) < math.inf, name, "finite and at least 1")
        for name in ("label_smoothing", "text_dropout"):
            check(0 <= getattr(self, name) < 1, name, "at least 0 and below 1")
            if getattr(self, name) and not self.strong_views:
                raise UserError(f"{name} is {getattr(self, name)}, but applies to strong views only; set strong_views.")

    @property
    def unused_views(self) -> tuple[str, ...]:
        """Options of image views that are not loaded."""
        return () if self.strong_views else ("strong_image_view",)


def clip(num_pairs: int) -> TrainConfig:
    """CLIP with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs."""
    return default_config(num_pairs, "clip", CLIPConfig(multi_positive=True))


def clip_strong(num_pairs: int) -> TrainConfig:
    """CLIP with two strong views of image and caption, label smoothing, text dropout and MLP projectors (Fini et al. 2023), with defaults
    by dataset size."""
    config = CLIPConfig(
        multi_positive=True,
        strong_views=2,
        label_smoothing=0.1,
        text_dropout=0.2 if num_pairs < 5_000_000 else 0.05,  # of CC3M and of CC12M
        projector_width=512 if num_pairs < 100_000 else 4096,  # the paper's would cost more than these towers
    )
    return default_config(num_pairs, "clip", config)


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


RECIPES = {"clip": clip, "clip-strong": clip_strong, "clip-cc3m": clip_cc3m, "clip-yfcc15m": clip_yfcc15m}
