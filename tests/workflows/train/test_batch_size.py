"""Batch sizes that a model cannot be trained with are refused before training, in one sentence."""

from __future__ import annotations

import pytest
from helpers import tiny

from coalign.cli import main as cli


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
