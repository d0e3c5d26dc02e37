"""A `coalign train` process that is killed or stopped at any moment, and resumed, gives the same run as an uninterrupted one."""

import random
import signal
import time
from functools import cache

import pytest
from helpers import tiny
from helpers.equal_runs import assert_equal_runs

from coalign.cli import main as cli

pytestmark = pytest.mark.slow
STEPS = 168  # 24 epochs of 7
OPTIONS = {"epochs": 24, "save_every": 3, "evals": 4}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, pairs, model_file):
    """Number of threads -> an uninterrupted run, in a separate process. Runs are bitwise equal only with the same number of threads."""

    @cache
    def run(threads):
        out = tmp_path_factory.mktemp("uninterrupted") / "run"
        finish(tiny.train_args(pairs, out, model_file, **OPTIONS), threads)
        assert num_steps(out) == STEPS
        return out

    return run


def finish(args, threads):
    """Runs the command until it ends and returns its output."""
    process = tiny.start(args, threads)
    output, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    return output


def num_steps(out):
    """The number of steps in metrics.jsonl, without a torn last line."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b'"loss"') if path.exists() else 0


def wait_for(process, out, steps):
    """Waits until the run has done `steps` steps. Returns False if it ended before."""
    deadline = time.monotonic() + 300
    while num_steps(out) < steps:
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return True


def interrupt(args, out, number, rng, max_steps, threads=1):
    """Starts the command and signals it after up to `max_steps` more steps. Returns exit code, output, and whether it reached that step."""
    first_step = num_steps(out)
    process = tiny.start(args, threads)
    reached = wait_for(process, out, first_step + rng.randint(1, max_steps))
    time.sleep(rng.uniform(0, 0.05))  # at any point of a step, a validation or a save
    process.send_signal(number)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output + errors, reached


def kill_and_resume(times, seed, pairs, model_file, out, threads=1):
    """Starts the run, kills and resumes it `times` times, and lets it finish."""
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
    assert "resuming at step" in finish(args(), threads)


def weights(out):
    """The bytes of the weight files."""
    return {name: (out / name / "model.safetensors").read_bytes() for name in ("last", "best")}


@pytest.mark.parametrize("threads", [1, 2])
def test_killed_twice(tmp_path, pairs, model_file, uninterrupted, threads):
    kill_and_resume(2, 0, pairs, model_file, tmp_path / "run", threads)
    assert_equal_runs(uninterrupted(threads), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(uninterrupted(threads))
    assert (tmp_path / "run/report.html").exists()


def test_killed_twenty_times(tmp_path, pairs, model_file, uninterrupted):
    kill_and_resume(20, 1, pairs, model_file, tmp_path / "run")
    assert_equal_runs(uninterrupted(1), tmp_path / "run")
    assert weights(tmp_path / "run") == weights(uninterrupted(1))
    assert (tmp_path / "run/report.html").exists()


def test_stop_signals(tmp_path, pairs, model_file, uninterrupted):
    """Ctrl-C and SIGTERM finish the step, save a checkpoint, and exit with the code of an incomplete run."""
    out, rng = tmp_path / "run", random.Random(2)
    for number, workers in ((signal.SIGINT, 2), (signal.SIGTERM, 0)):
        args = tiny.train_args(pairs, out, model_file, **OPTIONS | {"workers": workers, "resume": "auto"})
        code, output, reached = interrupt(args, out, number, rng, 40)
        assert reached
        assert code == cli.INTERRUPTED, output
        assert f"Interrupted at step {num_steps(out)}; resume with --resume auto." in output
        assert "Traceback" not in output
        assert not (out / "results.json").exists()
    args = tiny.train_args(pairs, out, model_file, **OPTIONS | {"resume": "auto"})
    finish(args, threads=1)
    assert_equal_runs(uninterrupted(1), out)
    assert weights(out) == weights(uninterrupted(1))


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
    assert errors.startswith("coalign: The output folder")
    assert f"is in use by process {first.pid}" in errors
