"""SLIP's configuration and recipes. CC3M and YFCC15M use the released code's settings with the towers of UniCLIP's and MCD's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class SLIPConfig:
    """SLIP (Mu et al. 2021): CLIP on a weak image view, plus NT-Xent between two strong image views."""

    # Initial temperature τ of CLIP's loss, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # In CLIP's loss, do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    ssl_temperature: float = 0.1  # Fixed temperature of NT-Xent.
    ssl_scale: float = 1.0  # Weight of NT-Xent.
    ssl_hidden: int = 4096  # Width of the two hidden layers of the SSL head.
    ssl_dim: int = 256  # Output width of the SSL head.
    image_view: AugmentationPolicy = WEAK  # Augmentation of the view for CLIP's loss.
    ssl_view: AugmentationPolicy = STRONG  # Augmentation of the two views for NT-Xent.

    def __post_init__(self) -> None:
        for name in ("temperature", "ssl_temperature"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but must be finite and above 0.")
        for name in ("max_logit_scale", "ssl_hidden", "ssl_dim"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but must be finite and at least 1.")
        if not 0 <= self.ssl_scale < math.inf:
            raise UserError(f"ssl_scale is {self.ssl_scale}, but must be finite and at least 0.")


def slip(num_pairs: int) -> TrainConfig:
    """SLIP with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs."""
    small = num_pairs < 100_000  # the paper's head would cost more than these towers
    return default_config(num_pairs, "slip", SLIPConfig(multi_positive=True, ssl_hidden=512 if small else 4096))


def slip_cc3m(num_pairs: int) -> TrainConfig:
    """SLIP ViT-B/16 on CC3M, 40 epochs, with the settings of the released code (lr 3e-3, weight decay 0.1, batch 4096)."""
    return _paper("ViT-B-16", 40)


def slip_yfcc15m(num_pairs: int) -> TrainConfig:
    """SLIP ViT-B/32 on YFCC15M, 32 epochs, with the settings of the released code (SLIP's own table: ViT-B/16, 25 epochs)."""
    return _paper("ViT-B-32", 32)


def _paper(model: str, epochs: int) -> TrainConfig:
    return TrainConfig(
        method="slip",
        method_config=SLIPConfig(),
        model=model,
        batch_size=4096,
        epochs=epochs,
        optimizer=OptimizerConfig(lr=3e-3, weight_decay=0.1, warmup_fraction=1 / epochs),
    )


RECIPES = {"slip": slip, "slip-cc3m": slip_cc3m, "slip-yfcc15m": slip_yfcc15m}
