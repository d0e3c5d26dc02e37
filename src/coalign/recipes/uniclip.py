"""UniCLIP's settings, and the rows of its ablation tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import OptimiserConfig
from coalign.recipes.small import small_data
from coalign.types import STRONG, WEAK, AugmentationPolicy


@dataclass(frozen=True)
class UniCLIPConfig:
    """UniCLIP (Lee et al. 2022): all views of image and text in one space, MP-NCE, and a head that knows the augmentation."""

    views: tuple[Literal["weak", "strong"], ...] = ("weak", "strong", "strong")  # the image views, in this order
    text_views: int = 1  # the caption as it is, and from 2 on copies changed by easy data augmentation
    # image projection head: layers of an MLP or residual blocks, then linear (Table 4a)
    head: Literal["linear", "mlp-3", "mlp-6", "residual-1", "residual-3"] = "residual-3"
    augmentation_embedding: bool = True  # the head sees how each image view was made (Table 4a)
    # control, for batches that are encoded whole on one process: the head is told how another sample's view was made, in training
    foreign_parameters: bool = False
    # Table 6: MP-NCE (Eq. 12), it without weights (Eq. 11), nor trivial pair (Eq. 9), SupCon (Eq. 6), MIL-NCE (Eq. 4)
    loss: Literal["mp-nce", "mp-nce-unweighted", "mp-nce-no-trivial", "supcon", "mil-nce"] = "mp-nce"
    domain_similarity: bool = True  # own τ and b for image-image, image-text and text-text, not shared ones (Table 5)
    # positives compete with negatives of every combination of domains, not only of their own (Table 5)
    unified_supervision: bool = True
    temperature: float = 0.07  # initial temperature τ, learned as log(1/τ)
    max_logit_scale: float = 100.0  # greatest 1/τ
    # pairs of a batch that share a caption are not each other's negatives; off is UniCLIP exactly
    multi_positive: bool = False
    weak_view: AugmentationPolicy = WEAK  # how a "weak" view is drawn
    strong_view: AugmentationPolicy = STRONG  # how a "strong" view is drawn

    def __post_init__(self) -> None:
        if not self.views:
            raise UserError("views is empty, but must name at least one image view, weak or strong.")
        if self.foreign_parameters and not self.augmentation_embedding:
            raise UserError("foreign_parameters is on, but without augmentation_embedding the head is told none.")
        if self.text_views < 1:
            raise UserError(f"text_views is {self.text_views}, but must be a number of at least 1.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be a number above 0.")
        if not 1 <= self.max_logit_scale < math.inf:
            raise UserError(f"max_logit_scale is {self.max_logit_scale}, but must be a number of at least 1.")


def uniclip(num_pairs: int) -> TrainConfig:
    """UniCLIP with settings for the size of your data: a small model on a laptop up to ViT-B/32 beyond a million pairs."""
    return small_data(num_pairs, "uniclip", SMALL)


def uniclip_cc3m(num_pairs: int) -> TrainConfig:
    """UniCLIP ViT-B/16 on CC3M, 50 epochs, as in Tables 4 to 6 (optimiser not printed there: lr 5e-4, weight decay 0.5, batch 4096)."""
    return _paper("ViT-B-16", 50, lr=5e-4, weight_decay=0.5)


def uniclip_yfcc15m(num_pairs: int) -> TrainConfig:
    """UniCLIP ViT-B/32 on YFCC15M, as in Tables 1 to 3 (schedule not printed there: 32 epochs, lr 1e-3, weight decay 0.2, batch 4096)."""
    return _paper("ViT-B-32", 32, lr=1e-3, weight_decay=0.2)


def _paper(model: str, epochs: int, lr: float, weight_decay: float) -> TrainConfig:
    return TrainConfig(
        method="uniclip",
        method_config=UniCLIPConfig(),
        model=model,
        batch_size=4096,
        epochs=epochs,
        optimiser=OptimiserConfig(lr=lr, weight_decay=weight_decay, warmup_fraction=1 / epochs, final_lr=1e-5),
    )


RECIPES = {"uniclip": uniclip, "uniclip-cc3m": uniclip_cc3m, "uniclip-yfcc15m": uniclip_yfcc15m}


# ---------------------------------------------------------------- the ablations

SMALL = UniCLIPConfig(multi_positive=True)
_VIEWS: dict[str, tuple[Literal["weak", "strong"], ...]] = {
    "3-weak": ("weak", "weak", "weak"),
    "1-weak-2-strong": ("weak", "strong", "strong"),
    "3-strong": ("strong", "strong", "strong"),
}
_PLAIN: dict[str, Any] = {"augmentation_embedding": False}
_CHANGES: dict[str, dict[str, Any]] = {
    **{f"4a-plain-{head}": {**_PLAIN, "head": head} for head in ("mlp-3", "mlp-6", "residual-1", "residual-3")},
    **{f"4a-aware-{head}": {"head": head} for head in ("linear", "mlp-3", "mlp-6", "residual-1", "residual-3")},
    **{f"4b-plain-{name}": {**_PLAIN, "head": "residual-1", "views": views} for name, views in _VIEWS.items()},
    **{f"4b-aware-{name}": {"views": views} for name, views in _VIEWS.items()},
    "5-shared-unified": {"domain_similarity": False},
    "5-domain-separated": {"unified_supervision": False},
    "5-domain-unified": {},
    **{
        f"6-{loss}": {"loss": loss}
        for loss in ("mil-nce", "supcon", "mp-nce-no-trivial", "mp-nce-unweighted", "mp-nce")
    },
}
# Every row of Tables 4a, 4b, 5 and 6, on small data. "plain" heads do not see the augmentation embedding, "aware" ones do.
ABLATIONS = {name: replace(SMALL, **changes) for name, changes in _CHANGES.items()}
