"""The held-out pairs of a run, to evaluate models that were made from it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from coalign.errors import UserError
from coalign.runs.folder import SavedConfig, read_config, read_results
from coalign.runs.run import Run
from coalign.training.distributed import World
from coalign.types import DualEncoder
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.context import EvalContext
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.evaluate.samples import Samples
from coalign.workflows.train.batches import TrainingData
from coalign.workflows.train.setup import fingerprint, open_data


def validation_pairs(run: Run) -> TrainingData | None:
    """Returns the data of the run, None if it held out no pairs. Raises UserError if the data has changed since the run."""
    saved = read_config(run.path)
    read_results(run.path)  # raises UserError if the run is not finished
    if saved.num_val < 2:
        return None
    pairs, _ = open_data(run.data, lambda _: run.config, World(0, 1, torch.device("cpu")))
    _check_data(saved, pairs, run.path)
    return pairs


def _check_data(saved: SavedConfig, pairs: TrainingData, folder: Path) -> None:
    if (len(pairs.train), len(pairs.val), fingerprint(pairs)) != (saved.num_train, saved.num_val, saved.fingerprint):
        raise UserError(
            f"{saved.data} has changed since {folder} was trained on it, so its held-out pairs may be among the training pairs; restore it."
        )


def held_out_context(encoder: DualEncoder, run: Run, pairs: TrainingData) -> EvalContext:
    """Returns the input of tasks that evaluate an encoder on the run's held-out pairs."""
    none = Samples(pairs.source, np.empty(0, dtype=np.int64))
    config = EvalConfig(reading=run.config.reading)
    world = World(0, 1, torch.device("cpu"))
    return EvalContext(EvalModel(encoder), run.data, Samples(pairs.val_source, pairs.val), none, none, config, world)
