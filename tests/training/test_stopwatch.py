import time

import pytest
import torch

from coalign.training.stopwatch import Stopwatch, timed


def test_a_stage_excludes_the_time_of_nested_stages(monkeypatch):
    now = 1000.0

    def sleep(seconds):
        nonlocal now
        now += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now)
    with Stopwatch(torch.device("cpu")) as stopwatch:
        for _ in range(2):
            with timed("step"):
                sleep(1)
                with timed("outer"):
                    sleep(2)
                    with timed("inner"):
                        sleep(4)
                with timed("inner"):
                    sleep(1)
    assert stopwatch.steps == [{"step": 1, "outer": 2, "inner": 5}] * 2


def test_nothing_is_recorded_without_a_running_stopwatch():
    with Stopwatch(torch.device("cpu")) as stopwatch:
        pass
    with timed("step"), timed("inner"):
        pass
    assert not stopwatch.steps


def test_a_stage_that_raises_is_closed():
    with Stopwatch(torch.device("cpu")) as stopwatch, pytest.raises(KeyError), timed("step"), timed("inner"):
        raise KeyError
    assert set(stopwatch.steps[0]) == {"step", "inner"}
