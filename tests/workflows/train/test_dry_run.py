"""`coalign train --dry-run`: runs in seconds, even for a large recipe on little data, and prints the cost per step."""

import re

import pytest
from helpers import tiny
from PIL import Image

from coalign.cli import main as cli
from coalign.data.loading import train as loader


def dry_run(capsys, *args, **options):
    assert cli.main([*tiny.train_args(*args, **options), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_batch_larger_than_the_dataset(tmp_path, pairs, model_file, capsys, monkeypatch):
    """A paper's recipe on 64 pairs reads only a few of them."""
    read = []
    original = loader.PairLoader._open_image

    def open_image(self, index):
        read.append(index)
        return original(self, index)

    monkeypatch.setattr(loader.PairLoader, "_open_image", open_image)
    options = {"recipe": "clip-yfcc15m", "batch-size": 4096, "workers": 3}
    printed = dry_run(capsys, pairs, tmp_path / "run", model_file, **options)
    assert len(read) == 16  # 8 to print, 8 to time
    assert "Batch size 4,096, 0 steps per epoch, 0 steps in total." in printed
    assert "Training would fail: the dataset is smaller than a batch." in printed
    assert "Encoder passes per pair: image 1, text 1; teacher passes: none." in printed
    assert "Compute per step (4,096 pairs, one process)" in printed
    assert "encoder activations, 4,096 pairs" in printed
    with Image.open(tmp_path / "run" / "first_batch.png") as image:
        assert image.size == (8 * 32, 32)


def amounts(printed, table):
    """Row -> (amount, unit) of one of the two cost tables."""
    rows = re.findall(r"│ ([^│]+?) +│ ([\d.,e-]+) (\w+) +│", printed[printed.index(table) :].split("total")[0])
    return {name: (float(value.replace(",", "")), unit) for name, value, unit in rows}


def test_the_cost_tables_of_a_step(tmp_path, pairs, model_file, capsys):
    printed = dry_run(
        capsys,
        pairs,
        tmp_path / "run",
        model_file,
        recipe="slip",
        **{"ssl-hidden": 64, "ssl-dim": 16, "micro-batch": 4},
    )
    assert "image 3, text 1" in printed
    assert "Training would fail" not in printed
    compute, memory = amounts(printed, "Compute per step"), amounts(printed, "Memory per device")
    assert compute["encoder forward"] == compute["encoder recompute (--micro-batch)"]
    assert compute["encoder forward"][1].endswith("FLOP")
    assert memory["trained weights"] == memory["gradients"]
    assert memory["optimizer state"][0] == pytest.approx(2 * memory["trained weights"][0], rel=0.02)
    assert memory["trained weights"][1] == "KiB"


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"batch-size": 1}, "2 or more"), ({"precision": "fp16"}, "bf16"), ({"lr": -1}, "lr is -1")],
)
def test_invalid_settings_are_rejected(tmp_path, pairs, model_file, capsys, options, hint):
    assert cli.main([*tiny.train_args(pairs, tmp_path / "run", model_file, **options), "--dry-run"]) == 2
    assert hint in capsys.readouterr().err
