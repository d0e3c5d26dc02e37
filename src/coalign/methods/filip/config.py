"""FILIP's configuration and recipes. The paper's own settings need the LAMB optimizer, so none of its rows is a recipe."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class FILIPConfig:
    """FILIP (Yao et al. 2021): InfoNCE in both directions, with similarities of patches and tokens."""

    # Initial temperature τ, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # Do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    image_view: AugmentationPolicy = WEAK  # Augmentation of the image view.
    # "paraphrase": one of the caption's stored paraphrases, if it has any. The paper draws the caption or one of two back-translations.
    text_view: Literal["original", "paraphrase"] = "original"

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be finite and above 0.")
        if not 1 <= self.max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale is {self.max_logit_scale}, but must be finite and at least 1.")
        if self.text_view not in ("original", "paraphrase"):
            raise UserError(f"text_view is {self.text_view!r}, but must be original or paraphrase.")


def filip(num_pairs: int) -> TrainConfig:
    """FILIP with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs.

    The small ResNets leave one patch per 32 × 32 pixels, 2 × 2 of 64. `--model oner-tiny`, a ViT, leaves 8 × 8, at 16 times the cost of
    each comparison.
    """
    return default_config(num_pairs, "filip", FILIPConfig(multi_positive=True))


def filip_yfcc15m(num_pairs: int) -> TrainConfig:
    """FILIP ViT-B/32 on YFCC15M, 32 epochs, with the schedule of Cui et al. 2022 (arXiv 2203.05796; 39.5; lr 5e-4, weight decay 0.5,
    batch 4096). FILIP's own Table 9 has YFCC100M, with batch 8,192, LAMB, base lr 6e-3 and weight decay 0.03."""
    return TrainConfig(
        method="filip",
        method_config=FILIPConfig(image_view=replace(STRONG, crop_scale=(0.2, 1.0))),
        model="ViT-B-32",
        batch_size=4096,
        epochs=32,
        optimizer=OptimizerConfig(
            lr=5e-4, start_lr=1e-4, final_lr=0.0, reaches_final=True, warmup_steps=2500, weight_decay=0.5
        ),
    )


RECIPES = {"filip": filip, "filip-yfcc15m": filip_yfcc15m}
