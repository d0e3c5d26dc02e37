"""The configuration of a training run. Imports no torch: it is read to print help."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Suppress, arg

from coalign.optim import OptimiserConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on besides its data. A recipe fills it; options on the command line override single values."""

    method: Suppress[str]
    method_config: Suppress[Any]  # the method's own frozen dataclass
    model: str = "ViT-B-32"
    """Towers: an open_clip model name, a JSON file or a folder in open_clip's form, `timm:TRUNK`, or one of ours (`small`)."""
    pretrained: str | None = None
    """Start from these weights: an open_clip tag, a safetensors file or a folder of an open_clip model, a safetensors file of a timm trunk
    (as `coalign export --to timm` writes it; the text tower starts anew), `timm` for a trunk's own, or `hf` for those of a Hugging Face
    text tower."""
    init_from: Path | None = None
    """Start from the weights of this run's folder, of the same method and model; the image size may be another one."""
    image_size: int | None = None
    """Side of the square input in pixels (default: the model's own)."""
    context_length: int = 77
    """The most tokens of a caption, start and end included; longer ones are cut."""
    tokenizer: str = "clip"
    """`clip`, `captions` (train a small byte-pair vocabulary on the training captions), `hf:NAME` (that of a Hugging Face model), or a
    tokenizer file."""
    batch_size: int = 256
    """Pairs a step, over all processes."""
    micro_batch: int | None = None
    """Pairs held in memory at once, a process; the gradient stays that of the whole batch."""
    shard: bool = False
    """Divide weights, gradients and optimiser states over the processes (FSDP2), for a model that is too large for one device each."""
    epochs: float = 32
    """Passes over the training pairs."""
    optimiser: Annotated[OptimiserConfig, arg(name="")] = field(default_factory=OptimiserConfig)
    """The optimiser's settings."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; auto is bf16 where the processor is fast at it, else fp32."""
    compile: bool = False
    """Compile the image towers with torch.compile."""
    batch_norm_group: int = 32
    """Samples a batch-norm group, for trunks that have BatchNorm."""
    seed: int = 0
    """Seed of the initial weights, the order and every view."""
    workers: int | None = None
    """Loader processes (default: one a core, at most 8). The run does not depend on it."""
    image_cache: float = 0.0
    """Gigabytes of decoded images to keep in the system's temporary folder for the next epochs, for all processes of a machine. Helps where
    a good part of the data fits; a JPEG is kept at each of the sizes that views ask for, at most a third more than its full one."""
    device_views: bool = False
    """Make colours and blur of the image views on the GPU, a batch at a time, and not in the loader processes."""
    val_fraction: float = 0.05
    """Share of the pairs held out when the data has no split of its own."""
    val_by: str | None = None
    """Hold out whole groups of samples that have the same value in this column of the data (an author, a site), so that validation is on
    others."""
    train_fraction: float = 1.0
    """Share of the training pairs to train on; a smaller share is part of a larger one, whatever the seed."""
    rest_as_texts: bool = False
    """Train on what train_fraction leaves out, too, by its captions alone, with methods that take texts without images (MCT, OneR)."""
    test_splits: tuple[str, ...] = ()
    """Splits of the data's own on which retrieval is evaluated too at the end, such as `test`."""
    val_data: str | None = None
    """Validate on this data instead."""
    classes: Path | None = None
    """Your own classes, one a line: their zero-shot accuracy is followed during training (images whose tags or folder name one)."""
    probe: bool = False
    """At the end, also tell `classes` apart by a linear classifier on frozen image features, which learns from the training pairs."""
    evals: int = 10
    """Validations during the run, evenly spaced; the last one is at its end."""
    patience: int | None = None
    """Stop after this many validations without a better validation score."""
    save_every: int | None = None
    """Steps between checkpoints (default: at every validation and at least every 10 minutes)."""
    max_bad_fraction: float = 0.01
    """Stop when more than this share of the samples seen cannot be read."""
    max_non_finite: int = 10
    """Stop after this many steps in a row with a loss or gradient that is not finite."""


# ---------------------------------------------------------------- as JSON


def to_json(config: Any) -> dict[str, Any]:
    """A configuration as plain values, for `from_json` and for people."""
    return asdict(config, dict_factory=lambda items: {k: str(v) if isinstance(v, Path) else v for k, v in items})


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optimiser": {"lr": 1}} -> {"optimiser.lr": 1}."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {f"{prefix}{name}": value}
    return flat


def from_json(cls: Any, value: Any) -> Any:
    """The configuration of type `cls` that `to_json` wrote. Unknown names are a TypeError."""
    if typing.get_origin(cls) is Annotated:
        return from_json(typing.get_args(cls)[0], value)
    if isinstance(cls, type) and is_dataclass(cls) and isinstance(value, dict):
        hints = typing.get_type_hints(cls, include_extras=True)
        unknown = set(value) - {f.name for f in fields(cls)}
        if unknown:
            raise TypeError(f"{cls.__name__} has no {', '.join(sorted(unknown))}")
        return cls(**{name: from_json(hints[name], item) for name, item in value.items()})
    if typing.get_origin(cls) in (types.UnionType, typing.Union):
        kinds = [kind for kind in typing.get_args(cls) if kind is not type(None)]
        return None if value is None else from_json(kinds[0], value)
    if typing.get_origin(cls) is tuple:
        return tuple(value)
    if typing.get_origin(cls) is Mapping:
        return {name: from_json(typing.get_args(cls)[1], item) for name, item in value.items()}
    return Path(value) if cls is Path else value
