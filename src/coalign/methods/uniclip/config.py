"""UniCLIP's configuration and recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class UniCLIPConfig:
    """UniCLIP (Lee et al. 2022): all views of images and texts in one space, MP-NCE, and an augmentation-aware image head."""

    views: tuple[Literal["weak", "strong"], ...] = ("weak", "strong", "strong")  # Image views, in this order.
    text_views: int = 1  # Number of text views: the original caption, then EDA views.
    # Image projection head: a linear layer, an MLP by number of layers, or residual blocks and a linear layer (Table 4a).
    image_head: Literal["linear", "mlp-3", "mlp-6", "residual-1", "residual-3"] = "residual-3"
    augmentation_embedding: bool = True  # Condition the head on each view's augmentation (Table 4a).
    # Control: during training, condition the head on the augmentation of another sample. Needs a single process and no micro-batches.
    foreign_parameters: bool = False
    # Loss of Table 6: MP-NCE (Eq. 12), without weights (Eq. 11), also without trivial pairs (Eq. 9), SupCon (Eq. 6) or MIL-NCE (Eq. 4).
    loss: Literal["mp-nce", "mp-nce-unweighted", "mp-nce-no-trivial", "supcon", "mil-nce"] = "mp-nce"
    domain_similarity: bool = True  # Learn separate τ and b for image-image, image-text and text-text pairs (Table 5).
    # Contrast positives with negatives of all domain combinations instead of only their own (Table 5).
    unified_supervision: bool = True
    # Initial temperature τ, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # Do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    weak_view: AugmentationPolicy = WEAK  # Augmentation of a weak view.
    strong_view: AugmentationPolicy = STRONG  # Augmentation of a strong view.

    def __post_init__(self) -> None:
        if not self.views:
            raise UserError("views is empty, but must list at least one image view: weak or strong.")
        if self.foreign_parameters and not self.augmentation_embedding:
            raise UserError(
                "foreign_parameters has no effect without augmentation_embedding; turn augmentation_embedding on."
            )
        if self.text_views < 1:
            raise UserError(f"text_views is {self.text_views}, but must be at least 1.")
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be finite and above 0.")
        if not 1 <= self.max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale is {self.max_logit_scale}, but must be finite and at least 1.")


SMALL = UniCLIPConfig(multi_positive=True)


def uniclip(num_pairs: int) -> TrainConfig:
    """UniCLIP with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs."""
    return default_config(num_pairs, "uniclip", SMALL)


def uniclip_cc3m(num_pairs: int) -> TrainConfig:
    """UniCLIP ViT-B/16 on CC3M, 50 epochs: Tables 4 to 6. The paper omits the optimizer: lr 5e-4, weight decay 0.5, batch 4096."""
    return _paper("ViT-B-16", 50, lr=5e-4, weight_decay=0.5)


def uniclip_yfcc15m(num_pairs: int) -> TrainConfig:
    """UniCLIP ViT-B/32 on YFCC15M: Tables 1 to 3. The paper omits the schedule: 32 epochs, lr 1e-3, weight decay 0.2, batch 4096."""
    return _paper("ViT-B-32", 32, lr=1e-3, weight_decay=0.2)


def _paper(model: str, epochs: int, lr: float, weight_decay: float) -> TrainConfig:
    return TrainConfig(
        method="uniclip",
        method_config=UniCLIPConfig(),
        model=model,
        batch_size=4096,
        epochs=epochs,
        optimizer=OptimizerConfig(lr=lr, weight_decay=weight_decay, warmup_fraction=1 / epochs),
    )


RECIPES = {"uniclip": uniclip, "uniclip-cc3m": uniclip_cc3m, "uniclip-yfcc15m": uniclip_yfcc15m}
