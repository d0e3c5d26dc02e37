from __future__ import annotations

import errno
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from coalign.errors import UserError
from coalign.training import log
from coalign.training.log import TIMINGS, BadSampleLog, NonFiniteGuard, RunLog, StopSignal


class Clock:
    """A clock that advances only when a test sets `now`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(log, "_clock", clock)
    return clock


@pytest.fixture(autouse=True)
def without_tensorboard(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "tensorboard" not in request.node.name:  # its import takes seconds
        monkeypatch.setattr(log, "_tensorboard", lambda *args: None)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def plain_console() -> Console:
    return Console(file=io.StringIO(), width=200)


def train(run_log: RunLog, steps: range, clock: Clock) -> None:
    for step in steps:
        clock.now += 0.5
        run_log.step(step, {"loss": torch.tensor(1 / (step + 1)), "lr": 1e-3}, pairs=32, wait_seconds=0.1)
        if step % 4 == 3:
            clock.now += 7
            run_log.evaluation(step, {"val/loss": step / 2})


# ---------------------------------------------------------------- metrics.jsonl


def test_rows_hold_values_and_timings(tmp_path: Path, clock: Clock) -> None:
    with RunLog(tmp_path, 6, interactive=False, console=plain_console()) as run_log:
        train(run_log, range(6), clock)
    logged = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 3, 4, 5]
    assert logged[4] == {"step": 3, "val/loss": 1.5}
    training = [row for row in logged if "loss" in row]
    assert [row["loss"] for row in training] == pytest.approx([1 / (step + 1) for step in range(6)])
    assert [row["seconds"] for row in training] == [0.5, 1.0, 1.5, 2.0, 9.5, 10.0]
    # 32 pairs in half a second, a fifth of it waiting for data; the seven seconds of evaluation are not counted
    assert {row["pairs_per_second"] for row in training} == {64.0}
    assert {row["data_wait"] for row in training} == {0.2}


def test_a_row_per_several_steps_averages_their_timings(tmp_path: Path, clock: Clock) -> None:
    class Loss:
        reads = 0

        def __float__(self) -> float:
            Loss.reads += 1
            return 1.0

    with RunLog(tmp_path, 10, interactive=False, row_every=4, console=plain_console()) as run_log:
        for step in range(10):
            clock.now += 1 + step  # each step takes longer than the previous one
            run_log.step(step, {"loss": Loss()}, pairs=10, wait_seconds=0.5)
    logged = rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in logged] == [0, 4, 8, 9]
    assert logged[1]["pairs_per_second"] == pytest.approx(40 / (2 + 3 + 4 + 5), abs=0.01)
    assert logged[1]["data_wait"] == pytest.approx(2 / (2 + 3 + 4 + 5), abs=1e-4)
    assert Loss.reads == 4  # reading a tensor synchronizes with the device


def test_a_resumed_file_equals_an_uninterrupted_one(tmp_path: Path, clock: Clock) -> None:
    def without_timings(run_dir: Path) -> list[dict]:
        logged = rows(run_dir / "metrics.jsonl")
        assert all(set(TIMINGS) <= set(row) for row in logged if "loss" in row)
        return [{name: value for name, value in row.items() if name not in TIMINGS} for row in logged]

    with RunLog(tmp_path / "uninterrupted", 20, interactive=False, console=plain_console()) as run_log:
        train(run_log, range(20), clock)
    for killed_at, resumed_at in ((13, 8), (12, 12), (3, 0)):
        run_dir = tmp_path / f"{killed_at}-{resumed_at}"
        run_log = RunLog(run_dir, 20, interactive=False, console=plain_console())
        train(run_log, range(killed_at), clock)  # without closing the log
        with open(run_dir / "metrics.jsonl", "a") as file:
            file.write('{"step": 5, "lo')  # the torn line of a killed process
        with RunLog(run_dir, 20, interactive=False, start_step=resumed_at, console=plain_console()) as run_log:
            train(run_log, range(resumed_at, 20), clock)
        assert without_timings(run_dir) == without_timings(tmp_path / "uninterrupted")
        seconds = [row["seconds"] for row in rows(run_dir / "metrics.jsonl") if "seconds" in row]
        assert seconds == sorted(seconds)  # continue from the last kept row


def test_a_line_without_its_newline_is_removed(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    with RunLog(tmp_path, 5, interactive=False, start_step=2, console=plain_console()):
        pass
    assert rows(tmp_path / "metrics.jsonl") == [{"step": 0}]


def test_non_finite_values_become_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, 1, interactive=False, console=plain_console()) as run_log:
        run_log.step(0, {"loss": math.nan, "grad_norm": torch.tensor(math.inf)}, pairs=1, wait_seconds=0)
    (row,) = rows(tmp_path / "metrics.jsonl")
    assert row["loss"] is row["grad_norm"] is None


def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    class Full:
        name = tmp_path / "metrics.jsonl"

        def write(self, content: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"metrics\.jsonl could not be written \(No space left"):
        log._write_row(Full(), {"step": 1})


def test_tensorboard_receives_the_same_values(tmp_path: Path) -> None:
    loader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with RunLog(tmp_path, 4, interactive=False, console=plain_console()) as run_log:
        for step in range(4):
            run_log.step(step, {"loss/clip": step / 4, "bad": math.nan}, pairs=1, wait_seconds=0)
    time.sleep(1.1)  # within a second, TensorBoard orders its files by a counter as text: 10 is before 9
    with RunLog(tmp_path, 4, interactive=False, start_step=2, console=plain_console()) as run_log:
        run_log.step(2, {"loss/clip": 9.0}, pairs=1, wait_seconds=0)
    events = loader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/clip")] == [(0, 0.0), (1, 0.25), (2, 9.0)]
    assert "bad" not in events.Tags()["scalars"]
    assert {"pairs_per_second", "data_wait"} <= set(events.Tags()["scalars"])


def test_tensorboard_is_optional(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log.importlib.util, "find_spec", lambda name: None)
    with RunLog(tmp_path, 1, interactive=False, console=plain_console()) as run_log:
        run_log.step(0, {"loss": 1.0}, pairs=1, wait_seconds=0)
    assert not (tmp_path / "tensorboard").exists()


# ---------------------------------------------------------------- display


def test_plain_lines_are_printed_at_the_first_and_last_step_and_at_intervals(tmp_path: Path, clock: Clock) -> None:
    console = plain_console()
    with RunLog(tmp_path, 100, interactive=False, line_seconds=10, console=console) as run_log:
        for step in range(100):
            clock.now += 60 if step == 0 else 0.5  # workers start in the first step
            values = {"loss": 2.5, "scale": 14.2857, "lr": 5e-4, "grad_norm": 0.1234567}
            run_log.step(step, values, pairs=32, wait_seconds=0.05, bad_samples=step // 10)
        run_log.note("saved [last]")
    lines = console.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:-1]] == [f"step {n}/100" for n in (1, 21, 41, 61, 81, 100)]
    assert lines[-1] == "saved [last]"
    for text in (
        "loss 2.5",
        "scale 14.29",
        "lr 5.00e-04",
        "grad_norm 0.1235",
        "pairs/s 64",
        "data wait 10%",
        "bad samples 4",
    ):
        assert f"  {text}" in lines[2]
    assert lines[0].endswith("ETA -")
    assert lines[2].endswith("ETA 30 s")  # 59 steps of half a second: the slow first step is not counted
    assert lines[-2].endswith("ETA 0 s")


def test_the_eta_includes_the_validations_to_come(tmp_path: Path, clock: Clock) -> None:
    console = plain_console()
    with RunLog(tmp_path, 100, interactive=False, line_seconds=0, console=console, evals=4) as run_log:
        for step in range(100):
            clock.now += 0.5
            run_log.step(step, {}, pairs=32, wait_seconds=0)
            if (step + 1) % 25 == 0:
                clock.now += 20
                run_log.evaluation(step, {}, seconds=20.0)
    etas = [line.split("ETA ")[1] for line in console.file.getvalue().splitlines() if "ETA" in line]
    assert etas[23] == "38 s"  # how long a validation takes is not known yet
    assert etas[49] == "1 min 25 s"  # 50 steps, and 3 validations, one of them after this step
    assert etas[98] == "20 s"
    assert etas[99] == "20 s"


@pytest.mark.parametrize("interactive", [False, True])
def test_only_distinct_rates_are_printed(tmp_path: Path, clock: Clock, interactive: bool) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=interactive, color_system=None)
    rates = {"lr": 1e-5, "lr/image.trunk": 1e-5, "lr/image.projection": 1e-3, "lr/text.projection": 1e-3}
    with RunLog(tmp_path, 2, interactive, console=console) as run_log:
        run_log.step(0, {"loss": 2.5, **rates}, pairs=32, wait_seconds=0)
        run_log.step(1, {"loss": 2.5, **dict.fromkeys(rates, 1e-6)}, pairs=32, wait_seconds=0)
        run_log.evaluation(1, {"val/loss": 0.75})
        shown = run_log._shown
    assert [name for name in shown if name.startswith("lr")] == ["lr"]
    output = console.file.getvalue()
    if not interactive:
        first, second, _ = output.splitlines()
        assert "  lr 1.00e-05  lr/image.projection 1.00e-03  pairs/s" in first
        assert "  lr 1.00e-06  pairs/s" in second
    assert "lr/image.trunk" not in output
    assert {name: rows(tmp_path / "metrics.jsonl")[0][name] for name in rates} == rates


def test_the_display_on_a_terminal_shows_everything(tmp_path: Path, clock: Clock) -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)
    with RunLog(tmp_path, 50, interactive=True, console=console) as run_log:
        for step in range(10):
            clock.now += 2.0
            values = {"loss": 2.5, "loss/clip": 1.5, "scale": 14.0, "lr": 5e-4, "grad_norm": 0.5}
            run_log.step(step, values, pairs=32, wait_seconds=0.5, bad_samples=3)
        run_log.evaluation(9, {"val/loss": 0.75})
        run_log.note("a note")
    output = console.file.getvalue()
    for text in (
        "step 10/50",
        "ETA 1 min 20 s",
        "loss/clip",
        "1.5",
        "scale",
        "14",
        "5.00e-04",
        "grad_norm",
        "bad samples",
        "3",
    ):
        assert text in output
    for text in ("pairs/s", "16", "data wait", "25%", "val/loss", "0.75", "a note\n"):
        assert text in output


# ---------------------------------------------------------------- bad samples


def entries(first: int, last: int, epoch: int = 0, reason: str = "truncated image") -> list[tuple[str, str, str, int]]:
    return [(f"{number}.jpg", reason, "cut off", epoch) for number in range(first, last)]


def test_bad_samples_are_listed_and_counted_once(tmp_path: Path) -> None:
    bad = BadSampleLog(tmp_path)
    bad.add(entries(0, 3))
    bad.add([*entries(0, 3, epoch=1), ("caf\udce9.jpg", "empty caption", "", 1)])  # a file name that is not UTF-8
    assert bad.total == 4
    assert bad.counts == {"truncated image": 3, "empty caption": 1}
    assert bad.summary() == "truncated image: 3, empty caption: 1"
    listed = rows(tmp_path / "bad_samples.jsonl")
    assert listed[0] == {"key": "0.jpg", "reason": "truncated image", "detail": "cut off", "epoch": 0}
    assert [row["key"] for row in listed] == ["0.jpg", "1.jpg", "2.jpg", "caf\udce9.jpg"]


def test_the_budget_is_a_fraction_of_at_least_a_thousand_samples_seen(tmp_path: Path) -> None:
    bad = BadSampleLog(tmp_path, budget_fraction=0.01)
    bad.add(entries(0, 1))
    bad.check(samples_seen=10)
    bad.add(entries(1, 10))
    bad.check(samples_seen=20)  # 10 of 20
    bad.add(entries(10, 11, reason="empty caption"))
    for samples_seen in (20, 1000, 1099):
        with pytest.raises(UserError, match="more than the budget of 1 %") as caught:
            bad.check(samples_seen)
    assert "11 of the 1,099 samples" in str(caught.value)
    assert "truncated image: 10, empty caption: 1" in str(caught.value)
    assert str(tmp_path / "bad_samples.jsonl") in str(caught.value)
    assert "--max-bad-fraction" in str(caught.value)
    bad.check(1100)
    strict = BadSampleLog(tmp_path / "strict", budget_fraction=0.0)
    strict.check(10)
    strict.add(entries(0, 1))
    with pytest.raises(UserError):
        strict.check(10**6)


def test_bad_samples_survive_a_resume(tmp_path: Path) -> None:
    first = BadSampleLog(tmp_path)
    first.add(entries(0, 5))
    state = json.loads(json.dumps(first.state_dict()))
    first.add(entries(5, 8))  # after the checkpoint: added again by the resumed run
    resumed = BadSampleLog(tmp_path, state=state)
    assert resumed.total == 5
    resumed.add(entries(2, 9, epoch=1))
    assert resumed.total == 9
    assert [row["key"] for row in rows(tmp_path / "bad_samples.jsonl")] == [f"{number}.jpg" for number in range(9)]
    (tmp_path / "bad_samples.jsonl").unlink()  # the counts are in the checkpoint
    assert BadSampleLog(tmp_path, state=state).total == 5
    assert BadSampleLog(tmp_path).total == 0  # a new run


# ---------------------------------------------------------------- non-finite steps


def test_the_guard_stops_after_consecutive_non_finite_steps(tmp_path: Path) -> None:
    guard = NonFiniteGuard(tmp_path, limit=3)
    for step, finite in enumerate([True, False, False, True, False, False]):
        guard.step(step, finite, [step, 100 + step])
    assert (guard.total, guard.in_a_row) == (4, 2)
    resumed = NonFiniteGuard(tmp_path, limit=3, start_step=5, state=guard.state_dict())
    with pytest.raises(
        UserError, match=r"not finite for 3 consecutive steps, most recently step 6 .*non_finite\.jsonl"
    ):
        resumed.step(6, False, [6, 106], "loss")
    listed = rows(tmp_path / "non_finite.jsonl")
    assert [(row["step"], row["samples"]) for row in listed] == [(s, [s, 100 + s]) for s in (1, 2, 4, 6)]
    assert listed[-1]["what"] == "loss"


def test_the_guard_of_other_ranks_stops_too_but_writes_nothing(tmp_path: Path) -> None:
    guard = NonFiniteGuard(None, limit=1)
    guard.step(0, True)
    with pytest.raises(UserError, match="1 consecutive steps"):
        guard.step(1, False, [1])
    NonFiniteGuard(tmp_path).step(0, True)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_requests_a_stop(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert stop.requested is None
        signal.raise_signal(number)
        assert stop.requested == number.name
        signal.raise_signal(signal.SIGINT)  # the same Ctrl-C, forwarded by a launcher
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == number.name
    assert signal.getsignal(number) == before


LOOP = """
import signal, time
from coalign.training import log
with log.StopSignal() as stop:
    now = log._clock()
    signal.raise_signal(signal.SIGINT)
    log._clock = lambda: now + 2.0
    print(stop.requested, flush=True)
    time.sleep(20)
"""


def test_a_second_ctrl_c_kills_the_process() -> None:
    child = subprocess.Popen([sys.executable, "-c", LOOP], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "SIGINT\n"
    child.send_signal(signal.SIGINT)
    assert child.wait(timeout=10) == -signal.SIGINT
    child.stdout.close()
