"""What a run keeps of its start: its weights, and its results on the tasks of --track."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.equal_runs import assert_equal_runs, assert_equal_weights

from coalign.cli import main as cli
from coalign.evaluation.metrics import estimate
from coalign.metric import Outcome, metrics_from_json
from coalign.runs.outcomes import read_outcomes
from coalign.training import checkpoint
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.models.export import export


def go(pairs, out, model_file, track=(), **options):
    args = tiny.train_args(pairs, out, model_file, **{"epochs": 2, "evals": 0} | options)
    return cli.main([*args, *(["--track", *track] if track else [])])


def error_of(capsys, *args, **options):
    capsys.readouterr()
    assert go(*args, **options) == 2
    return tiny.error_line(capsys)


def results(out):
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Pairs that the runs do not train on."""
    return tiny.write_pairs(tmp_path_factory.mktemp("other") / "other", 48, seed=3)


@pytest.fixture(scope="module")
def tracked(tmp_path_factory, pairs, other, model_file):
    """A run with its tasks, and the output of the command."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    tasks = [f"retrieval:{other}", f"probe:{pairs}", f"retrieval:{pairs}"]
    assert go(pairs, out, model_file, tasks) == 0
    return out, tasks


def test_start_and_end_are_those_of_coalign_eval(tmp_path, pairs, model_file, tracked):
    """The end equals an evaluation of the run, and the start one of a run that has not trained."""
    out, tasks = tracked
    found = results(out)["tracked"]
    assert list(found) == tasks
    evaluated = evaluate(out, tasks)
    for task in tasks:
        end, expected = found[task]["end"], json.loads(json.dumps(evaluated[task]))
        assert end["metrics"] == expected["metrics"]
        assert (end["split"], end["samples"]) == (expected["split"], expected["samples"])
    assert found[tasks[2]]["end"]["split"] == "val"  # the held-out pairs of the run's own data
    untrained = tmp_path / "untrained"
    assert go(pairs, untrained, model_file, epochs=0.01, lr=0, **{"start-lr": 0, "final-lr": 0}) == 0
    for task, values in evaluate(untrained, tasks, EvalConfig()).items():
        for name, metric in values["metrics"].items():
            assert found[task]["start"]["metrics"][name]["value"] == pytest.approx(metric["value"], abs=1e-6)


def test_differences_are_paired_over_items(tmp_path, tracked):
    """Against the bootstrap of per-item differences, with the outcomes of both evaluations."""
    out, tasks = tracked
    items, start = read_outcomes(out, "tracked_start.npz")
    assert len(items["0"]) == 48
    change = results(out)["tracked"][tasks[2]]["changes"]["image_to_text.r1"]
    end = read_outcomes(out)[1]["retrieval.image_to_text.r1"]
    began = start["2.image_to_text.r1"]
    paired = estimate([Outcome(end.values - began.values, end.groups)])
    assert change["difference"] == pytest.approx(float(np.mean(end.values) - np.mean(began.values)))
    assert (change["low"], change["high"]) == pytest.approx((paired.low, paired.high))
    for task in tasks:
        for name, each in results(out)["tracked"][task]["changes"].items():
            low, high, kind = each["low"], each["high"], results(out)["tracked"][task]["end"]["metrics"][name]["kind"]
            if low is None:
                assert each["verdict"] == ""
            elif low <= 0 <= high:
                assert each["verdict"] == "no significant change"
            else:
                assert each["verdict"] == ("gained" if (low > 0) != (kind == "rank") else "lost")


def test_the_page_and_the_terminal_say_what_was_gained_and_lost(tmp_path, pairs, other, model_file, capsys):
    assert go(pairs, tmp_path / "run", model_file, [f"retrieval:{other}"], epochs=1) == 0
    printed = capsys.readouterr().out
    start, end = (
        metrics_from_json(results(tmp_path / "run")["tracked"][f"retrieval:{other}"][side]["metrics"])[0]
        for side in ("start", "end")
    )
    assert (
        f"Start, retrieval:{other}: image → text R@1 {start.text()} (95 % interval {start.interval_text()})" in printed
    )
    assert f"retrieval:{other}: image → text R@1 {start.text()} → {end.text()}, " in printed
    page = (tmp_path / "run/report.html").read_text()
    assert "Gained and lost" in page
    assert page.count(f"retrieval:{other}") >= 8


def test_tracking_changes_nothing_and_a_resumed_run_keeps_its_start(
    tmp_path, pairs, other, model_file, tracked, without_run_reports
):
    """The weights are those of a run without --track, and an interrupted run has the results of an uninterrupted one."""
    from coalign.training.trainer import Trainer

    out, tasks = tracked
    plain = tmp_path / "plain"
    assert go(pairs, plain, model_file) == 0
    assert_equal_runs(out, plain)
    resumed, after_step = tmp_path / "resumed", Trainer._after_step

    def stop(self, step, interrupted):
        after_step(self, step, interrupted)
        if step == 5:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as context:
        context.setattr(Trainer, "_after_step", stop)
        assert go(pairs, resumed, model_file, tasks, **{"save-every": 4}) == cli.INTERRUPTED
    assert go(pairs, resumed, model_file, tasks, resume="auto", **{"save-every": 4}) == 0
    assert results(resumed)["tracked"] == results(out)["tracked"]


def test_bad_tasks_fail_before_training(tmp_path, pairs, model_file, tracked, capsys):
    cases = {
        "retreival:photos": "'retreival:photos' is not a task; did you mean retrieval",
        "retrieval": "The task 'retrieval' has no data; use TASK:DATA",
        "retrieval:nowhere": "No such file or folder: nowhere",
        f"foils:{pairs}": "has no false captions",
        "zeroshot:cifar10": "cifar10 needs --data-root",
    }
    for task, message in cases.items():
        assert message in error_of(capsys, pairs, tmp_path / "run", model_file, [task])
        assert not (tmp_path / "run").exists()
    args = tiny.train_args(pairs, tmp_path / "run", model_file)
    assert cli.main([*args, "--track", "retrieval:nowhere", "--dry-run"]) == 2
    out = tmp_path / "copy"
    shutil.copytree(tracked[0], out)
    error = error_of(capsys, pairs, out, model_file, [f"knn:{pairs}"], resume="auto")
    assert f"was not evaluated on knn:{pairs} at its start, so --track cannot add it" in error
    (out / "tracked_start.npz").unlink()
    assert "are missing or damaged; omit --track" in error_of(capsys, pairs, out, model_file, tracked[1], resume="auto")
    assert go(pairs, out, model_file, resume="auto") == 0


def test_only_loaded_weights_are_stored(tmp_path, pairs, model_file, trained, without_run_reports):
    """Those of --init-from are all weights; those of an open_clip folder are the towers', without the temperature."""
    assert not (trained / "start").exists()
    assert go(pairs, tmp_path / "more", model_file, epochs=1, **{"init-from": trained}) == 0
    stored = checkpoint.load(tmp_path / "more/start").model
    assert_equal_weights(stored, checkpoint.load(trained / "last").model)
    folder = export(trained, "open_clip", tmp_path / "exported")
    options = {"pretrained": folder, "tokenizer": trained / "tokenizer.json", "epochs": 1}
    assert go(pairs, tmp_path / "from", folder, **options) == 0
    stored, original = (checkpoint.load(each).model for each in (tmp_path / "from/start", trained / "last"))
    assert (
        set(original) - set(stored) == {name for name in original if not name.startswith(("image.", "text."))} != set()
    )
    for name, value in stored.items():
        torch.testing.assert_close(value, original[name])
