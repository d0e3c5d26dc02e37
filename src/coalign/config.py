"""Configuration of a training run. The comments and docstrings of the fields are the help of `coalign train`.

Does not import torch, to keep that help fast.
"""

from __future__ import annotations

import math
import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from tyro.conf import Suppress, arg

from coalign.errors import UserError

Kind = Literal["adamw", "sgd"]
PRETRAINED_LR = 1e-5  # default peak rate of parts that start from weights, FLYP's
NEW_LR = 1e-3  # of new parts beside them
NOMINAL_PAIRS = 10_000  # assumed dataset size until the data is split, and in the command line's help


@dataclass(frozen=True)
class RoleConfig:
    """Optimizer settings for parameters of one role, such as "image", "text" or "scale". None: the setting for all parameters."""

    kind: Kind | None = None  # Optimization algorithm.
    lr: float | None = None  # Peak learning rate.
    new_lr: float | None = None  # Peak learning rate of parts that start from random values.
    start_lr: float | None = None  # Learning rate at the first warm-up step.
    final_lr: float | None = None  # Learning rate at the end of the run.
    lr_multiplier: float = 1.0  # Multiplier of the learning rate over the whole schedule.
    weight_decay: float | None = None  # Weight decay.
    betas: tuple[float, float] | None = None  # Betas of AdamW.
    eps: float | None = None  # Epsilon of AdamW.
    momentum: float | None = None  # Momentum of SGD.


@dataclass(frozen=True)
class OptimizerConfig:
    """Optimizer and learning rate schedule: linear warm-up, then cosine decay or a constant rate with a cool-down.

    The defaults are those of CLIP in SLIP's experiments.

    Weight decay applies to parameters with at least two dimensions, so not to norms, biases and scales.
    """

    kind: Annotated[Kind, arg(name="optimizer")] = "adamw"  # Optimization algorithm.
    lr: float = 5e-4  # Peak learning rate, reached after warm-up.
    # Peak learning rate of the parts that start from random values, if other parts start from weights. None: --lr.
    new_lr: float | None = None
    start_lr: float | None = None  # Learning rate at the first warm-up step. None: 1e-6, at most a tenth of --lr.
    final_lr: float | None = None  # Learning rate at the end of the run. None: 1e-5, at most a tenth of --lr.
    # After the warm-up: `cosine` decay to the final learning rate; or a `constant` rate, then a cool-down, so that the finished run can be
    # extended.
    schedule: Literal["cosine", "constant"] = "cosine"
    cooldown_fraction: float = 0.2  # Fraction of the run used for the cool-down of a constant schedule.
    warmup_fraction: float = 0.04  # Fraction of the run used for warm-up (0.04: one of 25 epochs).
    warmup_steps: int | None = None  # Number of warm-up steps; overrides --warmup-fraction.
    reaches_final: bool = False  # Reach the final learning rate at the last step instead of one step after it.
    weight_decay: float = 0.5  # Weight decay of matrices and convolutions; norms, biases and scales are not decayed.
    betas: tuple[float, float] = (0.9, 0.98)  # Betas of AdamW.
    eps: float = 1e-8  # Epsilon of AdamW.
    momentum: float = 0.9  # Momentum of SGD.
    roles: Mapping[str, RoleConfig] = field(default_factory=dict)  # Overrides by parameter role.

    def for_role(self, role: str, is_new: bool = False) -> OptimizerConfig:
        """Returns the settings of one role, with its overrides and multiplier applied. Raises UserError if a value is out of range.

        is_new: of the parts that start from random values, in a model of which others do not (`new_lr`).
        """
        override = self.roles.get(role, RoleConfig())
        changes = {
            name: value for name, value in vars(override).items() if value is not None and name != "lr_multiplier"
        }
        merged = replace(self, **changes, roles={})
        lr = merged.new_lr if is_new and merged.new_lr is not None else merged.lr
        start_lr = min(1e-6, lr / 10) if merged.start_lr is None else merged.start_lr
        final_lr = min(1e-5, lr / 10) if merged.final_lr is None else merged.final_lr
        lr, start_lr, final_lr = (rate * override.lr_multiplier for rate in (lr, start_lr, final_lr))
        merged = replace(merged, lr=lr, start_lr=start_lr, final_lr=final_lr)
        _check(role, merged)
        return merged

    def num_warmup_steps(self, total_steps: int) -> int:
        """Number of warm-up steps in a run of `total_steps`."""
        return round(self.warmup_fraction * total_steps) if self.warmup_steps is None else self.warmup_steps

    def cooldown_start(self, total_steps: int) -> int | None:
        """Number of steps before the cool-down in a run of `total_steps`. None: the schedule has no cool-down."""
        if self.schedule == "cosine":
            return None
        start = max(total_steps - round(self.cooldown_fraction * total_steps), self.num_warmup_steps(total_steps))
        return min(start, total_steps)


def _check(role: str, config: OptimizerConfig) -> None:
    def require(condition: bool, name: str, requirement: str) -> None:
        if not condition:
            value = getattr(config, name)
            raise UserError(
                f"Invalid optimizer settings for the role '{role}': {name} is {value}, but must be {requirement}."
            )

    require(config.kind in ("adamw", "sgd"), "kind", "adamw or sgd")
    require(0 <= config.lr < math.inf, "lr", "finite and at least 0")
    for name in ("start_lr", "final_lr"):
        require(0 <= getattr(config, name) <= config.lr, name, f"between 0 and lr ({config.lr})")
    require(config.schedule in ("cosine", "constant"), "schedule", "cosine or constant")
    require(0 <= config.cooldown_fraction < 1, "cooldown_fraction", "at least 0 and less than 1")
    require(0 <= config.warmup_fraction <= 1, "warmup_fraction", "between 0 and 1")
    require((config.warmup_steps or 0) >= 0, "warmup_steps", "at least 0")
    require(config.weight_decay >= 0, "weight_decay", "at least 0")
    require(all(0 <= beta < 1 for beta in config.betas), "betas", "at least 0 and less than 1")
    require(config.eps >= 0, "eps", "at least 0")
    require(0 <= config.momentum < 1, "momentum", "at least 0 and less than 1")


# ---------------------------------------------------------------- marks and ranges of settings

T = TypeVar("T")


class Range(NamedTuple):
    """The valid values of a setting. None is always valid: it stands for a default."""

    requirement: str  # completes "must be …"
    contains: Callable[[Any], bool]


def at_least(minimum: int, reason: str = "") -> Range:
    """Returns the range of numbers from `minimum` on."""
    return Range(f"at least {minimum}" + (f": {reason}" if reason else ""), lambda value: value >= minimum)


POSITIVE = Range("more than 0", lambda value: value > 0)
# values of --image-tuning and --text-tuning
TUNING = Range(
    "full, locked or last:N with the number of blocks to train, such as last:2",
    lambda value: re.fullmatch("full|locked|last:[0-9]+", value) is not None,
)
BELOW_ONE = Range("at least 0 and less than 1", lambda value: 0 <= value < 1)
LAYER_DECAY = Range("more than 0 and at most 1", lambda value: 0 < value <= 1)


def marks(
    *,
    may_change_on_resume: bool = False,
    compared: bool | None = None,
    identifies_trial: bool = False,
    on_card: bool = False,
    valid: Range | None = None,
) -> dict[str, Any]:
    """Returns the metadata of a field of `TrainConfig`.

    may_change_on_resume: the setting does not affect what a step computes. compared: `coalign compare` takes runs that differ in it as
    different, not as seeds of one group (default: unless it may change on resume; patience is compared, since it changes the length of
    a run). identifies_trial: a run that differs in it does not belong to a table. on_card: the model card lists it. valid: its range.
    """
    if compared is None:
        compared = not may_change_on_resume
    return {
        "may_change_on_resume": may_change_on_resume,
        "compared": compared,
        "identifies_trial": identifies_trial,
        "on_card": on_card,
        "valid": valid,
    }


def setting(default: T, **marked: Any) -> T:
    """Returns a dataclass field with a default and `marks`. (To a type checker it is the default, as `dataclasses.field` is.)"""
    return field(default=default, metadata=marks(**marked))


def fields_marked(cls: Any, mark: str) -> tuple[str, ...]:
    """Returns the names of the fields with a mark, such as "may_change_on_resume", in the order of their definition."""
    return tuple(each.name for each in fields(cls) if each.metadata[mark])


# ---------------------------------------------------------------- settings of the data, and of a run


@dataclass(frozen=True)
class DataConfig:
    """How captions, tags and classes are read from the data. Unset columns are detected by name."""

    image_column: str | None = None
    """Column of a table with the image paths, or with the images themselves."""
    caption_column: tuple[str, ...] = ()
    """One or more columns of a table with captions."""
    tag_column: str | None = None
    """Column of a table with tags."""
    separator: str | None = None
    """Separator between the columns of a text table, such as `;`. None: detected."""
    captions_from: str | None = None
    """For images with class labels: make captions of class names. `folder`: names of the images' folders; else a column of the data."""
    prompts: tuple[str, ...] = ()
    """Prompts for class names: one or more templates, such as "a photo of a {}"; or default, imagenet, a dataset's name, or a file."""
    # Column whose equal values mark pairs of the same thing, such as `product_id`: a column of a table, a field of a shard's JSON, or
    # `folder`. Such pairs stay in the same split and are not negatives of each other.
    group_column: str | None = None


DETECT = DataConfig()  # everything is detected


@dataclass(frozen=True)
class TrainConfig:
    """All settings of a training run except its data. A recipe sets the defaults; command-line options override single values.

    Raises UserError for an invalid setting. (The optimizer and the method check their own settings.)
    """

    method: Suppress[str] = field(metadata=marks(identifies_trial=True))
    # the method's own frozen dataclass
    method_config: Suppress[Any] = field(metadata=marks(identifies_trial=True, on_card=True))
    # Model: an open_clip model name, `tiny`, `small`, `timm:NAME` (a timm image encoder), or a JSON file or folder in open_clip's
    # format. `coalign models` lists the names.
    model: str = setting("ViT-B-32", identifies_trial=True)
    pretrained: str | None = setting(None, identifies_trial=True, on_card=True)
    """Initialize from the pretrained weights of an open_clip model: a tag of open_clip, or a safetensors file or folder."""
    # Start from this pretrained image encoder, instead of --model's: `timm:NAME`, `timm:NAME:FILE`, `open_clip:NAME:TAG`, a
    # folder of open_clip or timm, or a file of weights (.safetensors, .pth).
    image_tower: str | None = setting(None, identifies_trial=True, on_card=True)
    # Start from this pretrained text encoder, instead of --model's: `hf:NAME` (from Hugging Face), `open_clip:NAME:TAG`, or a folder of
    # Hugging Face, sentence-transformers or open_clip.
    text_tower: str | None = setting(None, identifies_trial=True, on_card=True)
    init_from: Path | None = setting(None, on_card=True)
    """Initialize from the weights of this run folder. Method and model must be the same; the image size may differ."""
    head: Literal["linear", "mlp", "glu"] = setting("linear", identifies_trial=True, on_card=True)
    """Form of new projections into the shared space, in models of two encoders. mlp and glu replace pretrained projections."""
    # Which pretrained weights of the image encoder to train. full: all; locked: none, only a new projection is trained; last:N: the last N
    # blocks, the norms after them and the projection; last:0: only the projection.
    image_tuning: str = setting("full", valid=TUNING, identifies_trial=True, on_card=True)
    text_tuning: str = setting("full", valid=TUNING, identifies_trial=True, on_card=True)
    """The same for the text encoder."""
    # Multiply the learning rate by this factor per block of the image encoder, counted from the projection: D for the last block, D² for
    # the one before, …
    image_layer_decay: float = setting(1.0, valid=LAYER_DECAY, identifies_trial=True, on_card=True)
    text_layer_decay: float = setting(1.0, valid=LAYER_DECAY, identifies_trial=True, on_card=True)
    """The same for the text encoder."""
    head_epochs: float = setting(0.0, valid=at_least(0), identifies_trial=True, on_card=True)
    """Train only the parts without pretrained weights for this many epochs first, then also the encoders (LP-FT)."""
    # Compute the features of encoders without trained blocks once, for this many random views of each image view and each changed
    # caption, and train on them. 1: the evaluation view. 0: run these encoders in every step.
    feature_views: int = setting(1, valid=at_least(0), identifies_trial=True, on_card=True)
    # Keep these features in this folder, where other runs on the same pairs find them. None: in the run's folder, until its end.
    feature_folder: Path | None = setting(None, may_change_on_resume=True)
    image_size: int | None = setting(None, valid=at_least(1), identifies_trial=True, on_card=True)
    """Side of the square input images in pixels. None: the model's."""
    # Maximum number of tokens per caption, start and end tokens included. Longer captions are truncated. None: the text encoder's, of
    # Hugging Face encoders at most 77. Pretrained positions are stretched to more.
    context_length: int | None = setting(None, valid=at_least(3, "start token, one token, end token"), on_card=True)
    # `clip`, `captions` (a small byte-pair vocabulary trained on the training captions), `hf:NAME` (from Hugging Face), or a file. None:
    # the pretrained text encoder's; from scratch `clip`, or `captions` if the model has another vocabulary than CLIP's.
    tokenizer: str | None = setting(None, on_card=True)
    batch_size: int = setting(256, identifies_trial=True, on_card=True)
    """Global batch size: image-text pairs per step, over all processes."""
    micro_batch: int | None = setting(None, valid=at_least(1), may_change_on_resume=True)
    """Encode this many pairs per process at once, to save memory. None: all. Gradient caching keeps the gradient exact."""
    gradient_checkpointing: bool = setting(False, may_change_on_resume=True)
    """Recompute the blocks of the encoders in the backward pass instead of keeping their activations, to save memory."""
    shard: bool = setting(False, may_change_on_resume=True)
    """Shard parameters, gradients and optimizer states over the processes (FSDP2), for models too large for one device."""
    epochs: float = setting(32, valid=POSITIVE, identifies_trial=True, on_card=True)
    """Passes over the training pairs, those of --head-epochs included. Fractions are allowed."""
    optimizer: Annotated[OptimizerConfig, arg(name="")] = field(default_factory=OptimizerConfig, metadata=marks())
    """Optimizer settings."""
    max_grad_norm: float | None = setting(None, valid=POSITIVE)
    """Clip the gradient to this norm. None: no clipping."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", identifies_trial=True, on_card=True)
    """Autocast precision. auto: bf16 if the device is fast at it, else fp32."""
    compile: bool = setting(False)
    """Compile the image encoders with torch.compile."""
    batch_norm_group: int | None = setting(None, valid=at_least(1))
    """Group size of batch normalization, in samples, for image encoders with BatchNorm layers. None: all that a process encodes at once."""
    seed: int = setting(0, compared=False, on_card=True)
    """Random seed of the initial weights, the order of the samples and the augmentations."""
    # Data loading workers per process. 0: a thread of the process. None: CPU cores over processes, at most 8; 0 up to 10,000 pairs whose
    # decoded images or features are kept. Does not affect the results.
    workers: int | None = setting(None, valid=at_least(0), may_change_on_resume=True)
    # Keep decoded images for later epochs and validations. None: in a quarter of the available memory, if they fit. Otherwise
    # gigabytes on disk, in the system's temporary folder, per machine; 0: off. Does not affect the results.
    image_cache: float | None = setting(None, valid=at_least(0), may_change_on_resume=True)
    device_views: bool = setting(False)
    """Apply color jitter and blur to the image views on the GPU, in batches, instead of in the data loading workers."""
    caption_safe_views: bool = setting(False)
    """Shift no hues if captions name colors, and flip no images if they name sides. Given options of views are kept."""
    reading: Annotated[DataConfig, arg(name="")] = field(
        default_factory=DataConfig, metadata=marks(identifies_trial=True)
    )
    """How the data is read."""
    val_fraction: float = setting(0.05, valid=BELOW_ONE, identifies_trial=True)
    """Fraction of the pairs to hold out for validation if the dataset has no validation split."""
    test_fraction: float = setting(0.0, valid=BELOW_ONE, identifies_trial=True)
    """Fraction of the pairs to hold out as the split `test` if the dataset has none. They are evaluated with --test-splits test."""
    val_by: str | None = setting(None, identifies_trial=True)
    """Split by this column of the dataset, such as author or site: pairs with the same value stay in the same split."""
    group_look_alikes: bool = setting(True)
    """Keep near-duplicate images in the same split, and report those of given splits. Decodes every image once, up to 10 million."""
    train_fraction: float = setting(
        1.0, valid=Range("more than 0 and at most 1", lambda value: 0 < value <= 1), identifies_trial=True
    )
    """Fraction of the training pairs to train on. Smaller fractions are subsets of larger ones, whatever the seed."""
    unpaired_captions: bool = setting(False, identifies_trial=True)
    """Also train on the captions of the pairs that --train-fraction leaves out, without their images (MCT and OneR only)."""
    test_splits: tuple[str, ...] = setting((), identifies_trial=True)
    """Splits of the dataset, such as `test`, on which retrieval is also evaluated at the end of the run."""
    val_data: str | None = setting(None)
    """Validate on this dataset instead of a split of the training data."""
    classes: Path | None = setting(None)
    """File of classes, as for `coalign eval`. Tracks zero-shot accuracy during training, on images whose label or tags include a class."""
    probe: bool = setting(False, may_change_on_resume=True)
    """At the end of the run, also train a linear classifier of --classes on frozen image features of the training pairs."""
    # One or more tasks of `coalign eval`, such as zeroshot:birds: evaluate the start and the result of the run on them, and report what was
    # gained and lost.
    track: tuple[str, ...] = setting((), may_change_on_resume=True)
    data_root: Path | None = setting(None, may_change_on_resume=True)
    """Folder with the named datasets of --track, such as zeroshot:cifar100, each as torchvision unpacks it."""
    evals: int = setting(10, valid=at_least(0), may_change_on_resume=True)
    """Number of validations, evenly spaced over the run. The last one is at the end."""
    patience: int | None = setting(None, valid=at_least(1), may_change_on_resume=True, compared=True)
    """Stop after this many validations without a better validation score. None: never."""
    save_every: int | None = setting(None, valid=at_least(1), may_change_on_resume=True)
    """Steps between checkpoints. None: at every validation, and at least every 10 minutes."""
    skip_data_checks: bool = setting(False, may_change_on_resume=True)
    """Train even if captions look like file names, are nearly all the same or longer than the context, or if no pairs are held out."""
    max_bad_fraction: float = setting(
        0.01, valid=Range("between 0 and 1", lambda value: 0 <= value <= 1), may_change_on_resume=True
    )
    """Stop if more than this fraction of the samples cannot be read."""
    max_non_finite: int = setting(10, valid=at_least(1), may_change_on_resume=True)
    """Stop after this many consecutive steps with a non-finite loss or gradient."""

    def __post_init__(self) -> None:
        for each in fields(self):
            value, valid = getattr(self, each.name), each.metadata["valid"]
            if valid and value is not None and not valid.contains(value):
                raise UserError(f"--{each.name.replace('_', '-')} is {value}, but must be {valid.requirement}.")
        if self.pretrained and (self.image_tower or self.text_tower):
            other = "--image-tower" if self.image_tower else "--text-tower"
            raise UserError(
                f"--pretrained loads both encoders, so it does not go with {other}; give them with --image-tower and --text-tower instead."
            )
        if self.probe and not self.classes:
            raise UserError("--probe needs classes; give them with --classes FILE.")
        if self.unpaired_captions and self.train_fraction == 1:
            raise UserError(
                "--unpaired-captions needs a --train-fraction below 1; otherwise, no captions are left out."
            )
        if self.shard and self.precision == "fp16":
            raise UserError("--shard does not support --precision fp16; use bf16 or fp32.")


# ---------------------------------------------------------------- as JSON


def to_json(config: Any) -> dict[str, Any]:
    """Converts a configuration to JSON values. `from_json` reverses it."""
    return asdict(config, dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings: {"optimizer": {"lr": 1}} -> {"optimizer.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def from_json(cls: Any, value: Any) -> Any:
    """Builds a configuration of type `cls` from the output of `to_json`. Raises TypeError if a field is unknown."""
    if typing.get_origin(cls) is Annotated:
        return from_json(typing.get_args(cls)[0], value)
    if isinstance(cls, type) and is_dataclass(cls) and isinstance(value, dict):
        hints = typing.get_type_hints(cls, include_extras=True)
        unknown = set(value) - {f.name for f in fields(cls)}
        if unknown:
            raise TypeError(f"{cls.__name__} has no field {', '.join(sorted(unknown))}")
        return cls(**{name: from_json(hints[name], item) for name, item in value.items()})
    if typing.get_origin(cls) in (types.UnionType, typing.Union):
        options = [option for option in typing.get_args(cls) if option is not type(None)]
        return None if value is None else from_json(options[0], value)
    if typing.get_origin(cls) is tuple:
        return tuple(value)
    if typing.get_origin(cls) is Mapping:
        return {name: from_json(typing.get_args(cls)[1], item) for name, item in value.items()}
    return Path(value) if cls is Path else value
