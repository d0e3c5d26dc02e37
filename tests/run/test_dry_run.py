"""`train --dry-run`: big recipes on little data, in seconds, and what it says of a step."""

import re

import pytest
import tiny
from PIL import Image

from coalign import cli
from coalign.data import loader


def dry_run(capsys, *args, **options):
    assert cli.main([*tiny.train_args(*args, **options), "--dry-run"]) == 0
    return capsys.readouterr().out


def test_a_batch_larger_than_the_data(tmp_path, pairs, model_file, capsys, monkeypatch):
    """A paper's recipe on 64 pairs: only a handful of them is read."""
    read = []
    original = loader.PairLoader._sample

    def sample(self, record, *rest, **options):
        read.append(record.key)
        return original(self, record, *rest, **options)

    monkeypatch.setattr(loader.PairLoader, "_sample", sample)
    given = {"recipe": "clip-yfcc15m", "batch-size": 4096, "workers": 3}
    printed = dry_run(capsys, pairs, tmp_path / "run", model_file, **given)
    assert len(read) == 16  # once to show, once to time
    assert "0 steps an epoch of 4,096 pairs" in printed
    assert "Training would refuse: the data has fewer pairs than a batch." in printed
    assert "Passes a step, for every pair: image 1, text 1; teachers: none." in printed
    assert "A step's operations (4,096 pairs, one process)" in printed
    assert "activations of the encoders, 4,096 pairs" in printed
    with Image.open(tmp_path / "run" / "first_batch.png") as picture:
        assert picture.size == (8 * 32, 32)


def amounts(printed, table):
    """Row -> amount and unit, of one of the two tables."""
    rows = re.findall(r"│ ([^│]+?) +│ ([\d.,e-]+) (\w+) +│", printed[printed.index(table) :].split("total")[0])
    return {name: (float(value.replace(",", "")), unit) for name, value, unit in rows}


def test_the_parts_of_a_step(tmp_path, pairs, model_file, capsys):
    printed = dry_run(
        capsys,
        pairs,
        tmp_path / "run",
        model_file,
        recipe="slip",
        **{"ssl-hidden": 64, "ssl-dim": 16, "micro-batch": 4},
    )
    assert "image 3, text 1" in printed
    assert "Training would refuse" not in printed
    operations, memory = amounts(printed, "A step's operations"), amounts(printed, "Memory of a device")
    assert operations["encoders, forward"] == operations["encoders once more, for --micro-batch"]
    assert operations["encoders, forward"][1].endswith("FLOP")
    assert memory["trained weights"] == memory["gradients"]
    assert memory["optimiser state"][0] == pytest.approx(2 * memory["trained weights"][0], rel=0.02)
    assert memory["trained weights"][1] == "KiB"


@pytest.mark.parametrize(
    ("options", "hint"),
    [({"batch-size": 1}, "at least 2"), ({"precision": "fp16"}, "bf16"), ({"lr": -1}, "lr is -1")],
)
def test_what_training_would_refuse_at_any_size_is_refused(tmp_path, pairs, model_file, capsys, options, hint):
    assert cli.main([*tiny.train_args(pairs, tmp_path / "run", model_file, **options), "--dry-run"]) == 2
    assert hint in capsys.readouterr().err
