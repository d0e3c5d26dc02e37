"""How far trials are, as the files of their processes tell."""

import json
from types import SimpleNamespace

import torch
from helpers.run_folders import write_run

from coalign.data.images import evaluation_view
from coalign.experiments.tables.trials import _features_line, finished, last_step
from coalign.runs.folder import read_config
from coalign.training import checkpoint


def test_the_latest_line_of_a_long_log_counts(tmp_path):
    log = tmp_path / "clip-seed0.log"
    assert _features_line(log) is None
    log.write_text(
        "".join(f"Features of images: {number:,} of 2,000, 1 s left\n" for number in range(2000)) + "a warning\n"
    )
    assert _features_line(log) == ("features of images", "1,999 of 2,000, 1 s left")


def test_the_last_step_of_a_log_that_is_being_written(tmp_path):
    assert last_step(tmp_path) == -1
    rows = "".join(json.dumps({"step": step, "loss": 0.1}) + "\n" for step in range(2000))
    (tmp_path / "metrics.jsonl").write_text(rows + '{"step": 20')
    assert last_step(tmp_path) == 1999


def test_a_trial_evaluated_on_older_pixels_is_evaluated_again_if_it_has_weights(tmp_path):
    folder = write_run(tmp_path / "clip-seed0")
    trial = SimpleNamespace(folder=folder, data="photos", choice=None, config=lambda _: read_config(folder).config)
    assert finished(trial)  # without weights, it would have to be trained again
    checkpoint.save(folder, "last", {"weight": torch.zeros(2)}, optimizer={"step": 1}, trainer={"step": 1})
    assert not finished(trial)
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "evaluation_view": evaluation_view.VERSION}))
    assert finished(trial)
