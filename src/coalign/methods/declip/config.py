"""DeCLIP's configuration and recipes: the rows of its Tables 2, 4, 7 and 8, and the YFCC15M baseline of UniCLIP's and MCD's tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from coalign.config import OptimizerConfig, RoleConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, AugmentationPolicy

EPOCHS, WARMUP_EPOCHS = 32, 1
VIEW = replace(STRONG, crop_scale=(0.2, 1.0))  # App. B; the blur's probability of .5 is from the released code


@dataclass(frozen=True)
class DeCLIPConfig:
    """DeCLIP (Li et al. 2022): CLIP plus self-supervision within each modality, multi-view pairs, and nearest neighbors of the text."""

    # Terms of Table 4. A term that is off needs no forward pass, and its weight is added to CLIP's term.
    multi_view: bool = True  # L_MVS: InfoNCE over the other three pairs of two image views and two text views.
    image_ss: bool = True  # L_ISS: SimSiam between the two image views.
    text_ss: bool = True  # L_TSS: masked language modeling.
    neighbors: bool = True  # L_NNS: InfoNCE of the images with the text's nearest neighbor in a queue.
    ss_weight: float = 0.2  # α of Eq. 2: weight of L_ISS and of L_TSS.
    # β of Eq. 2: weight of the sum over three pairs. Unused with loss_weighting "released_code".
    multi_view_weight: float = 0.2
    neighbor_weight: float = 0.2  # γ of Eq. 2: weight of L_NNS.
    # "paper": Eq. 2, (1 - α - β - γ) · L_CLIP + β · (sum of three pairs). "released_code": one mean over all four pairs, with
    # weight 1 minus the other terms' weights.
    loss_weighting: Literal["paper", "released_code"] = "paper"
    # Text views: the original caption and one EDA view, as in the released code, or two EDA views, as in §3.3.
    text_views: Literal["original_and_eda", "two_eda"] = "original_and_eda"
    mask_p: float = 0.15  # Fraction of tokens predicted by masked language modeling.
    # Contrast the feature of the masked caption, as in Algorithm 1 and the released code. Off: encode the masked caption in a third pass.
    contrast_masked_text: bool = True
    # "paper": both image views with the neighbor of T (§3.3). "algorithm_1": the second image view only. "released_code": both image views
    # with the neighbors of both text views, which both enter the queue.
    neighbor_pairs: Literal["paper", "algorithm_1", "released_code"] = "paper"
    # Compute L_NNS in both directions. The released code uses image to neighbor only.
    neighbor_both_ways: bool = False
    # Exclude entries of the same sample or with the same caption from the neighbors. Off in the paper.
    neighbor_not_own: bool = True
    neighbor_random: bool = False  # Control: use a random entry of the queue instead of the nearest.
    neighbor_start: float = 0.1  # Fraction of the run before L_NNS starts, while the queue fills. 0 in the paper.
    queue_size: int = 65_536  # Size of the text queue.
    projector_width: int = 1024  # Width of SimSiam's three-layer projector and output width of its predictor.
    predictor_width: int = 512  # Hidden width of SimSiam's predictor.
    text_attention: Literal["causal", "bidirectional"] = "causal"  # "bidirectional": BERT, pooled at the start token.
    # Initial temperature τ, learned as log(1/τ). None: of the pretrained model, or 0.07.
    temperature: float | None = 0.07
    max_logit_scale: float = 100.0  # Upper bound of the logit scale 1/τ.
    # Do not use pairs of a batch as negatives of each other if their captions, or their neighbors' captions, are equal. Off in the paper.
    multi_positive: bool = False
    image_view: AugmentationPolicy = VIEW  # Augmentation of both image views.

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, requirement: str) -> None:
            if not condition:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {requirement}.")

        check(self.temperature is None or 0 < self.temperature < math.inf, "temperature", "finite and above 0")
        check(0 < self.mask_p <= 1, "mask_p", "above 0 and at most 1")
        check(0 <= self.neighbor_start <= 1, "neighbor_start", "between 0 and 1")
        for name in ("max_logit_scale", "queue_size", "projector_width", "predictor_width"):
            check(1 <= getattr(self, name) < math.inf, name, "finite and at least 1")
        for name in ("ss_weight", "multi_view_weight", "neighbor_weight"):
            check(0 <= getattr(self, name) < math.inf, name, "finite and at least 0")
        if self.clip_weight <= 0:
            raise UserError(
                f"CLIP's term has weight {self.clip_weight:g}, but must be above 0: lower the other weights."
            )

    @property
    def clip_weight(self) -> float:
        """Weight of L_CLIP: 1 − α − β − γ of Eq. 2 over the enabled terms. With "released_code": weight of the mean over all pairs."""
        neighbors = self.neighbor_weight * self.neighbors
        if self.loss_weighting == "released_code":
            return 1 - self.ss_weight * (self.image_ss + self.text_ss) - neighbors
        return (
            1 - self.ss_weight * (self.image_ss or self.text_ss) - self.multi_view_weight * self.multi_view - neighbors
        )


def declip(num_pairs: int) -> TrainConfig:
    """DeCLIP with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs. The queue holds four batches
    or 5 % of the data, whichever is larger, and at most the paper's 65,536."""
    config = default_config(num_pairs, "declip", DeCLIPConfig())
    queue_size = min(65_536, max(4 * config.batch_size, num_pairs // 20))
    small = num_pairs < 100_000  # the paper's heads would cost as much as these towers
    method_config = DeCLIPConfig(
        multi_positive=True,
        queue_size=queue_size,
        projector_width=256 if small else 1024,
        predictor_width=128 if small else 512,
    )
    return replace(config, method_config=method_config)


# ---------------------------------------------------------------- the paper's rows

TABLE_4_ALL = DeCLIPConfig()
TABLE_4_CLIP = DeCLIPConfig(multi_view=False, image_ss=False, text_ss=False, neighbors=False)
TABLE_4_MVS = replace(TABLE_4_CLIP, multi_view=True)
TABLE_4_SS = replace(TABLE_4_MVS, image_ss=True, text_ss=True)


def _resnet50(batch_size: int, config: DeCLIPConfig = TABLE_4_ALL, model: str = "RN50") -> TrainConfig:
    """App. C, R50: SGD, learning rate .01 → .2 in the first epoch, then cosine decay."""
    optimizer = OptimizerConfig(
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
    return TrainConfig("declip", config, model, batch_size=batch_size, epochs=EPOCHS, optimizer=optimizer)


def _vit(batch_size: int) -> TrainConfig:
    """App. C, V-B32: AdamW for the image tower (lr 1e-4 → 1e-3, weight decay .05), SGD for the text tower (1e-3 → .02, 1e-4)."""
    optimizer = OptimizerConfig(
        lr=1e-3,
        start_lr=1e-4,
        final_lr=0.0,
        reaches_final=True,
        warmup_fraction=WARMUP_EPOCHS / EPOCHS,
        weight_decay=0.05,
        roles={"text": RoleConfig(kind="sgd", lr=0.02, start_lr=1e-3, weight_decay=1e-4, momentum=0.9)},
    )
    return TrainConfig(
        "declip", DeCLIPConfig(), "DeCLIP-ViT-B-32", batch_size=batch_size, epochs=EPOCHS, optimizer=optimizer
    )


def declip_88m_vit(num_pairs: int) -> TrainConfig:
    """Table 2: DeCLIP ViT-B/32 on 88M pairs, 32 epochs, batch 10,240, AdamW for the image tower and SGD for the text tower (66.2)."""
    return _vit(10_240)


def declip_88m_rn50(num_pairs: int) -> TrainConfig:
    """Table 2: DeCLIP ResNet-50 on 88M pairs, 32 epochs, batch 10,240, SGD (62.5)."""
    return _resnet50(10_240)


def declip_88m_regnet(num_pairs: int) -> TrainConfig:
    """Table 2: DeCLIP RegNetY-64GF with a BERT text tower on 88M pairs (73.7). The paper omits its settings; these are ResNet-50's."""
    return _resnet50(10_240, DeCLIPConfig(text_attention="bidirectional"), "DeCLIP-RegNetY-64GF")


def declip_29m_rn50(num_pairs: int) -> TrainConfig:
    """Table 7: DeCLIP ResNet-50 on the 29M open-source pairs, batch 6,144 (49.3)."""
    return _resnet50(6144)


def declip_yfcc15m_rn50(num_pairs: int) -> TrainConfig:
    """Tables 7 and 8: DeCLIP ResNet-50 on YFCC15M (41.9) or, with the same settings, on CC12M (41.0), batch 4,096."""
    return _resnet50(4096)


def declip_yfcc15m(num_pairs: int) -> TrainConfig:
    """DeCLIP ViT-B/32 on YFCC15M, batch 4,096: the baseline of UniCLIP's and MCD's tables, with the optimizers of DeCLIP's App. C."""
    return _vit(4096)


def declip_cc3m(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP + MVS + SS + NNS: DeCLIP ResNet-50 on CC3M, 32 epochs, batch 1,024 (27.2). Table 7's row has batch 2,048 (27.8)."""
    return _resnet50(1024)


def declip_cc3m_ss(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP + MVS + SS: DeCLIP without neighbors (25.4)."""
    return _resnet50(1024, TABLE_4_SS)


def declip_cc3m_mvs(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP + MVS: two views of image and text and no other supervision (24.8)."""
    return _resnet50(1024, TABLE_4_MVS)


def declip_cc3m_clip(num_pairs: int) -> TrainConfig:
    """Table 4, CLIP on DeCLIP's image view (20.6). Controls of Table 9: --epochs 64 (21.7) and twice the --batch-size (22.3)."""
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
