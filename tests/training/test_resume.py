"""A real process of `coalign train`, killed at any moment or asked to stop, then resumed, ends with the run of one that was left alone."""

import random
import signal
import time
from functools import cache

import pytest
import tiny
from test_trainer import assert_equal_runs

from coalign import cli

pytestmark = pytest.mark.slow
STEPS = 168  # 24 epochs of 7
OPTIONS = {"epochs": 24, "save_every": 3, "evals": 4}


@pytest.fixture(scope="module")
def straight(tmp_path_factory, pairs, model_file):
    """threads -> the run that nobody interrupts. A real process, as the others are: bit for bit holds for equal numbers of threads."""

    @cache
    def run(threads):
        out = tmp_path_factory.mktemp("straight") / "run"
        finish(tiny.train_args(pairs, out, model_file, **OPTIONS), threads)
        assert steps(out) == STEPS
        return out

    return run


def finish(args, threads):
    """Runs the command to its end and returns what it printed."""
    process = tiny.start(args, threads)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def steps(out):
    """Rows of steps in metrics.jsonl, a torn last line not among them."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def wait_for(process, out, wanted):
    """Until the run has done `wanted` steps. False if it ended before."""
    deadline = time.monotonic() + 300
    while steps(out) < wanted:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return True


def interrupt(args, out, number, rng, most, threads=1):
    """Starts the command, and signals it a few steps beyond where the run was. Returns (exit code, output, whether it was signalled)."""
    done = steps(out)
    process = tiny.start(args, threads)
    reached = wait_for(process, out, done + rng.randint(1, most))
    time.sleep(rng.uniform(0, 0.05))  # anywhere in a step, a validation, or a checkpoint being written
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors, reached


def kill_and_resume(times, seed, pairs, model_file, out, threads=1):
    """Starts the run, kills it `times` times and lets it end."""
    rng = random.Random(seed)
    killed = 0
    workers = [0, 1, 2, 3] * times
    rng.shuffle(workers)

    def args():
        return tiny.train_args(pairs, out, model_file, **OPTIONS | {"workers": workers.pop(), "resume": "auto"})

    while killed < times:
        code, output, reached = interrupt(args(), out, signal.SIGKILL, rng, 2 * STEPS // (3 * times), threads)
        assert reached, output
        assert code == -signal.SIGKILL, output
        killed += 1
    assert "going on at step" in finish(args(), threads)


def weights(out):
    """The files of the weights, byte for byte."""
    return {name: (out / name / "model.safetensors").read_bytes() for name in ("last", "best")}


@pytest.mark.parametrize("threads", [1, 2])
def test_killed_twice(tmp_path, pairs, model_file, straight, threads):
    kill_and_resume(2, 0, pairs, model_file, tmp_path / "run", threads)
    assert_equal_runs(straight(threads), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(straight(threads))
    assert (tmp_path / "run/report.html").exists()


def test_killed_twenty_times(tmp_path, pairs, model_file, straight):
    kill_and_resume(20, 1, pairs, model_file, tmp_path / "run")
    assert_equal_runs(straight(1), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(straight(1))
    assert (tmp_path / "run/report.html").exists()


def test_asked_to_stop(tmp_path, pairs, model_file, straight):
    """Ctrl-C and SIGTERM: the step is finished, a checkpoint saved, and the exit code says that the run is not complete."""
    out, rng = tmp_path / "run", random.Random(2)
    for number, workers in ((signal.SIGINT, 2), (signal.SIGTERM, 0)):
        args = tiny.train_args(pairs, out, model_file, **OPTIONS | {"workers": workers, "resume": "auto"})
        code, output, reached = interrupt(args, out, number, rng, 40)
        assert reached
        assert code == cli.INTERRUPTED, output
        assert f"Stopped at step {steps(out)}; go on with --resume auto." in output
        assert "Traceback" not in output
        assert not (out / "results.json").exists()
    args = tiny.train_args(pairs, out, model_file, **OPTIONS | {"resume": "auto"})
    finish(args, threads=1)
    assert_equal_runs(straight(1), out)
    assert weights(out) == weights(straight(1))


def test_a_second_run_in_the_folder_is_refused(tmp_path, pairs, model_file):
    out = tmp_path / "run"
    args = tiny.train_args(pairs, out, model_file, **OPTIONS | {"epochs": 2000, "resume": "auto"})
    first = tiny.start(args)
    assert wait_for(first, out, 1)
    second = tiny.start(args)
    _, errors = second.communicate(timeout=300)
    first.kill()
    first.communicate()
    assert second.returncode == 2
    assert errors.startswith("coalign: The output directory")
    assert f"is in use by process {first.pid}" in errors
