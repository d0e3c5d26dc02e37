"""MCD's configuration and recipes: the rows of its Tables 1 to 5."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class MCDConfig:
    """MCD (Kim et al. 2023): MP-NCE over an image, its augmented view and its caption, and log-ratio distillation from an EMA teacher."""

    # Initial temperature τ, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # Learn separate τ and b for image-image, image-text and text-text pairs, as in UniCLIP. Off: one τ.
    domain_similarity: bool = True
    # Do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    distill_positive: bool = True  # Distill the misalignment of an augmented image and its own caption (Eq. 7).
    distill_negative: bool = True  # Distill the misalignment of an augmented image and other captions (Eq. 8).
    distill_noisy: bool = True  # Distill the misalignment between the original pairs of a batch (Eq. 9).
    # What Eq. 9 compares an original pair with: other original pairs, or its image with the captions of others.
    noisy_pairs: Literal["pairs", "texts"] = "pairs"
    norm: Literal["squared", "absolute"] = "squared"  # Norm of the log-ratio error (Eq. 6).
    # Phase the augmented image out of the contrastive loss and the distillation in over the run (λ of Eq. 13). Off: both at full weight.
    progressive: bool = True
    # Initial momentum of the teacher, which rises to 1. None: 0.996, or lower in runs of under 28,000 steps.
    teacher_momentum: float | None = None
    mlm: bool = True  # Train masked language modeling (Eq. 11).
    mlm_weight: float = 0.2  # Weight β of masked language modeling.
    mask_p: float = 0.15  # Fraction of a caption's tokens to mask.
    # Contrast the feature of the masked caption. Off: contrast the original caption, at the cost of a second text pass.
    contrast_masked_text: bool = True
    image_view: AugmentationPolicy = WEAK  # Augmentation of the original view v.
    augmented_view: AugmentationPolicy = STRONG  # Augmentation of the augmented view ṽ.

    @property
    def distills(self) -> bool:
        """Whether any term needs the teacher."""
        return self.distill_positive or self.distill_negative or self.distill_noisy

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be finite and above 0.")
        if not 1 <= self.max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale is {self.max_logit_scale}, but must be finite and at least 1.")
        if self.teacher_momentum is not None and not 0 <= self.teacher_momentum <= 1:
            raise UserError(f"teacher_momentum is {self.teacher_momentum}, but must be between 0 and 1.")
        if not 0 <= self.mlm_weight < math.inf:
            raise UserError(f"mlm_weight is {self.mlm_weight}, but must be finite and at least 0.")
        if not 0 < self.mask_p <= 1:
            raise UserError(
                f"mask_p is {self.mask_p}, but must be above 0 and at most 1; use --no-mlm to turn masking off."
            )
        for name, choices in (("noisy_pairs", ("pairs", "texts")), ("norm", ("squared", "absolute"))):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be {' or '.join(choices)}.")


def mcd(num_pairs: int) -> TrainConfig:
    """MCD with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs."""
    return default_config(num_pairs, "mcd", MCDConfig(multi_positive=True))


def mcd_cc3m(num_pairs: int) -> TrainConfig:
    """MCD ViT-B/16 on CC3M, 40 epochs: its Table 4 (lr 5e-4, weight decay 0.5; batch 4096 as in its Table 1)."""
    return _paper("ViT-B-16", epochs=40, lr=5e-4, weight_decay=0.5)


def mcd_yfcc15m(num_pairs: int) -> TrainConfig:
    """MCD ViT-B/32 on YFCC15M, 32 epochs: its Tables 1, 2 and 3 (lr 1e-3, weight decay 0.2, batch 4096)."""
    return _paper("ViT-B-32", epochs=32, lr=1e-3, weight_decay=0.2)


def _paper(model: str, epochs: int, lr: float, weight_decay: float) -> TrainConfig:
    return TrainConfig(
        method="mcd",
        method_config=MCDConfig(),
        model=model,
        batch_size=4096,
        epochs=epochs,
        optimizer=OptimizerConfig(lr=lr, weight_decay=weight_decay, warmup_fraction=1 / epochs),
    )


RECIPES = {"mcd": mcd, "mcd-cc3m": mcd_cc3m, "mcd-yfcc15m": mcd_yfcc15m}
