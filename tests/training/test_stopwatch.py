import time

import pytest
import torch

from coalign.training.stopwatch import Stopwatch, part


def test_parts_without_what_is_within_them():
    with Stopwatch(torch.device("cpu")) as watch:
        for _ in range(2):
            with part("step"):
                time.sleep(0.01)
                with part("outer"):
                    time.sleep(0.02)
                    with part("inner"):
                        time.sleep(0.04)
                with part("inner"):
                    time.sleep(0.01)
    assert len(watch.steps) == 2
    for step in watch.steps:
        assert step == {
            "step": pytest.approx(0.01, abs=0.008),
            "outer": pytest.approx(0.02, abs=0.015),
            "inner": pytest.approx(0.05, abs=0.03),
        }
        assert step["inner"] > step["outer"] > step["step"]


def test_nothing_is_kept_where_none_runs():
    with Stopwatch(torch.device("cpu")) as watch:
        pass
    with part("step"), part("inner"):
        pass
    assert not watch.steps


def test_a_part_that_fails_ends():
    with Stopwatch(torch.device("cpu")) as watch, pytest.raises(KeyError), part("step"), part("inner"):
        raise KeyError
    assert set(watch.steps[0]) == {"step", "inner"}
