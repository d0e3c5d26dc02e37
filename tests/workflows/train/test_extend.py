"""Extending a finished run: with a constant rate it equals a run that was longer from the beginning; a cosine is followed further."""

import json

import pytest
import torch
from helpers import tiny
from helpers.equal_runs import assert_equal_weights, untimed

from coalign.cli import main as cli
from coalign.runs.card import card
from coalign.runs.folder import read_config
from coalign.training import checkpoint

STEPS = 7  # per epoch
CONSTANT = {"schedule": "constant", "cooldown-fraction": 0.25, "warmup-fraction": 0.1, "evals": 0}


@pytest.fixture(autouse=True)
def _no_figures(without_run_reports):
    """Drawing takes longer than training."""


def go(pairs, out, model_file, **options):
    return cli.main(tiny.train_args(pairs, out, model_file, **options))


def error_of(capsys, *args, **options):
    capsys.readouterr()
    assert go(*args, **options) == 2
    return tiny.error_line(capsys)


def rates(out):
    return [row["lr"] for row in tiny.rows(out / "metrics.jsonl") if "loss" in row]


def assert_same_training(one, other):
    """Equal weights, optimizer and logged values, bit for bit."""
    a, b = (checkpoint.load(each / "last") for each in (one, other))
    assert_equal_weights(a.model, b.model)
    assert a.optimizer.keys() == b.optimizer.keys()
    for name, values in a.optimizer.items():
        assert_equal_weights(values, b.optimizer[name])
    assert a.trainer["step"] == b.trainer["step"]
    assert untimed(one) == untimed(other)


@pytest.fixture(scope="module")
def constant(tmp_path_factory, pairs, model_file):
    """A constant run of 4 epochs."""
    out = tmp_path_factory.mktemp("constant") / "run"
    assert go(pairs, out, model_file, epochs=4, **CONSTANT) == 0
    return out


def test_a_constant_run_that_is_extended_equals_a_longer_run(tmp_path, pairs, model_file, constant, capsys):
    out = tmp_path / "run"
    assert go(pairs, out, model_file, epochs=2, **CONSTANT) == 0
    short = rates(out)
    assert checkpoint.load(out / "stable").trainer["step"] == 14 - 4  # 0.25 × 14, rounded
    first_results = json.loads((out / "results.json").read_text())
    capsys.readouterr()
    assert go(pairs, out, model_file, epochs=4, resume="auto", **CONSTANT) == 0
    printed = capsys.readouterr().out
    assert "Extending the run from 2 to 4 epochs" in printed
    assert (
        "continues at step 10, before the cool-down, whose 4 steps are left out, at learning rate 1.00e-03" in printed
    )
    # the warm-up of the first start is kept: 0.1 × 14 steps, where a run of 4 epochs has 0.1 × 28
    longer = tmp_path / "longer"
    assert go(pairs, longer, model_file, epochs=4, **CONSTANT | {"warmup-steps": 1}) == 0
    assert_same_training(out, longer)
    assert rates(out)[:10] == short[:10]
    assert json.loads((out / "results.json").read_text())["run"]["step"] == 28
    assert first_results["run"]["step"] == 14
    saved = read_config(out)
    assert (saved.extended_from, saved.config.epochs) == ((2.0,), 4.0)
    assert "- epochs: 4 (extended from 2)" in card(out)
    # once more; and the same command again has nothing to do
    assert go(pairs, out, model_file, epochs=6, resume="auto", **CONSTANT) == 0
    assert read_config(out).extended_from == (2.0, 4.0)
    capsys.readouterr()
    assert go(pairs, out, model_file, epochs=6, resume="auto", **CONSTANT) == 0
    assert "The run is already complete" in capsys.readouterr().out
    longest = tmp_path / "longest"
    assert go(pairs, longest, model_file, epochs=6, **CONSTANT | {"warmup-steps": 1}) == 0
    assert_same_training(out, longest)


def test_an_extension_that_is_killed_before_its_first_checkpoint(tmp_path, pairs, model_file, monkeypatch):
    """The newest checkpoint is then of the cool-down that is left out."""
    from coalign.workflows.train import train as module

    out, options = tmp_path / "run", CONSTANT | {"warmup-steps": 1}
    assert go(pairs, out, model_file, epochs=2, **options) == 0
    with monkeypatch.context() as context:
        context.setattr(module, "_fit", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        assert go(pairs, out, model_file, epochs=4, resume="auto", **options) == cli.INTERRUPTED
    assert not (out / "results.json").exists()
    assert checkpoint.load_latest(out).trainer["step"] == 14
    assert go(pairs, out, model_file, epochs=4, resume="auto", **options) == 0
    assert go(pairs, tmp_path / "longer", model_file, epochs=4, **options) == 0
    assert_same_training(out, tmp_path / "longer")


def test_a_cosine_run_follows_the_longer_cosine(tmp_path, pairs, model_file, capsys):
    options = {"warmup-steps": 2, "evals": 0, "final-lr": 1e-5}
    assert go(pairs, tmp_path / "run", model_file, epochs=1, **options) == 0
    before = rates(tmp_path / "run")
    weights = checkpoint.load(tmp_path / "run/last").model
    capsys.readouterr()
    assert go(pairs, tmp_path / "run", model_file, epochs=2, resume="auto", **options) == 0
    after = rates(tmp_path / "run")
    assert f"the learning rate goes from {before[-1]:.2e} to {after[7]:.2e}" in capsys.readouterr().out
    assert go(pairs, tmp_path / "longer", model_file, epochs=2, **options) == 0
    assert after == [*before, *rates(tmp_path / "longer")[7:]]
    assert not torch.equal(
        weights["image.projection.weight"], checkpoint.load(tmp_path / "run/last").model["image.projection.weight"]
    )
    assert not (tmp_path / "run/stable").exists()


def test_a_run_cannot_be_shortened_or_changed(pairs, model_file, constant, capsys):
    error = error_of(capsys, pairs, constant, model_file, epochs=1, resume="auto", **CONSTANT)
    assert "has 4 epochs, and a run cannot be shortened to 1; give more --epochs to extend it" in error
    error = error_of(capsys, pairs, constant, model_file, epochs=6, resume="auto", **CONSTANT | {"lr": 2e-3})
    assert "was started with different settings: epochs was 4.0, now 6.0; optimizer.lr was 0.001, now 0.002" in error
    error = error_of(capsys, pairs, constant, model_file, epochs=6, resume="auto", evals=0, **{"warmup-fraction": 0.1})
    assert "optimizer.schedule was constant, now cosine" in error


def test_an_unfinished_run_is_not_extended(tmp_path, pairs, model_file, capsys):
    assert go(pairs, tmp_path / "run", model_file, epochs=1) == 0
    (tmp_path / "run/results.json").unlink()
    error = error_of(capsys, pairs, tmp_path / "run", model_file, epochs=2, resume="auto")
    assert "has not finished; resume it with --epochs 1, and then extend it to 2." in error


def test_best_stays_the_best_of_the_run(tmp_path, pairs, model_file):
    """An extension does not forget the best weights of the shorter run, whose cool-down it leaves out."""
    options = CONSTANT | {"evals": 2}
    assert go(pairs, tmp_path / "run", model_file, epochs=2, **options) == 0
    before = checkpoint.load(tmp_path / "run/last").trainer
    assert go(pairs, tmp_path / "run", model_file, epochs=4, resume="auto", **options) == 0
    after = checkpoint.load(tmp_path / "run/last").trainer
    scores = [row["val/mean_recall"] for row in tiny.rows(tmp_path / "run/metrics.jsonl") if "val/mean_recall" in row]
    assert after["best_score"] == max(before["best_score"], *scores)


def test_a_method_says_what_follows_the_new_length(tmp_path, pairs, model_file, capsys):
    options = {"recipe": "mcd", "evals": 0}
    assert go(pairs, tmp_path / "run", model_file, epochs=1, **options) == 0
    capsys.readouterr()
    assert go(pairs, tmp_path / "run", model_file, epochs=2, resume="auto", **options) == 0
    assert "follow the new length from here on: λ, the weight of the distillation" in capsys.readouterr().out
