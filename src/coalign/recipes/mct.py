"""MCT's settings: its COCO and Stock models, and the rows of its ablations."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import OptimiserConfig, RoleConfig
from coalign.recipes.small import small_data
from coalign.types import STRONG, AugmentationPolicy

TERMS = ("j_ii", "j_tag", "j_cc", "j_ic", "j_ci")
# What keeps the margin losses from being met by drift alone: where the encoders have moved on since a key was queued, a query can be nearer
# to its own, newer key than to all of the queue whatever the images show, and the shared space collapses.
MOST_MOVED = 0.01  # of the momentum encoders, in a step
MOST_DRIFT = (
    0.02  # of them, from a queue's oldest key to its newest; the paper's own is 0.06, at a hundred times the steps
)
VIEW = replace(STRONG, crop_scale=(0.2, 1.0))  # MoCo-v2's augmentations


@dataclass(frozen=True)
class MCTConfig:
    """MCT (Yuan et al. 2021): momentum contrast within images, within captions and between both, and with images that share tags."""

    # the terms of Eq. 15; a term that is off costs no pass, and what no term trains stays as it was initialised
    j_ii: bool = True  # InfoNCE of an image with another view of it, against a queue of images (Eq. 3): MoCo-v2
    j_tag: bool = True  # the same, with the images that share tags as further positives (Eq. 5)
    j_cc: bool = True  # InfoNCE of a caption with a paraphrase of it, against a queue of captions (Eq. 8)
    j_ic: bool = True  # margin loss of an image with its caption, over a queue of captions (Eq. 11)
    j_ci: bool = True  # margin loss of a caption with its image, over a queue of images (Eq. 14)
    tag_weight: float = 1.0  # λ_tag
    text_weight: float = 1.0  # λ_cc
    inter_weight: float = 1e-4  # λ_ic and λ_ci; small, as their terms are sums over the queue
    # negatives of which J_ic and J_ci are sums: with fewer in the queue, the mean is taken times this, which keeps the scale
    margin_negatives: int = 32_768
    margin: float = 0.2  # α of J_ic and J_ci
    temperature: float = 0.07  # τ of J_ii, J_tag and J_cc, fixed
    num_tags: int = 18_157  # the most frequent tags of the data, as many as are told apart
    max_tags: int = 64  # tags of a sample that count, the most frequent ones
    # ε of Eq. 4: images with more common tags than this are positives; None: the least at which they are at most 2 % of the queue
    tag_threshold: int | None = 2
    queue_size: int = 32_768  # K, keys of each queue: 32,768 for COCO, 65,536 for Stock
    # of the momentum encoders; None: 0.999, and down to 0.99 in runs of under 46,000 steps
    teacher_momentum: float | None = None
    # heads of their own for the terms within a modality and for those between both, or one head for all (then of one dimension)
    heads: Literal["distinct", "unified"] = "distinct"
    head_hidden: int = 2048  # width of a head's hidden layer
    intra_dim: int = 128  # dimension of the space within a modality
    inter_dim: int = 1024  # dimension of the space that images and captions share, which is the one for search
    # BERT, read at its start token; "causal", read at its end token, is for CLIP's pretrained text towers
    text_attention: Literal["bidirectional", "causal"] = "bidirectional"
    # keys of the same sample or with the same caption are no negatives; off is MCT exactly
    multi_positive: bool = False
    image_view: AugmentationPolicy = VIEW  # how the images of queries and keys are drawn

    @property
    def terms(self) -> tuple[str, ...]:
        """The terms that are on."""
        return tuple(name for name in TERMS if getattr(self, name))

    def __post_init__(self) -> None:
        def demand(condition: bool, name: str, what: str) -> None:
            if not condition:
                raise UserError(f"{name} is {getattr(self, name)!r}, but must be {what}.")

        if not (self.j_ii or self.j_tag or self.j_ic):
            raise UserError("Nothing trains the images: leave one of j_ii, j_tag and j_ic on.")
        demand(0 < self.temperature < math.inf, "temperature", "a number above 0")
        for name in ("tag_weight", "text_weight", "inter_weight", "margin"):
            demand(0 <= getattr(self, name) < math.inf, name, "a number of at least 0")
        demand(self.tag_threshold is None or self.tag_threshold >= 0, "tag_threshold", "at least 0")
        for name in ("margin_negatives", "num_tags", "queue_size", "head_hidden", "intra_dim", "inter_dim"):
            demand(getattr(self, name) >= 1, name, "at least 1")
        demand(1 <= self.max_tags <= 255, "max_tags", "between 1 and 255")
        momentum = self.teacher_momentum
        demand(momentum is None or 0 <= momentum <= 1, "teacher_momentum", "between 0 and 1")
        demand(self.heads in ("distinct", "unified"), "heads", "distinct or unified")
        demand(self.text_attention in ("bidirectional", "causal"), "text_attention", "bidirectional or causal")
        if self.heads == "unified" and self.intra_dim != self.inter_dim:
            raise UserError(
                f"heads is 'unified', which has one dimension, but intra_dim is {self.intra_dim} and inter_dim {self.inter_dim}; "
                "make them equal."
            )


def mct(num_pairs: int) -> TrainConfig:
    """MCT with settings for the size of your data: a small model on a laptop up to ViT-B/32 beyond a million pairs. The queues hold at
    most a quarter of the data, and no keys from encoders that have moved on."""
    config = small_data(num_pairs, "mct", MCTConfig())
    steps = config.epochs * (num_pairs // config.batch_size)
    moves = min(max(46 / max(1, steps), 0.001), MOST_MOVED)  # 1 - m, as `teacher_momentum` will be
    small = num_pairs < 100_000  # where the paper's heads would cost more than the towers
    method_config = MCTConfig(
        multi_positive=True,
        tag_threshold=None,
        queue_size=max(1, min(32_768, num_pairs // 4, int(MOST_DRIFT * config.batch_size / moves))),
        head_hidden=512 if small else 2048,
        inter_dim=256 if small else 1024,
    )
    # no scale to train; nothing of the towers' own, but named, so that --roles.text.lr and its like can be given
    roles = {"image": RoleConfig(), "text": RoleConfig()}
    return replace(config, method_config=method_config, optimiser=replace(config.optimiser, roles=roles))


# ---------------------------------------------------------------- the paper's models


def _paper(config: MCTConfig, epochs: int, text: RoleConfig) -> TrainConfig:
    """§4.1: ResNet-50 and a text tower of BERT-base's shape, SGD on a cosine without warm-up, batch 512 on 8 GPUs."""
    return TrainConfig(
        method="mct",
        method_config=config,
        model="MCT-RN50",
        batch_size=512,
        batch_norm_group=64,
        epochs=epochs,
        optimiser=OptimiserConfig(
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
    """MCT on COCO with tags, 200 epochs (Table 1: 55.3; --no-j-tag: 54.9). The text tower starts from scratch, so AdamW trains it."""
    return _paper(MCTConfig(num_tags=80), 200, FROM_SCRATCH)


def mct_coco_bert(num_pairs: int) -> TrainConfig:
    """MCT on COCO with a pretrained BERT, which SGD trains at 4e-5 (the paper's default; needs the extra "hf" and the hub)."""
    config = _paper(MCTConfig(num_tags=80), 200, PRETRAINED)
    return replace(config, model="MCT-RN50-BERT", pretrained="hf", tokenizer="hf:bert-base-uncased")


def mct_stock(num_pairs: int) -> TrainConfig:
    """MCT on the 5.8 million pairs of Stock, 60 epochs: 18,157 tags, queues of 65,536 (Tables 5 and 6)."""
    return _paper(MCTConfig(queue_size=65_536, margin_negatives=65_536), 60, FROM_SCRATCH)


RECIPES = {"mct": mct, "mct-coco": mct_coco, "mct-coco-bert": mct_coco_bert, "mct-stock": mct_stock}


# ---------------------------------------------------------------- the ablations

_WITHOUT_TAGS: dict[str, Any] = {"j_tag": False}
_INTRA_OFF: dict[str, Any] = {"j_ii": False, "j_tag": False, "j_cc": False}
_TEXT_OFF: dict[str, Any] = {"j_cc": False, "j_ic": False, "j_ci": False}
# §4.4, as changes to any MCTConfig; the headings are the paper's linear ImageNet accuracy, or its retrieval's R@1
CHANGES: dict[str, dict[str, Any]] = {
    "j_ii": _TEXT_OFF | _WITHOUT_TAGS,  # 49.3, MoCo-v2
    "j_ii+j_tag": _TEXT_OFF,  # 50.2
    "captions": _WITHOUT_TAGS,  # 54.9; 24.1 and 18.6
    "all": {},  # 55.3
    "inter-only": _INTRA_OFF,  # 13.2 and 9.5
    **{
        f"{heads}-{dim}": _WITHOUT_TAGS | {"heads": heads, "intra_dim": dim, "inter_dim": dim}
        for heads in ("unified", "distinct")  # 49.6, 50.2 and 52.3; 53.6, 53.8 and 53.9
        for dim in (128, 1024, 1152)
    },
}
ABLATIONS = {name: replace(MCTConfig(), **changes) for name, changes in CHANGES.items()}
