"""DeCLIP's settings. The rows are of its Tables 2, 4, 7 and 8, and the one of YFCC15M is the baseline of UniCLIP's and MCD's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import OptimiserConfig, RoleConfig
from coalign.recipes.small import small_data
from coalign.types import STRONG, AugmentationPolicy

EPOCHS, WARMUP_EPOCHS = 32, 1
VIEW = replace(STRONG, crop_scale=(0.2, 1.0))  # App. B; the probability of the blur, .5, is the released code's


@dataclass(frozen=True)
class DeCLIPConfig:
    """DeCLIP (Li et al. 2022): CLIP with self-supervision in each modality, two views of both, and nearest neighbours of the text."""

    # Table 4's switches: a term that is off costs no pass, and its weight goes back to CLIP's term
    multi_view: bool = True  # L_MVS, InfoNCE of the other three pairs of two image views and two text views
    image_ss: bool = True  # L_ISS, SimSiam between the two image views
    text_ss: bool = True  # L_TSS, masked language modelling
    neighbours: bool = True  # L_NNS, InfoNCE with the nearest neighbour of the text in a queue
    ss_weight: float = 0.2  # α of Eq. 2, of L_ISS and of L_TSS
    # β of Eq. 2, of the sum of three pairs; the released code's weighting does without it
    multi_view_weight: float = 0.2
    neighbour_weight: float = 0.2  # γ of Eq. 2
    # "paper": Eq. 2, (1 - α - β - γ) · L_CLIP + β · the sum of three pairs; "released_code": one mean over the four pairs, with what the
    # other terms' weights leave of 1
    loss_weighting: Literal["paper", "released_code"] = "paper"
    # the released code's pair, or "two text views" of EDA as in §3.3
    text_views: Literal["original_and_eda", "two_eda"] = "original_and_eda"
    mask_p: float = 0.15  # share of the tokens that masked language modelling predicts
    # the masked caption's own feature is contrasted, as in Algorithm 1 and the code; off: a third text pass for the masked caption
    contrast_masked_text: bool = True
    # "paper": both image views with T's neighbour (§3.3); "algorithm_1": the second view alone; "released_code": both with the neighbours
    # of both text views, which both enter the queue
    neighbour_pairs: Literal["paper", "algorithm_1", "released_code"] = "paper"
    # L_NNS also from neighbour to image; the released code has image to neighbour alone
    neighbour_both_ways: bool = False
    # a row of the same sample or with the same caption is no neighbour; off is the paper exactly
    neighbour_not_own: bool = True
    neighbour_random: bool = False  # control: a random row of the queue in place of the nearest
    neighbour_start: float = 0.1  # share of the run before L_NNS begins, in which the queue fills; the paper has none
    queue_size: int = 65_536  # rows of the text queue
    projector_width: int = 1024  # of SimSiam's three-layer projector, and of the predictor's output
    predictor_width: int = 512  # of the predictor's hidden layer
    text_attention: Literal["causal", "bidirectional"] = "causal"  # "bidirectional": BERT, read at its start token
    temperature: float = 0.07  # initial temperature τ, learned as log(1/τ)
    max_logit_scale: float = 100.0  # greatest 1/τ
    # pairs of a batch that share a caption (or a neighbour's) are not each other's negatives; off is DeCLIP exactly
    multi_positive: bool = False
    image_view: AugmentationPolicy = VIEW  # how both image views are drawn

    def __post_init__(self) -> None:
        def demand(condition: bool, name: str, what: str) -> None:
            if not condition:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {what}.")

        demand(0 < self.temperature < math.inf, "temperature", "a number above 0")
        demand(0 < self.mask_p <= 1, "mask_p", "above 0 and at most 1")
        demand(0 <= self.neighbour_start <= 1, "neighbour_start", "between 0 and 1")
        for name in ("max_logit_scale", "queue_size", "projector_width", "predictor_width"):
            demand(1 <= getattr(self, name) < math.inf, name, "a number of at least 1")
        for name in ("ss_weight", "multi_view_weight", "neighbour_weight"):
            demand(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")
        if self.clip_weight <= 0:
            raise UserError(
                f"The weights of DeCLIP's other terms leave {self.clip_weight:g} of 1 to CLIP's; lower them."
            )

    @property
    def clip_weight(self) -> float:
        """Eq. 2's 1 − α − β − γ over the terms that are on; in the released code's weighting, of the mean over pairs."""
        neighbours = self.neighbour_weight * self.neighbours
        if self.loss_weighting == "released_code":
            return 1 - self.ss_weight * (self.image_ss + self.text_ss) - neighbours
        return (
            1 - self.ss_weight * (self.image_ss or self.text_ss) - self.multi_view_weight * self.multi_view - neighbours
        )


def declip(num_pairs: int) -> TrainConfig:
    """DeCLIP with settings for the size of your data: a small model on a laptop up to ViT-B/32 beyond a million pairs. The queue holds
    the larger of four batches and a twentieth of the data, at most the paper's 65,536."""
    config = small_data(num_pairs, "declip", DeCLIPConfig())
    queue_size = min(65_536, max(4 * config.batch_size, num_pairs // 20))
    small = num_pairs < 100_000  # where the paper's heads would cost as much as the towers
    method_config = DeCLIPConfig(
        multi_positive=True,
        queue_size=queue_size,
        projector_width=256 if small else 1024,
        predictor_width=128 if small else 512,
    )
    return replace(config, method_config=method_config)


# ---------------------------------------------------------------- the paper's rows

TABLE_4_ALL = DeCLIPConfig()
TABLE_4_CLIP = DeCLIPConfig(multi_view=False, image_ss=False, text_ss=False, neighbours=False)
TABLE_4_MVS = replace(TABLE_4_CLIP, multi_view=True)
TABLE_4_SS = replace(TABLE_4_MVS, image_ss=True, text_ss=True)


def _resnet50(batch_size: int, config: DeCLIPConfig = TABLE_4_ALL, model: str = "RN50") -> TrainConfig:
    """App. C, R50: SGD, .01 → .2 in the first epoch, then a cosine."""
    optimiser = OptimiserConfig(
        kind="sgd",
        lr=0.2,
        start_lr=0.01,
        final_lr=0.0,
        reaches_final=True,
        warmup_fraction=WARMUP_EPOCHS / EPOCHS,
        weight_decay=1e-4,
        momentum=0.9,
        roles={"scale": RoleConfig(lr_multiplier=0.1)},
    )
    return TrainConfig("declip", config, model, batch_size=batch_size, epochs=EPOCHS, optimiser=optimiser)


def _vit(batch_size: int) -> TrainConfig:
    """App. C, V-B32: AdamW for the image tower (1e-4 → 1e-3, weight decay .05), SGD for the text tower (1e-3 → .02, 1e-4)."""
    optimiser = OptimiserConfig(
        lr=1e-3,
        start_lr=1e-4,
        final_lr=0.0,
        reaches_final=True,
        warmup_fraction=WARMUP_EPOCHS / EPOCHS,
        weight_decay=0.05,
        roles={"text": RoleConfig(kind="sgd", lr=0.02, start_lr=1e-3, weight_decay=1e-4, momentum=0.9)},
    )
    return TrainConfig(
        "declip", DeCLIPConfig(), "DeCLIP-ViT-B-32", batch_size=batch_size, epochs=EPOCHS, optimiser=optimiser
    )


def declip_88m_vit(num_pairs: int) -> TrainConfig:
    """Table 2: DeCLIP ViT-B/32 on 88M pairs, 32 epochs, batch 10,240; AdamW for the image tower, SGD for the text tower (66.2)."""
    return _vit(10_240)


def declip_88m_rn50(num_pairs: int) -> TrainConfig:
    """Table 2: DeCLIP ResNet-50 on 88M pairs, 32 epochs, batch 10,240, SGD (62.5)."""
    return _resnet50(10_240)


def declip_88m_regnet(num_pairs: int) -> TrainConfig:
    """Table 2: DeCLIP RegNetY-64GF with a BERT text tower on 88M pairs (73.7). The paper gives no settings for it: ResNet-50's."""
    return _resnet50(10_240, DeCLIPConfig(text_attention="bidirectional"), "DeCLIP-RegNetY-64GF")


def declip_29m_rn50(num_pairs: int) -> TrainConfig:
    """Table 7: DeCLIP ResNet-50 on the 29M open-source pairs, batch 6,144 (49.3)."""
    return _resnet50(6144)


def declip_yfcc15m_rn50(num_pairs: int) -> TrainConfig:
    """Tables 7 and 8: DeCLIP ResNet-50 on YFCC15M (or, with the same settings, on CC12M), batch 4,096 (41.9; 41.0)."""
    return _resnet50(4096)


def declip_yfcc15m(num_pairs: int) -> TrainConfig:
    """DeCLIP ViT-B/32 on YFCC15M, batch 4,096: the baseline of UniCLIP's and MCD's tables, with the optimisers of DeCLIP's App. C."""
    return _vit(4096)


def declip_cc3m(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP + MVS + SS + NNS: DeCLIP ResNet-50 on CC3M, 32 epochs, batch 1,024 (27.2). Table 7's row has batch 2,048 (27.8)."""
    return _resnet50(1024)


def declip_cc3m_ss(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP + MVS + SS: no neighbours (25.4)."""
    return _resnet50(1024, TABLE_4_SS)


def declip_cc3m_mvs(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP + MVS: two views of image and text, nothing else (24.8)."""
    return _resnet50(1024, TABLE_4_MVS)


def declip_cc3m_clip(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP alone, on DeCLIP's image view (20.6). Table 9's controls: --epochs 64 (21.7), and --batch-size twice that (22.3)."""
    return _resnet50(1024, TABLE_4_CLIP)


RECIPES = {
    "declip": declip,
    "declip-88m-vit-b-32": declip_88m_vit,
    "declip-88m-rn50": declip_88m_rn50,
    "declip-88m-regnety-64gf": declip_88m_regnet,
    "declip-29m-rn50": declip_29m_rn50,
    "declip-yfcc15m": declip_yfcc15m,
    "declip-yfcc15m-rn50": declip_yfcc15m_rn50,
    "declip-cc3m": declip_cc3m,
    "declip-cc3m-ss": declip_cc3m_ss,
    "declip-cc3m-mvs": declip_cc3m_mvs,
    "declip-cc3m-clip": declip_cc3m_clip,
}
