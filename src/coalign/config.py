"""The configuration of a training run. Imports no torch: it is read to print help."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from coalign.optim import OptimiserConfig


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run depends on besides its data. A recipe fills it; options on the command line override single values."""

    method: str
    """The training method."""
    method_config: Any
    """The method's own settings (shown as its own group of options)."""
    model: str = "ViT-B-32"
    """Towers: an open_clip model name, a JSON file in open_clip's form, `timm:TRUNK`, or one of ours (`small`)."""
    pretrained: str | None = None
    """Start from these weights: an open_clip tag or a safetensors file."""
    image_size: int | None = None
    """Side of the square input in pixels (default: the model's own)."""
    context_length: int = 77
    """The most tokens of a caption, start and end included; longer ones are cut."""
    tokenizer: str = "clip"
    """`clip`, `captions` (train a small byte-pair vocabulary on the training captions), or a tokenizer file."""
    batch_size: int = 256
    """Pairs a step, over all processes."""
    micro_batch: int | None = None
    """Pairs held in memory at once, a process; the gradient stays that of the whole batch."""
    epochs: float = 32
    """Passes over the training pairs."""
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    """The optimiser's settings."""
    max_grad_norm: float | None = None
    """Clip the gradient to this norm."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast precision; auto is bf16 where the processor is fast at it, else fp32."""
    compile: bool = False
    """Compile the towers with torch.compile."""
    batch_norm_group: int = 32
    """Samples a batch-norm group, for trunks that have BatchNorm."""
    seed: int = 0
    """Seed of the initial weights, the order and every view."""
    workers: int | None = None
    """Loader processes (default: one a core, at most 8). The run does not depend on it."""
    val_fraction: float = 0.05
    """Share of the pairs held out when the data has no split of its own."""
    val_data: str | None = None
    """Validate on this data instead."""
    classes: Path | None = None
    """Your own classes, one a line: their zero-shot accuracy is followed during training (images whose tags or folder name one)."""
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
