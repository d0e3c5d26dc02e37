"""Batch sizes that a model cannot be trained with are refused before training, in one sentence."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers import tiny

from coalign.cli import main as cli
from coalign.config import TrainConfig
from coalign.methods.clip.config import CLIPConfig
from coalign.runs.folder import SavedConfig, write_config
from coalign.training.distributed import World
from coalign.workflows.train.setup import resolve

ONE, TWO = (World(0, size, torch.device("cpu")) for size in (1, 2))


@pytest.mark.parametrize(
    ("model", "batch_size", "words"),
    [
        ("RN50", 1, "--batch-size 2 or more"),
        (None, 1, "--batch-size 2 or more"),
        ("RN50", 12, "a model without BatchNorm, such as ViT-B-32"),
    ],
)
def test_refused_batch_sizes(pairs, model_file, tmp_path, capsys, model, batch_size, words):
    options = {"batch_size": batch_size, "val_fraction": 0, "batch_norm_group": 8}
    assert cli.main(tiny.train_args(pairs, tmp_path / "run", model or model_file, **options)) != 0
    error = capsys.readouterr().err
    assert words in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_batch_norm_group_is_what_a_process_encodes_at_once():
    config = TrainConfig(method="clip", method_config=CLIPConfig(), batch_size=32)
    assert resolve(config, 100, ONE).batch_norm_group == 32
    assert resolve(config, 100, TWO).batch_norm_group == 16
    assert resolve(replace(config, micro_batch=8), 100, ONE).batch_norm_group == 8
    assert resolve(replace(config, batch_norm_group=4), 100, TWO).batch_norm_group == 4


def test_a_resumed_run_keeps_its_batch_norm_group(tmp_path):
    config = TrainConfig(method="clip", method_config=CLIPConfig(), batch_size=32)
    write_config(tmp_path, SavedConfig("data", resolve(config, 100, ONE), 100, 10))
    assert resolve(config, 100, TWO, resumed=tmp_path).batch_norm_group == 32
