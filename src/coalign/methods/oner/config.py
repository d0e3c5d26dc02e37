"""OneR's configuration and recipes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from coalign.config import OptimizerConfig, TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import default_config
from coalign.types import WEAK, AugmentationPolicy

Loss = Literal["itc", "xmc", "cic", "cmc"]
CHOICES = {
    "heads": ("one", "two"),
    "head_norm": ("batch", "batch_apart", "layer"),
    "pooling": ("mean", "cls", "balanced"),
    "teacher": ("ema", "none"),
    "similarity": ("trained", "projector"),
}


@dataclass(frozen=True)
class OneRConfig:
    """OneR (Jang et al. 2023): one Transformer for images, texts and image-text sequences, contrasted with an EMA copy of itself."""

    losses: tuple[Loss, ...] = ("itc", "cmc")  # Contrastive losses: ITC, XMC, CIC and CMC (Table 2).
    # "one": a single projector for all inputs. "two": one for images and one for texts, for ITC only (Table 1).
    heads: Literal["one", "two"] = "one"
    # Normalization in the heads. "batch": one BatchNorm over all inputs. "batch_apart": separate statistics per kind of
    # input. "layer": LayerNorm.
    head_norm: Literal["batch", "batch_apart", "layer"] = "batch"
    head_hidden: int = 4096  # Hidden width of projector and predictor.
    head_dim: int = 256  # Output width of projector and predictor, the embedding dimension.
    temperature: float = 0.2  # Fixed temperature τ.
    # Feature of a sequence. "mean": mean over its tokens. "cls": [CLS]. "balanced": mean with equal weight for image and text.
    pooling: Literal["mean", "cls", "balanced"] = "mean"
    # Encoder of the contrastive targets. "ema": the EMA copy. "none": the model itself.
    teacher: Literal["ema", "none"] = "ema"
    teacher_momentum: float | None = None  # Fixed EMA momentum. None: 0.996, or lower in runs of under 28,000 steps.
    mlm: bool = True  # Train masked language modeling on texts and image-text sequences.
    mlm_weight: float = 1.0  # Weight of masked language modeling.
    mask_p: float = 0.15  # Fraction of a caption's tokens to mask.
    mim: bool = True  # Train masked image modeling on images and image-text sequences.
    mim_weight: float = 1.0  # Weight of masked image modeling.
    # Fraction of an image's patches to mask at the start and at the end of the run.
    mim_ratio: tuple[float, float] = (0.1, 0.5)
    # Do not treat pairs in a batch that share a caption as negatives of each other. Off in the paper.
    multi_positive: bool = False
    image_view: AugmentationPolicy = WEAK  # Augmentation of the image view.
    # What evaluation and search compare. "trained": what the loss compares, a predicted query with a momentum key, in both
    # directions. "projector": the cosine of the projector's outputs, one vector per input.
    similarity: Literal["trained", "projector"] = "trained"

    @property
    def joint(self) -> bool:
        """Whether the tower also encodes image and text as one sequence: masked modeling covers all three inputs."""
        return "cmc" in self.losses or self.mlm or self.mim

    def __post_init__(self) -> None:
        losses = set(self.losses)
        if not losses or losses - {"itc", "xmc", "cic", "cmc"} or len(losses) < len(self.losses):
            raise UserError(
                f"losses is {' '.join(self.losses) or 'empty'}, but must be one or more of itc, xmc, cic and cmc, each once."
            )
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, but must be {', '.join(choices[:-1])} or {choices[-1]}."
                )
        if self.heads == "two" and self.losses != ("itc",):
            raise UserError("heads is 'two', but only itc has inputs of a single modality; use --losses itc.")
        if self.head_norm == "batch_apart" and "itc" not in self.losses:
            raise UserError(
                "head_norm is 'batch_apart', but only itc trains the head on single images and texts; add itc."
            )
        for name in ("head_hidden", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be finite and above 0.")
        if self.teacher_momentum is not None and not 0 <= self.teacher_momentum <= 1:
            raise UserError(f"teacher_momentum is {self.teacher_momentum}, but must be between 0 and 1.")
        for name in ("mlm_weight", "mim_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but must be finite and at least 0.")
        if not 0 < self.mask_p <= 1:
            raise UserError(
                f"mask_p is {self.mask_p}, but must be above 0 and at most 1; use --no-mlm to turn masking off."
            )
        if not all(0 < ratio <= 1 for ratio in self.mim_ratio):
            raise UserError(
                f"mim_ratio is {self.mim_ratio}, but both values must be above 0 and at most 1; "
                "use --no-mim to turn masking off."
            )


SMALL = OneRConfig(multi_positive=True, head_hidden=512)


def oner(num_pairs: int) -> TrainConfig:
    """OneR with defaults by dataset size: from a small model for a laptop to ViT-B/32 above a million pairs."""
    small = num_pairs < 100_000  # the paper's head would cost more than these towers
    config = default_config(num_pairs, "oner", SMALL if small else replace(SMALL, head_hidden=4096))
    # `tiny` and `small` are ResNets; a single tower needs a ViT, so there is one of equal cost for each
    model = f"oner-{config.model}" if small else config.model
    return replace(config, model=model, optimizer=replace(config.optimizer, roles={}))  # τ is fixed: no role "scale"


def oner_cc3m(num_pairs: int) -> TrainConfig:
    """OneR ViT-B/16 on CC3M, 40 epochs at 224 pixels: its Tables 1, 6 and 7 (batch 4096, lr 1e-4 × batch / 256, weight decay 0.1)."""
    return TrainConfig(
        method="oner",
        method_config=OneRConfig(),
        model="ViT-B-16",
        batch_size=4096,
        epochs=40,
        optimizer=OptimizerConfig(
            lr=1e-4 * 4096 / 256,
            start_lr=0.0,
            final_lr=0.0,
            weight_decay=0.1,
            warmup_fraction=4 / 40,
            betas=(0.9, 0.999),
        ),
    )


def oner_cc3m_384(num_pairs: int) -> TrainConfig:
    """OneR's second stage: 5 more epochs at 384 pixels. Pass the first stage's run to --init-from. The paper omits the learning rate."""
    return replace(oner_cc3m(num_pairs), epochs=5, image_size=384)


RECIPES = {"oner": oner, "oner-cc3m": oner_cc3m, "oner-cc3m-384": oner_cc3m_384}
