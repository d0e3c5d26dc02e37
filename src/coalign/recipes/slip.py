"""SLIP's settings. The CC3M and YFCC15M rows are the released code's, on the towers of UniCLIP's and MCD's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import OptimiserConfig
from coalign.recipes.small import small_data
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class SLIPConfig:
    """SLIP (Mu et al. 2021): CLIP on a weak view, and NT-Xent between two strong views of the image."""

    temperature: float = 0.07  # initial temperature τ of image and text, learned as log(1/τ)
    max_logit_scale: float = 100.0  # greatest 1/τ
    # pairs of a batch that share a caption are not each other's negatives between image and text; off is SLIP exactly
    multi_positive: bool = False
    ssl_temperature: float = 0.1  # fixed temperature of NT-Xent
    ssl_scale: float = 1.0  # weight of NT-Xent
    ssl_hidden: int = 4096  # width of the SSL head's two hidden layers
    ssl_dim: int = 256  # width of the SSL head's output
    image_view: AugmentationPolicy = WEAK  # how CLIP's view is drawn
    ssl_view: AugmentationPolicy = STRONG  # how NT-Xent's two views are drawn

    def __post_init__(self) -> None:
        for name in ("temperature", "ssl_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but must be a number above 0.")
        for name in ("max_logit_scale", "ssl_hidden", "ssl_dim"):
            if not 1 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but must be a number of at least 1.")
        if not 0 <= self.ssl_scale < math.inf:
            raise UserError(f"ssl_scale is {self.ssl_scale}, but must be a number of at least 0.")


def slip(num_pairs: int) -> TrainConfig:
    """SLIP with settings for the size of your data: a small model on a laptop up to ViT-B/32 beyond a million pairs."""
    small = num_pairs < 100_000  # where the paper's head would cost more than the tower
    return small_data(num_pairs, "slip", SLIPConfig(multi_positive=True, ssl_hidden=512 if small else 4096))


def slip_cc3m(num_pairs: int) -> TrainConfig:
    """SLIP ViT-B/16 on CC3M, 40 epochs: the settings of its released code (lr 3e-3, weight decay 0.1, batch 4096)."""
    return _paper("ViT-B-16", 40)


def slip_yfcc15m(num_pairs: int) -> TrainConfig:
    """SLIP ViT-B/32 on YFCC15M, 32 epochs, with the settings of its released code (its own table is ViT-B/16, 25 epochs)."""
    return _paper("ViT-B-32", 32)


def _paper(model: str, epochs: int) -> TrainConfig:
    return TrainConfig(
        method="slip",
        method_config=SLIPConfig(),
        model=model,
        batch_size=4096,
        epochs=epochs,
        optimiser=OptimiserConfig(lr=3e-3, weight_decay=0.1, warmup_fraction=1 / epochs, final_lr=1e-5),
    )


RECIPES = {"slip": slip, "slip-cc3m": slip_cc3m, "slip-yfcc15m": slip_yfcc15m}
