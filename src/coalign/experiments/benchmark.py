"""benchmark(): trains methods on your data on equal terms, ranks them, and measures how many fewer pairs than CLIP they need."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from coalign.config import DETECT, DataConfig, TrainConfig, from_json, to_json
from coalign.cores import num_cores
from coalign.errors import UserError
from coalign.experiments.compare import compare
from coalign.experiments.compare_terminal import print_comparison
from coalign.experiments.data_efficiency import (
    BASE,
    Efficiency,
    Scores,
    efficiencies,
    efficiency_words,
    fraction_draws,
    fraction_scores,
)
from coalign.experiments.trials import Trial, finished, run_trials
from coalign.files import write_json
from coalign.formatting import duration, percent
from coalign.methods import METHODS
from coalign.methods.table import Arm, Table, fraction_name
from coalign.progress import waiting
from coalign.report import compare_figures
from coalign.report.compare_page import ComparedMetric, Comparison, compare_page
from coalign.report.page import Page
from coalign.runs.folder import check_output
from coalign.version import __version__
from coalign.workflows.evaluate.eval_report import write_results
from coalign.workflows.train.preflight import check_trials
from coalign.workflows.train.profile import profile
from coalign.workflows.train.setup import ConfigFn

# The mean of the first of these that all runs have ranks the methods: title -> task and name of each metric. Accuracy: the captions are
# class labels. R@5 or R@1: among ten captions, R@10 is 100 % for any model.
HEADLINES = {
    "zero-shot top-1": (("zeroshot", "acc1"),),
    **{
        f"R@{k}, mean of both directions": (("retrieval", f"image_to_text.r{k}"), ("retrieval", f"text_to_image.r{k}"))
        for k in (10, 5, 1)
    },
}
OVERHEAD = 40.0  # seconds of a trial besides training: start-up, evaluation, report
PLAN, RESULT = "plan.json", "benchmark.json"
VAL_FRACTION, EVALS = 0.1, 5
PROFILED = 6  # steps by which the speed is estimated, to choose how many measure it
MEASURED_SECONDS = 5.0  # of training by which the speed is measured: epochs after the first, too, if they are short


@dataclass
class BenchmarkResult:
    """The result of a benchmark.

    Attributes:
        comparison: The trials, with one group per method and fraction.
        advice: One sentence: which method is best, and whether its lead is significant.
        efficiency: By method, how many times fewer pairs than CLIP it needs for equal scores. Empty without fractions.
        by_fraction: Scores by method, fraction of the pairs and seed: R@10, mean of both directions.
        headline: The title of the metric that ranks the methods.
    """

    comparison: Comparison
    advice: str
    efficiency: dict[str, Efficiency]
    by_fraction: Scores = field(default_factory=dict)
    headline: str = ""

    def to_json(self) -> dict[str, Any]:
        """Returns all values, as in `benchmark.json`."""
        efficiency = {name: asdict(found) for name, found in self.efficiency.items()}
        found = {"efficiency": efficiency, "by_fraction": self.by_fraction}
        return {"version": __version__, "advice": self.advice, **found, **self.comparison.to_json()}


def benchmark(
    data: str,
    out: str | Path,
    methods: Sequence[str] = ("clip", "uniclip", "mcd"),
    *,
    minutes: float = 60.0,
    epochs: float | None = None,
    max_epochs: float | None = None,
    fractions: Sequence[float] = (1.0,),
    seeds: int = 2,
    jobs: int | None = None,
    report: Path | None = None,
    context_length: int | None = None,
    reading: DataConfig = DETECT,
    skip_data_checks: bool = False,
) -> BenchmarkResult:
    """Trains several methods on the same pairs, and compares them on the same held-out pairs.

    Writes `benchmark.html` and `benchmark.json` to `out`. If interrupted, run it again to resume: finished trials are kept.

    Args:
        data: The training data, as in `open_data`.
        out: The folder of the trials and the results.
        methods: Names of methods, or clip-strong. CLIP is always trained, as the base of the comparison.
        minutes: Total training time of all trials, equal for every method. The number of epochs follows from its measured speed.
        epochs: Train every method for this many epochs instead, at equal samples seen.
        max_epochs: Use less time, equal for every method, if one of them would train for more epochs.
        fractions: Fractions of the training pairs to train on, besides all of them, at equal samples seen.
        seeds: The number of seeds (0 to seeds - 1).
        jobs: The number of trials that run at once. None: one per core.
        report: Write the page to this HTML file. None: `benchmark.html` in `out`.
        context_length: Maximum number of tokens per caption, start and end tokens included. None: the recipe's.
        reading: The columns of a table to read.
        skip_data_checks: Train although the captions look meaningless.

    Returns:
        The comparison, a sentence of advice and, with `fractions`, each method's data efficiency.

    Raises:
        UserError: A setting is invalid, the data cannot be used, the time is too short, or fewer than two methods finished.

    Example:
        ```python
        result = coalign.benchmark("photos", "runs/benchmark", ["clip", "mcd"], minutes=60, seeds=3)
        print(result.advice)
        ```
    """
    out, console = Path(out), Console(highlight=False, soft_wrap=True)
    methods = list(dict.fromkeys([BASE, *methods]))
    jobs = num_cores() if jobs is None else jobs
    _check(methods, minutes, epochs, fractions, seeds, jobs)
    fractions = sorted({*fractions, 1.0})
    settings = {
        "data": data,
        "methods": methods,
        "minutes": minutes,
        "epochs": epochs,
        "max_epochs": max_epochs,
        "fractions": fractions,
        "seeds": seeds,
        "context_length": context_length,
        "reading": json.loads(json.dumps(to_json(reading))),
        "skip_data_checks": skip_data_checks,
    }
    sweep = _sweep(data, out, settings, jobs, console)
    trials = [Trial(sweep, arm, seed, data, out) for seed in range(seeds) for arm in sweep.arms]
    failures = run_trials([trial for trial in trials if not finished(trial)], jobs)
    done = [trial for trial in trials if finished(trial)]
    if len({trial.arm for trial in done}) < 2:
        raise UserError(f"There is nothing to compare: {'; '.join(failures)}. The logs are in {out}.")
    result = judge(done)
    _page(result).write(report or out / "benchmark.html")
    write_json(out / RESULT, result.to_json(), indent=1, default=str)
    for failure in failures:
        console.print(f"failed: {failure}; its log is in {out}", markup=False)
    return result


def _page(result: BenchmarkResult) -> Page:
    page = compare_page(result.comparison, [result.advice, *efficiency_words(result.efficiency)])
    if result.by_fraction:
        page.section("By dataset size")
        page.figure(
            compare_figures.by_fraction(result.by_fraction),
            f"{result.headline}, against the fraction of the pairs trained on, at equal samples seen. Points are seeds, lines their "
            "means. Where a line crosses CLIP's score on all pairs (dotted), that fraction is enough to match it.",
        )
    return page


def _check(
    methods: Sequence[str], minutes: float, epochs: float | None, fractions: Sequence[float], seeds: int, jobs: int
) -> None:
    known = [*METHODS, "clip-strong"]
    if unknown := [name for name in methods if name not in known]:
        raise UserError(f"There is no method named {unknown[0]!r}; the methods are {', '.join(known)}.")
    if len(methods) < 2:
        raise UserError(f"--methods must name another method besides {BASE}, such as uniclip or mcd.")
    for name, value in {"--minutes": minutes, "--epochs": epochs, "--seeds": seeds, "--jobs": jobs}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}, but must be more than 0.")
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise UserError(f"--fractions contains {wrong[0]:g}, but each must be more than 0 and at most 1.")


# ---------------------------------------------------------------- planning


def _sweep(data: str, out: Path, settings: Mapping[str, Any], jobs: int, console: Console) -> Table:
    """The arms and their epochs. They are planned once and stored, so that an interrupted benchmark resumes unchanged."""
    place = out / PLAN
    if place.exists():
        try:
            stored = json.loads(place.read_text())
            earlier = stored["settings"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place} is not a plan written by `coalign benchmark`; choose another --out.") from error
        current = json.loads(json.dumps(settings))
        if earlier != current:
            was = {name: value for name, value in earlier.items() if current.get(name) != value}
            raise UserError(
                f"The benchmark in {out} was started with different settings, {was}; use these, or choose another --out."
            )
        return _table(settings, stored["epochs"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The benchmark cannot be written to {out}: {error.strerror}; choose another --out.") from error
    epochs = dict.fromkeys(settings["methods"], settings["epochs"])
    if settings["epochs"] is None:
        epochs = _affordable(data, settings, jobs, console)
    else:
        _open(data, settings, console)
    write_json(place, {"settings": settings, "epochs": epochs}, indent=1)
    return _table(settings, epochs)


def _table(settings: Mapping[str, Any], epochs: Mapping[str, float]) -> Table:
    arms = {
        fraction_name(method, fraction): Arm(method, epochs=epochs[method], train_fraction=fraction)
        for fraction in reversed(settings["fractions"])
        for method in settings["methods"]
    }
    return Table(
        "benchmark",
        arms,
        1.0,
        batch_size=None,
        image_size=None,
        val_fraction=VAL_FRACTION,
        evals=EVALS,
        reading=from_json(DataConfig, settings["reading"]),
        context_length=settings["context_length"],
        skip_data_checks=settings["skip_data_checks"],
        caption_safe_views=True,
    )


def _open(data: str, settings: Mapping[str, Any], console: Console) -> int:
    """Prints what the data leaves out, and returns the number of training pairs.

    Raises UserError if the data is unsuitable, or the smallest fraction has fewer than two batches.
    """
    sweep = _table(settings, dict.fromkeys(settings["methods"], 1.0))
    pairs, config = check_trials(data, lambda number: sweep.config(BASE, 0, number), console)
    least = round(min(settings["fractions"]) * len(pairs.train))
    if least < 2 * config.batch_size:
        raise UserError(
            f"{min(settings['fractions']):g} of {len(pairs.train):,} pairs are {least:,}, fewer than two batches of {config.batch_size}; "
            "omit the smallest fraction."
        )
    return len(pairs.train)


def _affordable(data: str, settings: Mapping[str, Any], jobs: int, console: Console) -> dict[str, float]:
    """Epochs that each method can train in its share of the time, by its speed on a trial's share of the cores."""
    number = _open(data, settings, console)
    trials = len(settings["methods"]) * len(settings["fractions"]) * settings["seeds"]
    seconds = settings["minutes"] * 60 / math.ceil(trials / jobs) - OVERHEAD
    if seconds < OVERHEAD:
        least = math.ceil(2 * OVERHEAD * math.ceil(trials / jobs) / 60)
        raise UserError(f"--minutes {settings['minutes']:g} is too short for {trials} trials; give {least} or more.")
    sweep = _table(settings, dict.fromkeys(settings["methods"], 1.0))
    threads, speeds = torch.get_num_threads(), {}
    torch.set_num_threads(max(1, num_cores() // jobs))
    try:
        for method in settings["methods"]:
            with waiting(f"Measuring the speed of {method}"):
                speeds[method] = _speed(data, partial(_alone, sweep, method))
    finally:
        torch.set_num_threads(threads)
    if settings["max_epochs"] is not None:
        seconds = min(seconds, settings["max_epochs"] * number / max(speeds.values()))
    epochs = {method: seconds * speed / number for method, speed in speeds.items()}
    for method, speed in speeds.items():
        console.print(f"{method}: {speed:,.0f} pairs/s; {epochs[method]:.1f} epochs in {duration(seconds)} per trial")
    return epochs


def _speed(data: str, config_for: ConfigFn) -> float:
    """Measures pairs per second. A few steps are not enough: at first, images are decoded and workers start."""
    found = profile(data, config_for, steps=PROFILED)
    if (steps := math.ceil(MEASURED_SECONDS / found.seconds)) > PROFILED:
        found = profile(data, config_for, steps=steps)
    return found.pairs_per_second


def _alone(sweep: Table, method: str, num_pairs: int) -> TrainConfig:
    """The settings of a trial that has one core."""
    return replace(sweep.config(method, 0, num_pairs), workers=0)


# ---------------------------------------------------------------- results


def judge(trials: Sequence[Trial]) -> BenchmarkResult:
    """Compares finished trials: metrics, one sentence of advice, and each method's data efficiency."""
    arms = {trial.arm: trial.sweep.arms[trial.arm] for trial in trials}
    comparison = compare([trial.folder for trial in trials], groups=[trial.arm for trial in trials])
    whole = [name for name, arm in arms.items() if arm.train_fraction == 1]
    headline, metrics = _headline(comparison)
    if not metrics:
        advice = "The methods cannot be ranked: too few pairs are held out, or they have equal captions; use more data."
        return BenchmarkResult(comparison, advice, {})
    names = [f"{task}.{name}" for task, name in metrics]
    scores = {group.name: _score([group.metrics[name] for name in names]) for group in comparison.groups}
    best, *others = sorted(whole, key=lambda name: -scores[name])
    above_chance = {
        group.name for group in comparison.groups if any(_above_chance(group.metrics[name]) for name in names)
    }
    if best not in above_chance:
        advice = f"No method beats chance yet: the best {headline.partition(',')[0]} is {percent(scores[best])} ({best}); train longer."
        return BenchmarkResult(comparison, advice, {}, headline=headline)
    by_fraction = fraction_scores(trials, metrics) if BASE in above_chance else {}
    advice = _advice(trials, best, others, scores, headline, names)
    efficiency = efficiencies(by_fraction, fraction_draws(trials, metrics) if by_fraction else None)
    return BenchmarkResult(comparison, advice, efficiency, by_fraction, headline)


def _headline(comparison: Comparison) -> tuple[str, Sequence[tuple[str, str]]]:
    """The title and the metrics that rank the methods; none if no metric can differ from chance."""
    known = comparison.groups[0].metrics
    found = (item for item in HEADLINES.items() if all(f"{task}.{name}" in known for task, name in item[1]))
    return next(found, ("", ()))


def _above_chance(metric: ComparedMetric) -> bool:
    return metric.over_items is not None and metric.chance is not None and metric.over_items[0] > metric.chance


def _score(metrics: Sequence[ComparedMetric]) -> float:
    return float(np.mean([metric.value for metric in metrics]))


def _advice(
    trials: Sequence[Trial],
    best: str,
    others: Sequence[str],
    scores: Mapping[str, float],
    headline: str,
    names: Sequence[str],
) -> str:
    start = f"On these pairs {best} is best: {headline}, {percent(scores[best])}"
    if not others:
        return f"{start}."
    close = []
    for other in others:
        chosen = [trial for name in (other, best) for trial in trials if trial.arm == name]
        metrics = compare([t.folder for t in chosen], groups=[t.arm for t in chosen]).groups[1].metrics
        intervals = [
            interval
            for name in names
            for interval in (metrics[name].difference_over_items, metrics[name].difference_over_seeds)
            if interval is not None
        ]
        if any(low <= 0 for low, _ in intervals):
            close.append(other)
    second = others[0]
    lead = f"{start}, {100 * (scores[best] - scores[second]):.1f} percentage points ahead of {second}"
    if not close:
        return f"{lead}; its lead over every other method is significant over held-out pairs and seeds."
    if second not in close:
        return f"{lead}; its lead over {', '.join(close)} is not significant."
    whole = "this lead is" if close == [second] else f"its leads over {', '.join(close)} are"
    longer = "" if scores[best] == 1 else ", or train longer"
    return f"{lead}, but {whole} not significant: choose the cheapest of them{longer}."


def benchmark_and_write(data: str, out: Path, report: Path | None, json_path: Path | None, **options: Any) -> None:
    """`coalign benchmark`: trains, prints the comparison and the advice, and writes the page and the JSON file."""
    for path in (json_path, report):
        if path:
            check_output(path)  # before the work
    report = report or out / "benchmark.html"
    result = benchmark(data, out, report=report, **options)
    print_comparison(result.comparison)
    print("\n".join([result.advice, *efficiency_words(result.efficiency)]))
    if json_path:
        write_results(result.to_json(), json_path)
    print(f"Report: {report}")
