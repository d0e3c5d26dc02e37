"""MCT's configuration and recipes: its COCO and Stock models."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from coalign.config import OptimizerConfig, RoleConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import STRONG, AugmentationPolicy

TERMS = ("j_ii", "j_tag", "j_cc", "j_ic", "j_ci")
# Limits on the drift of the momentum encoders. If they drift too far while a key is in the queue, a query is closer to its own, newer key
# than to any queued key regardless of content. The margin losses are then satisfied trivially and the shared space collapses.
MAX_EMA_RATE = 0.01  # 1 - momentum, per step
# between a queue's oldest and newest key; the paper's is 0.06, but over a hundred times the steps
MAX_QUEUE_DRIFT = 0.02
VIEW = replace(STRONG, crop_scale=(0.2, 1.0))  # MoCo-v2's augmentations


@dataclass(frozen=True)
class MCTConfig:
    """MCT (Yuan et al. 2021): momentum contrast within images, within captions and across both, with shared tags as extra positives."""

    # Terms of Eq. 15. A term that is off needs no forward pass; modules that no term trains stay at their initial weights.
    j_ii: bool = True  # InfoNCE between two views of an image, against a queue of images (Eq. 3; MoCo-v2).
    j_tag: bool = True  # The same, with images that share tags as additional positives (Eq. 5).
    j_cc: bool = True  # InfoNCE between two paraphrases of a caption, against a queue of captions (Eq. 8).
    j_ic: bool = True  # Margin loss between an image and its caption, against a queue of captions (Eq. 11).
    j_ci: bool = True  # Margin loss between a caption and its image, against a queue of images (Eq. 14).
    tag_weight: float = 1.0  # λ_tag: weight of J_tag.
    text_weight: float = 1.0  # λ_cc: weight of J_cc.
    inter_weight: float = 1e-4  # λ_ic and λ_ci: weight of J_ic and J_ci, which are sums over the queue.
    # Number of negatives that J_ic and J_ci sum over. With fewer in the queue, their mean is scaled up to this number.
    margin_negatives: int = 32_768
    margin: float = 0.2  # Margin α of J_ic and J_ci.
    temperature: float = 0.07  # Fixed temperature τ of J_ii, J_tag and J_cc.
    num_tags: int = 18_157  # Size of the tag vocabulary: the most frequent tags of the data.
    max_tags: int = 64  # Maximum number of tags per sample; the most frequent ones are kept.
    # ε of Eq. 4: images that share more tags than this are positives. None: the smallest ε that makes at most 2 % of the queue positive.
    tag_threshold: int | None = 2
    queue_size: int = 32_768  # K: size of each queue (32,768 for COCO, 65,536 for Stock).
    # Momentum of the momentum encoders. None: 0.999, or down to 0.99 in runs of under 46,000 steps.
    teacher_momentum: float | None = None
    # "distinct": separate heads for terms within a modality and across modalities. "unified": one head for all terms of a modality.
    heads: Literal["distinct", "unified"] = "distinct"
    head_hidden: int = 2048  # Hidden width of a head.
    intra_dim: int = 128  # Dimension of the spaces within a modality.
    inter_dim: int = 1024  # Dimension of the shared space of images and captions, which retrieval uses.
    # "bidirectional": BERT, pooled at the start token. "causal": pooled at the end token, for CLIP's pretrained text towers.
    text_attention: Literal["bidirectional", "causal"] = "bidirectional"
    # Do not use keys of the same sample or with the same caption as negatives. Off in the paper.
    multi_positive: bool = False
    image_view: AugmentationPolicy = VIEW  # Augmentation of the images of queries and keys.

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the enabled terms."""
        return tuple(name for name in TERMS if getattr(self, name))

    def __post_init__(self) -> None:
        def check(condition: bool, name: str, requirement: str) -> None:
            if not condition:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be {requirement}.")

        if not (self.j_ii or self.j_tag or self.j_ic):
            raise UserError("No enabled term trains the image tower; enable at least one of j_ii, j_tag and j_ic.")
        check(0 < self.temperature < math.inf, "temperature", "finite and above 0")
        for name in ("tag_weight", "text_weight", "inter_weight", "margin"):
            check(0 <= getattr(self, name) < math.inf, name, "finite and at least 0")
        check(self.tag_threshold is None or self.tag_threshold >= 0, "tag_threshold", "at least 0")
        for name in ("margin_negatives", "num_tags", "queue_size", "head_hidden", "intra_dim", "inter_dim"):
            check(getattr(self, name) >= 1, name, "at least 1")
        check(1 <= self.max_tags <= 255, "max_tags", "between 1 and 255")
        momentum = self.teacher_momentum
        check(momentum is None or 0 <= momentum <= 1, "teacher_momentum", "between 0 and 1")
        check(self.heads in ("distinct", "unified"), "heads", "distinct or unified")
        check(self.text_attention in ("bidirectional", "causal"), "text_attention", "bidirectional or causal")
        if self.heads == "unified" and self.intra_dim != self.inter_dim:
            raise UserError(
                f"heads is 'unified', but intra_dim is {self.intra_dim} and inter_dim is {self.inter_dim}; make them equal."
            )


def mct(num_pairs: int) -> TrainConfig:
    """MCT with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs. The queues hold at most a
    quarter of the data, and are short enough that the momentum encoders change little while a key is queued."""
    config = default_config(num_pairs, "mct", MCTConfig())
    steps = config.epochs * (num_pairs // config.batch_size)
    ema_rate = min(max(46 / max(1, steps), 0.001), MAX_EMA_RATE)  # 1 - momentum, as derived by the method
    small = num_pairs < 100_000  # the paper's heads would cost more than these towers
    method_config = MCTConfig(
        multi_positive=True,
        tag_threshold=None,
        queue_size=max(1, min(32_768, num_pairs // 4, int(MAX_QUEUE_DRIFT * config.batch_size / ema_rate))),
        head_hidden=512 if small else 2048,
        inter_dim=256 if small else 1024,
    )
    # no role "scale": τ is fixed; the empty roles make options such as --roles.text.lr available
    roles = {"image": RoleConfig(), "text": RoleConfig()}
    return replace(config, method_config=method_config, optimizer=replace(config.optimizer, roles=roles))


# ---------------------------------------------------------------- the paper's models


def _paper(config: MCTConfig, epochs: int, text: RoleConfig) -> TrainConfig:
    """§4.1: ResNet-50, a text tower of BERT-base's shape, SGD with cosine decay and no warm-up, batch 512 on 8 GPUs."""
    return TrainConfig(
        method="mct",
        method_config=config,
        model="MCT-RN50",
        batch_size=512,
        batch_norm_group=64,
        epochs=epochs,
        optimizer=OptimizerConfig(
            kind="sgd",
            lr=0.03,
            start_lr=0.0,
            final_lr=0.0,
            warmup_fraction=0.0,
            weight_decay=1e-4,
            momentum=0.9,
            roles={"image": RoleConfig(), "text": text},
        ),
    )


FROM_SCRATCH = RoleConfig(kind="adamw", lr=1e-4, weight_decay=0.01, betas=(0.9, 0.999))
PRETRAINED = RoleConfig(lr=4e-5)


def mct_coco(num_pairs: int) -> TrainConfig:
    """MCT on COCO with tags, 200 epochs (Table 1: 55.3; with --no-j-tag 54.9). AdamW trains the text tower, as it starts from scratch."""
    return _paper(MCTConfig(num_tags=80), 200, FROM_SCRATCH)


def mct_coco_bert(num_pairs: int) -> TrainConfig:
    """MCT on COCO with a pretrained BERT, trained by SGD with lr 4e-5 (the paper's default). Needs coalign[hf] and access to the hub."""
    config = _paper(MCTConfig(num_tags=80), 200, PRETRAINED)
    return replace(config, text_tower="hf:bert-base-uncased")


def mct_stock(num_pairs: int) -> TrainConfig:
    """MCT on the 5.8 million pairs of Stock, 60 epochs, 18,157 tags, queues of 65,536 (Tables 5 and 6)."""
    return _paper(MCTConfig(queue_size=65_536, margin_negatives=65_536), 60, FROM_SCRATCH)


RECIPES = {"mct": mct, "mct-coco": mct_coco, "mct-coco-bert": mct_coco_bert, "mct-stock": mct_stock}
