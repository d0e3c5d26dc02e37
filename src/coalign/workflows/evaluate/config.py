"""Settings of an evaluation. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from tyro.conf import arg

from coalign.config import DataConfig
from coalign.errors import UserError


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """How `evaluate` opens a model and selects samples, and what its tasks train. The fields are the options of `coalign eval`.

    Raises:
        UserError: A value is invalid.
    """

    weights: str = "last"
    """Checkpoint of the run: last or best."""
    split: str | None = None
    """train, val, test, … or all. None: the run's held-out pairs if DATA is its training data, else the test or val split, else all."""
    classes: Path | None = None
    """File with your classes: one per line, `name` or `label = name`; or JSON, with the prompts of each class."""
    label: str | None = None
    """Column that holds an image's class. None: label, class, category or folder."""
    data_root: Path | None = None
    """Folder with the named datasets, each as torchvision unpacks it."""
    preprocess: str | None = None
    """Library that resizes images, in the model's own geometry: coalign, open_clip or transformers. None: the model's."""
    similarity: str | None = None
    """Similarity of the run, if its method has several (oner: trained or projector). None: as configured."""
    precision: str = "fp32"
    """fp32 or bf16; bf16 raises an error if it changes the embeddings noticeably."""
    cache: Path | None = None
    """Folder to cache embeddings in, keyed by the content of weights and inputs (probe-slip caches every crop)."""
    epochs: int = 10
    """Epochs of fine-tuning and of detector training."""
    train_data: str | None = None
    """Data that probes, fine-tuning and detectors train on. None: the samples of DATA's train split, or those that are not evaluated."""
    reading: Annotated[DataConfig, arg(name="")] = field(default_factory=DataConfig)
    """How DATA and --train-data are read. Unset: as by the run, if they are its data."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps. None: the best there is."""
    workers: int = 0
    """Number of loader processes."""

    def __post_init__(self) -> None:
        if self.precision not in ("fp32", "bf16"):
            raise UserError(f"--precision is {self.precision!r}, but must be fp32 or bf16.")
        if self.epochs < 1:
            raise UserError(f"--epochs is {self.epochs}, but must be at least 1.")
