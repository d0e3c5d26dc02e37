"""MCD's settings: the rows of its Tables 1 to 5."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import OptimiserConfig
from coalign.recipes.small import small_data
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class MCDConfig:
    """MCD (Kim et al. 2023): MP-NCE on an image, its augmentation and its caption, and log-ratio distillation from a momentum teacher."""

    temperature: float = 0.07  # initial temperature τ, learned as log(1/τ)
    max_logit_scale: float = 100.0  # greatest 1/τ
    # image-image, image-text and text-text similarities each have their own τ and offset, as in UniCLIP; off: one τ
    domain_similarity: bool = True
    # pairs of a batch that share a caption are not each other's negatives; off is MCD exactly
    multi_positive: bool = False
    distill_positive: bool = True  # distil the misalignment of an augmented image with its own caption (Eq. 7)
    distill_negative: bool = True  # distil the misalignment of an augmented image with other captions (Eq. 8)
    distill_noisy: bool = True  # distil the misalignment of pairs among each other (Eq. 9)
    # what an original pair is compared with in Eq. 9: other original pairs, or its image with other captions
    noisy_pairs: Literal["pairs", "texts"] = "pairs"
    norm: Literal["squared", "absolute"] = "squared"  # norm of a log-ratio's error (Eq. 6)
    # over the run the augmented image leaves the contrastive loss and the distillation comes (λ of Eq. 13); off: both in full
    progressive: bool = True
    # the teacher's momentum at the start, from where it rises to 1; None: 0.996, and less in runs of under 28,000 steps
    teacher_momentum: float | None = None
    mlm: bool = True  # masked language modelling (Eq. 11)
    mlm_weight: float = 0.2  # weight β of masked language modelling
    mask_p: float = 0.15  # share of a caption's tokens that are masked
    # the masked caption is the one that is contrasted; off: the caption as it is, at the cost of a second text pass
    contrast_masked_text: bool = True
    image_view: AugmentationPolicy = WEAK  # how the original view is drawn
    augmented_view: AugmentationPolicy = STRONG  # how the augmented view is drawn

    @property
    def distills(self) -> bool:
        """Whether any term needs the teacher."""
        return self.distill_positive or self.distill_negative or self.distill_noisy

    def __post_init__(self) -> None:
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be a number above 0.")
        if not 1 <= self.max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale is {self.max_logit_scale}, but must be a number of at least 1.")
        if self.teacher_momentum is not None and not 0 <= self.teacher_momentum <= 1:
            raise UserError(f"teacher_momentum is {self.teacher_momentum}, but must be between 0 and 1.")
        if not 0 <= self.mlm_weight < math.inf:
            raise UserError(f"mlm_weight is {self.mlm_weight}, but must be a number of at least 0.")
        if not 0 < self.mask_p <= 1:
            raise UserError(f"mask_p is {self.mask_p}, but must be above 0 and at most 1; --no-mlm turns masking off.")
        for name, known in (("noisy_pairs", ("pairs", "texts")), ("norm", ("squared", "absolute"))):
            if getattr(self, name) not in known:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be {' or '.join(known)}.")


def mcd(num_pairs: int) -> TrainConfig:
    """MCD with settings for the size of your data: a small model on a laptop up to ViT-B/32 beyond a million pairs."""
    return small_data(num_pairs, "mcd", MCDConfig(multi_positive=True))


def mcd_cc3m(num_pairs: int) -> TrainConfig:
    """MCD ViT-B/16 on CC3M, 40 epochs: its Table 4 (lr 5e-4, weight decay 0.5; batch 4096 is that of its Table 1)."""
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
        optimiser=OptimiserConfig(lr=lr, weight_decay=weight_decay, warmup_fraction=1 / epochs, final_lr=1e-5),
    )


RECIPES = {"mcd": mcd, "mcd-cc3m": mcd_cc3m, "mcd-yfcc15m": mcd_yfcc15m}

_CONTRAST = MCDConfig(distill_positive=False, distill_negative=False, distill_noisy=False, progressive=False)
_WITH_MLM = {
    "mp-nce": _CONTRAST,  # (a)
    "ramp-only": replace(
        _CONTRAST, progressive=True
    ),  # a control that the paper lacks: λ without what it makes room for
    "positive": MCDConfig(distill_negative=False, distill_noisy=False),  # (c)
    "positive+negative": MCDConfig(distill_noisy=False),  # (d)
    "positive+negative+noisy": MCDConfig(),  # (e)
}
# Table 5, whose row (b) is UniCLIP. The paper contradicts itself on masked language modelling: every row with it and without.
TABLE_5 = _WITH_MLM | {f"{name}, no mlm": replace(config, mlm=False) for name, config in _WITH_MLM.items()}
