"""benchmark(): chooses settings and length of each method by a search on your data, and tests which method is best on new pairs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from coalign.config import DETECT, DataConfig, TrainConfig, from_json, to_json
from coalign.cores import num_cores
from coalign.data.splits import run_splits
from coalign.errors import UserError
from coalign.experiments.benchmark.plan import LENGTHS, Plan, make_plan
from coalign.experiments.benchmark.result import TEST, BenchmarkResult, judge, print_result, write_page
from coalign.experiments.tables.data_efficiency import BASE
from coalign.experiments.tables.reproduce import run_table, table_trials
from coalign.experiments.tables.search import diverged
from coalign.experiments.tables.trials import Trial, finished
from coalign.files import write_json
from coalign.methods import METHODS
from coalign.methods.search import Search
from coalign.methods.table import Arm, Table, by_fraction
from coalign.progress import waiting
from coalign.runs.folder import check_output
from coalign.workflows.evaluate.eval_report import write_results
from coalign.workflows.train.preflight import check_trials
from coalign.workflows.train.profile import profile
from coalign.workflows.train.setup import ConfigFn

PLAN, RESULT = "plan.json", "benchmark.json"
LOCKED = "locked"  # CLIP's loss, with new heads on pretrained encoders that are not trained
HEAD = "glu"  # better than linear heads on drawings, and new even if both encoders have pretrained projections
# Fraction of the pairs to hold out for test, and of the rest for validation, if the data has no such splits.
HELD_OUT = 0.1
LEAST = 10  # pairs of the validation and of the test split
EVALS = 5
PROFILED = 6  # steps by which the speed is estimated, to choose how many measure it
MEASURED_SECONDS = 5.0  # of training by which the speed is measured: epochs after the first, too, if they are short


def benchmark(
    data: str,
    out: str | Path,
    methods: Sequence[str] = ("clip", "uniclip", "mcd"),
    *,
    minutes: float = 60.0,
    epochs: float | None = None,
    fractions: Sequence[float] = (1.0,),
    seeds: int = 3,
    jobs: int | None = None,
    report: Path | None = None,
    image_tower: str | None = None,
    text_tower: str | None = None,
    context_length: int | None = None,
    reading: DataConfig = DETECT,
    skip_data_checks: bool = False,
) -> BenchmarkResult:
    """Chooses the settings and the length of each method on validation pairs, and compares new runs with these on test pairs.

    Every method gets the same time, one trial with its recipe's settings, and the same random draws of learning rate, weight decay and
    crop. The test pairs are a tenth of the data if it has no test split; they are used by no training, and choose no settings. Writes
    `benchmark.html` and `benchmark.json` to `out`. If interrupted, run it again to resume: finished trials are kept.

    Args:
        data: The training data, as in `open_data`.
        out: The folder of the trials and the results.
        methods: Names of methods, or clip-strong. CLIP is always trained, as the base of the comparison.
        minutes: Total time. The number of trials and their lengths follow from it and from the measured speed of the methods.
        epochs: The epochs of the longest trials of every method: equal samples seen instead of equal time.
        fractions: Fractions of the training pairs to train on, besides all of them, at equal samples seen.
        seeds: The number of seeds (0 to seeds - 1) of the runs that are tested.
        jobs: The number of trials that run at once. None: one per core.
        report: Write the page to this HTML file. None: `benchmark.html` in `out`.
        image_tower: A pretrained image encoder, as in `TrainConfig`. It is compared as the method `locked`: CLIP, with new heads on the
            pretrained encoders, which are not trained.
        text_tower: The same for the text encoder. None, with an `image_tower`: the text encoder is trained from scratch, and vice versa.
        context_length: Maximum number of tokens per caption, start and end tokens included. None: the recipe's.
        reading: The columns of a table to read.
        skip_data_checks: Train although the captions look meaningless.

    Returns:
        The comparison, a sentence of advice, the command that trains the recommended method and, with `fractions`, each method's data
        efficiency.

    Raises:
        UserError: A setting is invalid, the data cannot be used, the time is too short, or fewer than two methods finished.

    Example:
        ```python
        result = coalign.benchmark("photos", "runs/benchmark", ["clip", "mcd"], minutes=60)
        print(result.advice)
        ```
    """
    started, out, console = time.monotonic(), Path(out), Console(highlight=False, soft_wrap=True)
    methods = list(dict.fromkeys([BASE, *methods]))
    jobs = num_cores() if jobs is None else jobs
    towers = {name: tower for name, tower in {"image_tower": image_tower, "text_tower": text_tower}.items() if tower}
    _check(methods, towers, minutes, epochs, fractions, seeds, jobs)
    settings = {
        "data": data,
        "methods": [*methods, *([LOCKED] if towers else [])],
        "towers": towers,
        "minutes": minutes,
        "epochs": epochs,
        "fractions": sorted({*fractions, 1.0}),
        "seeds": seeds,
        "context_length": context_length,
        "reading": json.loads(json.dumps(to_json(reading))),
        "skip_data_checks": skip_data_checks,
    }
    plan = _stored_plan(out, settings)
    if plan is None:
        plan = _plan(data, settings, out, jobs, console, started)
        for line in plan.lines(seeds):
            console.print(line, markup=False)
        write_json(out / PLAN, {"settings": settings, "plan": asdict(plan)}, indent=1)
    sweep = _table(settings, plan)
    failures = run_table(sweep, list(sweep.arms), seeds, jobs, data, out)
    done = [trial for trial in table_trials(sweep, list(sweep.arms), seeds, data, out) if finished(trial)]
    if len({trial.arm for trial in done if sweep.arms[trial.arm].train_fraction == 1}) < 2:
        raise UserError(f"There is nothing to compare: {'; '.join(failures)}. The logs are in {out}.")
    result = judge(done, _left_out(done, sweep, data, out))
    write_page(result, report or out / "benchmark.html")
    write_json(out / RESULT, result.to_json(), indent=1, default=str)
    for failure in failures:
        console.print(f"failed: {failure}; its log is in {out}", markup=False)
    return result


def _left_out(done: Sequence[Trial], sweep: Table, data: str, out: Path) -> dict[str, str]:
    """The methods without a finished run, and the fractions that only some methods have, with the reasons."""
    arms, reasons = {trial.arm for trial in done}, diverged(sweep, list(sweep.arms), data, out)
    missing = [arm for arm in sweep.arms if arm not in arms and (sweep.whole(arm) in arms or sweep.whole(arm) == arm)]
    return {arm: reasons.get(arm, "its trials failed") for arm in missing}


def _check(
    methods: Sequence[str],
    towers: Mapping[str, str],
    minutes: float,
    epochs: float | None,
    fractions: Sequence[float],
    seeds: int,
    jobs: int,
) -> None:
    known = [*METHODS, "clip-strong"]
    if unknown := [name for name in methods if name not in known]:
        raise UserError(f"There is no method named {unknown[0]!r}; the methods are {', '.join(known)}.")
    if len(methods) < 2 and not towers:
        raise UserError(f"--methods must name another method besides {BASE}, such as uniclip or mcd.")
    for name, value in {"--minutes": minutes, "--epochs": epochs, "--seeds": seeds, "--jobs": jobs}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}, but must be more than 0.")
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise UserError(f"--fractions contains {wrong[0]:g}, but each must be more than 0 and at most 1.")


# ---------------------------------------------------------------- planning


def _stored_plan(out: Path, settings: Mapping[str, Any]) -> Plan | None:
    """Returns the plan of an interrupted benchmark, so that it resumes unchanged. None: it has not begun; its folder is made."""
    place = out / PLAN
    if not place.exists():
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The benchmark cannot be written to {out}: {error.strerror}; choose another --out."
            ) from error
        return None
    try:
        stored = json.loads(place.read_text())
        earlier, plan = stored["settings"], Plan(**stored["plan"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{place} is not a plan written by `coalign benchmark`; choose another --out.") from error
    current = json.loads(json.dumps(settings))
    if earlier != current:
        was = {name: value for name, value in earlier.items() if current.get(name) != value}
        raise UserError(
            f"The benchmark in {out} was started with different settings, {was}; use these, or choose another --out."
        )
    return plan


def _table(settings: Mapping[str, Any], plan: Plan | None = None) -> Table:
    """The methods as arms of a table with a search. Without a plan, without the lengths of the trials."""
    epochs = dict.fromkeys(settings["methods"], 1.0) if plan is None else plan.epochs
    arms = {method: Arm(method, epochs=epochs[method]) for method in settings["methods"] if method != LOCKED}
    if towers := settings["towers"]:
        start = {name: towers.get(name) for name in ("image_tower", "text_tower")} | {"head": HEAD}
        start |= {name.replace("tower", "tuning"): "locked" for name in towers}
        arms[LOCKED] = Arm(BASE, epochs=epochs[LOCKED], start=start)
    return Table(
        "benchmark",
        by_fraction(arms, settings["fractions"][::-1]),
        epochs=1.0,
        search=Search(LENGTHS, 1 if plan is None else plan.trials, own_first=True),
        batch_size=None,
        image_size=None,
        val_fraction=HELD_OUT,
        test_fraction=HELD_OUT,
        test_splits=(TEST,),
        evals=EVALS,
        precision="auto",
        reading=from_json(DataConfig, settings["reading"]),
        context_length=settings["context_length"],
        skip_data_checks=settings["skip_data_checks"],
        caption_safe_views=True,
    )


def _open(data: str, settings: Mapping[str, Any], console: Console) -> int:
    """Prints what the data leaves out, and returns the number of training pairs.

    Raises UserError if the data is unsuitable, too few pairs are held out, or the smallest fraction has fewer than two batches.
    """
    sweep = _table(settings)
    pairs, config = check_trials(data, lambda number: replace(sweep.config(BASE, 0, number), test_splits=()), console)
    sizes = {name: len(indices) for name, indices in run_splits(pairs.source, config).items()}
    val, test = sizes["val"], sizes.get(TEST, 0)
    if min(val, test) < LEAST:
        raise UserError(
            f"Of {data}, only {val:,} pairs are for validation and {test:,} for test, but {LEAST} of each are needed; use more data."
        )
    least = round(min(settings["fractions"]) * len(pairs.train))
    if least < 2 * config.batch_size:
        raise UserError(
            f"{min(settings['fractions']):g} of {len(pairs.train):,} pairs are {least:,}, fewer than two batches of {config.batch_size}; "
            "omit the smallest fraction."
        )
    console.print(f"{len(pairs.train):,} pairs for training, {val:,} for validation, {test:,} for test")
    return len(pairs.train)


def _plan(data: str, settings: Mapping[str, Any], out: Path, jobs: int, console: Console, started: float) -> Plan:
    """Measures the speed of the methods on a trial's share of the cores, and plans the rest of the time."""
    number = _open(data, settings, console)
    sweep, threads, speeds, spent = _table(settings), torch.get_num_threads(), {}, 0.0
    torch.set_num_threads(max(1, num_cores() // jobs))
    try:
        for method in settings["methods"]:
            with waiting(f"Measuring the speed of {method}"):
                trial = Trial(sweep, method, 0, data, out)
                speeds[method], of_features = _speed(data, partial(_alone, trial))
                spent += number * of_features
    finally:
        torch.set_num_threads(threads)
    return make_plan(
        speeds,
        number,
        settings["minutes"],
        spent=time.monotonic() - started + spent,
        fractions=len(settings["fractions"]),
        seeds=settings["seeds"],
        jobs=jobs,
        longest=settings["epochs"],
    )


def _speed(data: str, config_for: ConfigFn) -> tuple[float, float]:
    """Measures pairs per second, and the seconds per pair that the features of locked encoders take before.

    Without such features, a few steps are not enough: at first, images are decoded and workers start.
    """
    found = profile(data, config_for, steps=PROFILED)
    if not found.feature_seconds and (steps := math.ceil(MEASURED_SECONDS / found.seconds)) > PROFILED:
        found = profile(data, config_for, steps=steps)
    return found.pairs_per_second, found.feature_seconds


def _alone(trial: Trial, num_pairs: int) -> TrainConfig:
    """The settings of a trial that has one core."""
    return replace(trial.config(num_pairs), workers=0)


def benchmark_and_write(data: str, out: Path, report: Path | None, json_path: Path | None, **options: Any) -> None:
    """`coalign benchmark`: trains, prints results and advice, and writes the page and the JSON file."""
    for path in (json_path, report):
        if path:
            check_output(path)  # before the work
    report = report or out / "benchmark.html"
    result = benchmark(data, out, report=report, **options)
    print_result(result)
    if json_path:
        write_results(result.to_json(), json_path)
    print(f"Report: {report}")
