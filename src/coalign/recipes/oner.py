"""OneR's settings, and the rows of its ablation tables."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import OptimiserConfig
from coalign.recipes.small import small_data
from coalign.types import STRONG, WEAK, AugmentationPolicy

Loss = Literal["itc", "xmc", "cic", "cmc"]
CHOICES = {
    "heads": ("one", "two"),
    "head_norm": ("batch", "batch_apart", "layer"),
    "pooling": ("mean", "cls", "balanced"),
    "teacher": ("ema", "none"),
}


@dataclass(frozen=True)
class OneRConfig:
    """OneR (Jang et al. 2023): one Transformer for images, texts and both as one sequence, contrasted with its own moving average."""

    losses: tuple[Loss, ...] = ("itc", "cmc")  # the contrastive losses: ITC, XMC, CIC and CMC (Table 2)
    # one projector for every input, or one for images and one for texts, which only ITC can train (Table 1)
    heads: Literal["one", "two"] = "one"
    # the head's normalisation: one BatchNorm over all inputs, one for each kind of input, or LayerNorm
    head_norm: Literal["batch", "batch_apart", "layer"] = "batch"
    head_hidden: int = 4096  # width of the hidden layers of projector and predictor
    head_dim: int = 256  # width of their output, the embeddings
    temperature: float = 0.2  # fixed temperature τ
    # what a sequence's feature is: the mean of its tokens, [CLS], or the mean with image and text of equal weight
    pooling: Literal["mean", "cls", "balanced"] = "mean"
    # what the right-hand side of a contrast comes from: the moving average, or with none the model itself
    teacher: Literal["ema", "none"] = "ema"
    teacher_momentum: float | None = None  # fixed; None: 0.996, and less in runs of under 28,000 steps
    mlm: bool = True  # masked language modelling, on texts and on pairs as one sequence
    mlm_weight: float = 1.0  # weight of masked language modelling
    mask_p: float = 0.15  # share of a caption's tokens that are masked
    mim: bool = True  # masked image modelling, on images and on pairs as one sequence
    mim_weight: float = 1.0  # weight of masked image modelling
    mim_ratio: tuple[float, float] = (0.1, 0.5)  # share of an image's patches that are masked: first and last
    # pairs of a batch that share a caption are not each other's negatives; off is OneR exactly
    multi_positive: bool = False
    image_view: AugmentationPolicy = WEAK  # how the image view is drawn

    @property
    def joint(self) -> bool:
        """Whether image and text pass the tower as one sequence, too: masked modelling is on all three inputs."""
        return "cmc" in self.losses or self.mlm or self.mim

    def __post_init__(self) -> None:
        if (
            not self.losses
            or set(self.losses) - {"itc", "xmc", "cic", "cmc"}
            or len(set(self.losses)) < len(self.losses)
        ):
            raise UserError(f"losses is {' '.join(self.losses) or 'empty'}, but must be some of itc, xmc, cic and cmc.")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise UserError(
                    f"{name} is {getattr(self, name)!r}, but must be {', '.join(known[:-1])} or {known[-1]}."
                )
        if self.heads == "two" and self.losses != ("itc",):
            raise UserError("heads is 'two', but only itc tells images from texts; use --losses itc.")
        if self.head_norm == "batch_apart" and "itc" not in self.losses:
            raise UserError("head_norm is 'batch_apart', but without itc no image or text alone passes the head.")
        for name in ("head_hidden", "head_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be a number of at least 1.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}, but must be a number above 0.")
        if self.teacher_momentum is not None and not 0 <= self.teacher_momentum <= 1:
            raise UserError(f"teacher_momentum is {self.teacher_momentum}, but must be between 0 and 1.")
        for name in ("mlm_weight", "mim_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{name} is {getattr(self, name)}, but must be a number of at least 0.")
        if not 0 < self.mask_p <= 1:
            raise UserError(f"mask_p is {self.mask_p}, but must be above 0 and at most 1; --no-mlm turns masking off.")
        if not all(0 < ratio <= 1 for ratio in self.mim_ratio):
            raise UserError(
                f"mim_ratio is {self.mim_ratio}, but both must be above 0 and at most 1; --no-mim turns masking off."
            )


SMALL = OneRConfig(multi_positive=True, head_hidden=512)


def oner(num_pairs: int) -> TrainConfig:
    """OneR with settings for the size of your data: a small model on a laptop up to ViT-B/32 beyond a million pairs."""
    small = num_pairs < 100_000  # where the paper's head would cost more than the tower
    config = small_data(num_pairs, "oner", SMALL if small else replace(SMALL, head_hidden=4096))
    # `tiny` and `small` are ResNets: a single tower takes its shape from a ViT that costs as much
    model = f"oner-{config.model}" if small else config.model
    return replace(config, model=model, optimiser=replace(config.optimiser, roles={}))  # τ is fixed: there is no scale


def oner_cc3m(num_pairs: int) -> TrainConfig:
    """OneR ViT-B/16 on CC3M, 40 epochs at 224 pixels, batch 4096: its Tables 1, 6 and 7 (lr 1e-4 × batch / 256, weight decay 0.1)."""
    return TrainConfig(
        method="oner",
        method_config=OneRConfig(),
        model="ViT-B-16",
        batch_size=4096,
        epochs=40,
        optimiser=OptimiserConfig(
            lr=1e-4 * 4096 / 256,
            start_lr=0.0,
            final_lr=0.0,
            weight_decay=0.1,
            warmup_fraction=4 / 40,
            betas=(0.9, 0.999),
        ),
    )


def oner_cc3m_384(num_pairs: int) -> TrainConfig:
    """OneR's second stage: 5 more epochs at 384 pixels; give the first stage's run by --init-from (its learning rate is not stated)."""
    return replace(oner_cc3m(num_pairs), epochs=5, image_size=384)


RECIPES = {"oner": oner, "oner-cc3m": oner_cc3m, "oner-cc3m-384": oner_cc3m_384}


# ---------------------------------------------------------------- the ablations

CHANGES: dict[str, dict[str, Any]] = {
    "1-itc": {"losses": ("itc",)},
    "1-itc-two-heads": {"losses": ("itc",), "heads": "two"},
    "1-itc-xmc": {"losses": ("itc", "xmc")},
    "1-itc-xmc-cic": {"losses": ("itc", "xmc", "cic")},
    "1-itc-cmc": {},
    "7-no-mim": {"mim": False},
    "7-no-mim-no-mlm": {"mim": False, "mlm": False},
    "e-strong-augmentation": {"image_view": STRONG},
    "e-no-teacher": {"teacher": "none"},
}
# Every row of Table 1 (Table 6 has the same), of Table 7 and the two statements of Appendix E, on small data.
ABLATIONS = {name: replace(SMALL, **changes) for name, changes in CHANGES.items()}
