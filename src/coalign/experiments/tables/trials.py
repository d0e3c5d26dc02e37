"""Trials: one arm of a table with one seed, each trained (or re-evaluated) in a process of its own."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Thread
from typing import Any

from coalign.config import TrainConfig, fields_marked
from coalign.cores import num_cores
from coalign.data.images import evaluation_view
from coalign.errors import UserError
from coalign.experiments.tables.launch_script import run_name
from coalign.experiments.tables.pretrained_towers import PACKAGES, pretrained_towers
from coalign.methods.defaults import fit_to_start
from coalign.methods.search import Choice, with_settings
from coalign.methods.table import Table
from coalign.progress import Task, progress
from coalign.runs.folder import CONFIG, MODEL, RESULTS, TOKENIZER, data_name, read_config, read_results, write_config
from coalign.training import checkpoint
from coalign.training.trainer import TrainResult
from coalign.types import AugmentationPolicy
from coalign.workflows.train.setup import ConfigFn, num_steps
from coalign.workflows.train.train import train

CLASSES, LAUNCH = "classes.txt", "launch.sh"
METRICS = "metrics.jsonl"
FEATURES = "features"  # of locked encoders, which the trials of a table share
_POLL_SECONDS = 0.5
_TAIL = 16_384  # bytes, longer than a row of the log
# Of a finished run, what `train` needs to re-evaluate it; without results and report.
KEPT = (TOKENIZER, MODEL, METRICS, "bad_samples.jsonl", "non_finite.jsonl", "last", "best")


@dataclass(frozen=True)
class Trial:
    """One arm with one seed."""

    sweep: Table
    arm: str
    seed: int
    data: str
    out: Path  # the table's folder
    choice: Choice | None = None  # of the table's search, or of the arm
    track: tuple[str, ...] = ()  # as in `TrainConfig`

    @property
    def label(self) -> str:
        return f"{self.arm}, seed {self.seed}"

    @property
    def folder(self) -> Path:
        return self.out / run_name(self.arm, self.seed)

    @property
    def base(self) -> Trial | None:
        """The trial whose weights this one re-evaluates; None: it trains its own."""
        weights_of = self.sweep.arms[self.arm].weights_of
        return replace(self, arm=weights_of) if weights_of else None

    def config(self, num_pairs: int) -> TrainConfig:
        sweep = self.sweep if self.choice is None else replace(self.sweep, epochs=self.choice.epochs)
        config = sweep.config(self.arm, self.seed, num_pairs)
        epochs, classes = config.epochs, self.out / CLASSES if sweep.classes else None
        config = replace(config, classes=classes, probe=sweep.probe, track=self.track)
        if start := sweep.arms[self.arm].start:
            towers = pretrained_towers(setting for setting in PACKAGES if setting not in start)
            config = replace(config, feature_folder=self.out / FEATURES)
            fitted = fit_to_start(replace(config, **{"image_size": None} | towers | dict(start)))
            config = replace(fitted, **start)  # what the arm sets is kept
        if self.choice is None:
            return config
        shortest = replace(config, epochs=epochs * self.choice.shortest / self.choice.epochs)
        warmup = config.optimizer.num_warmup_steps(num_steps(shortest, num_pairs))
        config = with_settings(replace(config, epochs=epochs), self.choice.settings)
        return replace(config, optimizer=replace(config.optimizer, warmup_steps=warmup))

    def train(self, threads: int) -> TrainResult | None:
        """Trains the trial, or evaluates the weights of its base. Resumes if it was interrupted."""
        if self.base is not None and not (self.folder / CONFIG).exists():
            _copy_weights(self, self.base)
        return train(self.data, self.folder, self.config_fn(threads), resume="auto")

    def config_fn(self, threads: int) -> ConfigFn:
        # with one core per trial, a loader process would only compete with training
        return lambda num_pairs: replace(self.config(num_pairs), workers=0 if threads == 1 else None)


def finished(trial: Trial) -> bool:
    """Whether the trial is finished. False if it was evaluated on an older version's pixels, and has weights to be evaluated again.

    Raises UserError if its folder holds a run on other data, of another table, or of an older version of this one.
    """
    if not (trial.folder / RESULTS).exists():
        return False
    saved = read_config(trial.folder)
    expected = trial.config(saved.num_train)
    names = [*fields_marked(TrainConfig, "identifies_trial"), *(["optimizer"] if trial.choice else [])]
    changed = [name for name in names if not _is_same(name, saved.config, expected)]
    if data_name(saved.data) != data_name(trial.data):
        changed = ["data"]
    if changed:
        raise UserError(
            f"{trial.folder} holds a run whose {changed[0]} differs from this table's; choose another --out."
        )
    is_current = read_results(trial.folder).get("evaluation_view") == evaluation_view.VERSION
    return is_current or not checkpoint.exists(trial.folder)


def _is_same(name: str, saved: TrainConfig, expected: TrainConfig) -> bool:
    """Whether a setting of a run is the expected one, apart from what training derives from weights and captions."""
    theirs, ours = getattr(saved, name), getattr(expected, name)
    if name != "method_config" or type(theirs) is not type(ours):
        return bool(_bare(theirs) == _bare(ours))
    derived = {key: value for key, value in vars(theirs).items() if getattr(ours, key) is None}  # the temperature
    if expected.caption_safe_views:
        safe: dict[str, Any] = {"hue": 0.0, "flip_p": 0.0}
        theirs, ours = (
            replace(each, **{k: replace(v, **safe) for k, v in vars(each).items() if isinstance(v, AugmentationPolicy)})
            for each in (theirs, ours)
        )
    return bool(theirs == replace(ours, **derived))


def _bare(value: Any) -> Any:
    """A file's name without its folder, which may have moved."""
    return Path(value).name if isinstance(value, str) else value


def run_trials(trials: Sequence[Trial], jobs: int) -> list[str]:
    """Runs each trial in its own process, those that evaluate the weights of others last. Shows their progress.

    Returns the failed trials with their reasons.
    """
    failures: list[str] = []
    threads, number = max(1, num_cores() // jobs), itertools.count(1)
    trained = [trial for trial in trials if trial.base is None]
    with _environment("OMP_NUM_THREADS", str(threads)):  # read when a process starts
        for phase in (trained, [trial for trial in trials if trial.base is not None]):
            # threads that each start one process: a process pool hands out trials ahead of time and cannot take them back
            pool = ThreadPoolExecutor(jobs)
            try:
                running = {pool.submit(_in_a_process, trial, threads): trial for trial in phase}
                for future in as_completed(running):
                    trial, error = running[future], future.result()
                    if error is not None:
                        failures.append(f"{trial.folder.name} ({error})")
                    outcome = "done" if error is None else f"failed: {error}"
                    line = f"{next(number)} of {len(trials)}: {trial.label}: {outcome}"
                    print(line, flush=True)  # above the bars of the other trials
            finally:
                pool.shutdown(cancel_futures=True)  # after Ctrl-C, which running trials receive too, no other starts
    return failures


def _in_a_process(trial: Trial, threads: int) -> str | None:
    """Runs one trial. Returns the error message if it failed, else None."""
    context = get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(trial, threads, os.getpid(), sender))
    process.start()
    sender.close()
    try:
        with progress(f"{trial.label}: preparing", unit="steps") as task:
            while not receiver.poll(_POLL_SECONDS):
                _show_steps(trial, task)
        return receiver.recv()
    except EOFError:
        process.join()
        return f"its process ended with code {process.exitcode}"
    finally:
        process.join()


def _show_steps(trial: Trial, task: Task) -> None:
    """Shows how many steps of its training another process has done, as its folder tells."""
    try:
        saved = read_config(trial.folder)
    except UserError:  # it has not begun
        task.show()
        return
    total, done = num_steps(saved.config, saved.num_train), last_step(trial.folder) + 1
    if not done:
        what, state = _features_line(_log(trial)) or ("preparing", None)
        task.update(0, what=f"{trial.label}: {what}", state=state)
        return
    task.update(done, total, f"{trial.label}: {'training' if done < total else 'evaluating'}")


def _log(trial: Trial) -> Path:
    return trial.folder.with_name(f"{trial.folder.name}.log")


def _features_line(log: Path) -> tuple[str, str] | None:
    """Returns what the latest line says of the features that a trial computes before its first step, such as "features of images" and
    "48 of 94, 3 s left"; None if there is none."""
    for line in _last_lines(log):
        what, colon, state = line.decode(errors="replace").partition(": ")
        if colon and what.startswith("Features of "):
            return f"f{what[1:]}", state
    return None


def last_step(folder: Path) -> int:
    """Returns the last step in the log of a run that may be in progress; -1 if there is none."""
    for line in _last_lines(folder / METRICS):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # the rest of a line, or one that is being written
            return int(json.loads(line)["step"])
    return -1


def _last_lines(path: Path) -> list[bytes]:
    """Returns the last lines of a file, the last one first; none if it cannot be read."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL))
            return file.read().splitlines()[::-1]
    except OSError:
        return []


def _report(trial: Trial, threads: int, parent: int, sender: Connection) -> None:
    """In the trial's process: trains, and sends the error message or None."""
    Thread(target=_stop_with, args=(parent,), daemon=True).start()
    message: str | None = None
    try:
        _train(trial, threads)
    except (Exception, KeyboardInterrupt) as error:
        message = str(error) or type(error).__name__
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        sender.send(message)


def _stop_with(parent: int) -> None:
    """Stops this process with a checkpoint, as SIGTERM does, once its parent is gone, so that the next call can resume the trial."""
    while os.getppid() == parent:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _copy_weights(trial: Trial, base: Trial) -> None:
    """Makes the trial's folder a copy of its finished base with the trial's settings, so that `train` only evaluates it."""
    if not finished(base):
        raise UserError(f"{base.folder.name}, whose weights it evaluates, has not finished")
    saved = read_config(base.folder)
    method_config = trial.config(saved.num_train).method_config
    with tempfile.TemporaryDirectory(prefix=f".{trial.folder.name}-", dir=trial.out) as temporary:
        copy = Path(temporary) / "run"
        copy.mkdir()
        for path in (base.folder / name for name in KEPT):
            if path.is_dir():
                shutil.copytree(path, copy / path.name)
            elif path.exists():
                shutil.copy2(path, copy)
        write_config(copy, replace(saved, config=replace(saved.config, method_config=method_config)))
        try:
            copy.replace(trial.folder)
        except OSError as error:
            raise UserError(f"{trial.folder} is in the way; choose another --out.") from error


def _train(trial: Trial, threads: int) -> None:
    """Trains one trial, or re-evaluates it. Its output goes to a log file beside its folder."""
    log = _log(trial)
    with open(log, "a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        try:
            result = trial.train(threads)
        except Exception as error:
            print(error) if isinstance(error, UserError) else traceback.print_exc()
            raise
    if result is not None and result.ended == "interrupted":
        raise UserError("interrupted; run it again to resume")
