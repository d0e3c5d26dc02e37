"""How far trials are, as the files of their processes tell."""

import json

from coalign.experiments.trials import _features_line, last_step


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
