"""contest(): which method is best for these data, trained on equal terms, and how many fewer pairs it needs than CLIP."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from coalign import __version__
from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.methods import METHODS
from coalign.recipes.sweep import Arm, Table, fraction_name
from coalign.report import compare_figures
from coalign.report.compare_page import Comparison, Figure, compare_page
from coalign.run.compare import compare
from coalign.run.efficiency import BASE, Efficiency, Scores, efficiencies, efficiency_words, fraction_scores
from coalign.run.findings import write_json
from coalign.run.model import check_output, write_file
from coalign.run.prepare import open_data
from coalign.run.profile import profile
from coalign.run.reporting import print_comparison
from coalign.run.reproduce import Trial, finished, run_trials
from coalign.training.distributed import World

HEADLINE = ("retrieval.image_to_text.r10", "retrieval.text_to_image.r10")  # their mean decides
OVERHEAD = 40.0  # seconds that a trial takes beside its training: to start, to evaluate, to report
PLAN, RESULT = "plan.json", "contest.json"
VAL_FRACTION, EVALS, PROFILED = 0.1, 5, 6


@dataclass
class Contest:
    comparison: Comparison
    advice: str
    efficiency: dict[str, Efficiency]  # by method, where fractions were tried
    by_fraction: Scores = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        efficiency = {name: asdict(found) for name, found in self.efficiency.items()}
        found = {"efficiency": efficiency, "by_fraction": self.by_fraction}
        return {"version": __version__, "advice": self.advice, **found, **self.comparison.to_json()}


def contest(
    data: str,
    out: str | Path,
    methods: Sequence[str] = ("clip", "uniclip", "mcd"),
    *,
    minutes: float = 60.0,
    epochs: float | None = None,
    fractions: Sequence[float] = (1.0,),
    seeds: int = 2,
    jobs: int | None = None,
    report: Path | None = None,
) -> Contest:
    """Trains each method with seeds 0 … seeds - 1 on each fraction of the pairs, and compares them on the pairs that all hold out.

    Either all trials take `minutes` together, each method for as long as any other, by its speed here; or each sees as many pairs as
    `epochs` over all of them have. A fraction's trials see as many pairs as those of all pairs, the fewer more often. `jobs` trials run at
    once (default: one a core). Leaves contest.html (or `report`) and contest.json in `out`; what is finished stays, what was stopped goes
    on.
    """
    out, console = Path(out), Console(highlight=False, soft_wrap=True)
    methods = list(dict.fromkeys([BASE, *methods]))
    jobs = max(1, os.cpu_count() or 1) if jobs is None else jobs
    _check(methods, minutes, epochs, fractions, seeds, jobs)
    fractions = sorted({*fractions, 1.0})
    asked = {
        "data": data,
        "methods": methods,
        "minutes": minutes,
        "epochs": epochs,
        "fractions": fractions,
        "seeds": seeds,
    }
    sweep = _sweep(data, out, asked, jobs, console)
    trials = [Trial(sweep, arm, seed, data, out) for seed in range(seeds) for arm in sweep.arms]
    failures = run_trials([trial for trial in trials if not finished(trial)], jobs, console)
    done = [trial for trial in trials if finished(trial)]
    if len({trial.arm for trial in done}) < 2:
        raise UserError(f"There is nothing to compare: {'; '.join(failures)}. Their logs are beside them in {out}.")
    result = judge(done)
    page = compare_page(result.comparison, [result.advice, *efficiency_words(result.efficiency)])
    if result.by_fraction:
        page.section("By the number of pairs")
        page.figure(
            compare_figures.by_fraction(result.by_fraction),
            "R@10, the mean of both directions, against the share of the pairs that were trained on, in about as many steps. Points are "
            "seeds, lines their means. Where a line reaches CLIP's score on all pairs (dotted), so many pairs are enough.",
        )
    page.write(report or out / "contest.html")
    text = json.dumps(result.to_json(), indent=1, default=str) + "\n"
    write_file(out / RESULT, lambda path: path.write_text(text))
    for failure in failures:
        console.print(f"failed: {failure}; its log is beside it in {out}")
    return result


def _check(
    methods: Sequence[str], minutes: float, epochs: float | None, fractions: Sequence[float], seeds: int, jobs: int
) -> None:
    if unknown := [name for name in methods if name not in METHODS]:
        raise UserError(f"There is no method named {unknown[0]!r}; there are {', '.join(METHODS)}.")
    if len(methods) < 2:
        raise UserError(f"Name another method than {BASE}, such as uniclip or mcd.")
    for name, value in {"--minutes": minutes, "--epochs": epochs, "--seeds": seeds, "--jobs": jobs}.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} is {value}, but must be more than 0.")
    if wrong := [fraction for fraction in fractions if not 0 < fraction <= 1]:
        raise UserError(f"A fraction is {wrong[0]:g}, but must be more than 0 and at most 1.")


# ---------------------------------------------------------------- what is trained


def _sweep(data: str, out: Path, asked: Mapping[str, Any], jobs: int, console: Console) -> Table:
    """The arms and their epochs; settled once, so that what was stopped goes on as it was."""
    place = out / PLAN
    if place.exists():
        try:
            stored = json.loads(place.read_text())
            was_asked = stored["asked"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{place} is not what a contest writes; choose another --out.") from error
        if was_asked != asked:
            was = {name: value for name, value in was_asked.items() if asked.get(name) != value}
            raise UserError(
                f"The contest in {out} was started with other settings, {was}; give these, or another --out."
            )
        return _table(asked, stored["epochs"])
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The contest cannot be written to {out}: {error.strerror}; choose another --out.") from error
    epochs = dict.fromkeys(asked["methods"], asked["epochs"])
    if asked["epochs"] is None:
        epochs = _affordable(data, asked, jobs, console)
    else:
        _open(data, asked)
    text = json.dumps({"asked": asked, "epochs": epochs}, indent=1) + "\n"
    write_file(place, lambda path: path.write_text(text))
    return _table(asked, epochs)


def _table(asked: Mapping[str, Any], epochs: Mapping[str, float]) -> Table:
    arms = {
        fraction_name(method, fraction): Arm(method, epochs=epochs[method], train_fraction=fraction)
        for fraction in reversed(asked["fractions"])
        for method in asked["methods"]
    }
    return Table("contest", arms, 1.0, batch_size=None, image_size=None, val_fraction=VAL_FRACTION, evals=EVALS)


def _open(data: str, asked: Mapping[str, Any]) -> int:
    """The number of pairs to train on. UserError where the smallest fraction has no two batches."""
    sweep = _table(asked, dict.fromkeys(asked["methods"], 1.0))
    pairs, config = open_data(data, lambda number: sweep.config(BASE, 0, number), World(0, 1, torch.device("cpu")))
    least = round(min(asked["fractions"]) * len(pairs.train))
    if least < 2 * config.batch_size:
        raise UserError(
            f"{min(asked['fractions']):g} of {len(pairs.train):,} pairs are {least:,}, less than two batches of {config.batch_size}; "
            "leave out the smallest fraction."
        )
    return len(pairs.train)


def _affordable(data: str, asked: Mapping[str, Any], jobs: int, console: Console) -> dict[str, float]:
    """Epochs of each method for its share of the time, by its speed with a trial's share of the cores."""
    number = _open(data, asked)
    trials = len(asked["methods"]) * len(asked["fractions"]) * asked["seeds"]
    seconds = asked["minutes"] * 60 / math.ceil(trials / jobs) - OVERHEAD
    if seconds < OVERHEAD:
        least = math.ceil(2 * OVERHEAD * math.ceil(trials / jobs) / 60)
        raise UserError(f"--minutes {asked['minutes']:g} is too little for {trials} trials; give {least} or more.")
    sweep = _table(asked, dict.fromkeys(asked["methods"], 1.0))
    threads, epochs = torch.get_num_threads(), {}
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // jobs))
    try:
        for method in asked["methods"]:
            found = profile(data, partial(_alone, sweep, method), steps=PROFILED)
            epochs[method] = seconds * found.pairs_per_second / number
            console.print(
                f"{method}: {found.pairs_per_second:,.0f} pairs a second; {epochs[method]:.1f} epochs in {seconds / 60:.1f} min a trial"
            )
    finally:
        torch.set_num_threads(threads)
    return epochs


def _alone(sweep: Table, method: str, num_pairs: int) -> TrainConfig:
    """As a trial with a core to itself is trained."""
    return replace(sweep.config(method, 0, num_pairs), workers=0)


# ---------------------------------------------------------------- what came out


def judge(trials: Sequence[Trial]) -> Contest:
    """The comparison of finished trials, a sentence of advice, and the efficiency of every method."""
    arms = {trial.arm: trial.sweep.arms[trial.arm] for trial in trials}
    comparison = compare([trial.folder for trial in trials], groups=[trial.arm for trial in trials])
    whole = [name for name, arm in arms.items() if arm.train_fraction == 1]
    scores = {group.name: _score([group.figures[name] for name in HEADLINE]) for group in comparison.groups}
    best, *others = sorted(whole, key=lambda name: -scores[name])
    learnt = {group.name for group in comparison.groups if any(_above_chance(group.figures[name]) for name in HEADLINE)}
    if best not in learnt:
        advice = (
            f"No method is told from chance yet: R@10 of the best, {best}, is {100 * scores[best]:.1f} %; train longer."
        )
        return Contest(comparison, advice, {})
    by_fraction = fraction_scores(trials) if BASE in learnt else {}
    return Contest(comparison, _advice(trials, best, others, scores), efficiencies(by_fraction), by_fraction)


def _above_chance(figure: Figure) -> bool:
    return figure.over_items is not None and figure.chance is not None and figure.over_items[0] > figure.chance


def _score(figures: Sequence[Figure]) -> float:
    return float(np.mean([figure.value for figure in figures]))


def _advice(trials: Sequence[Trial], best: str, others: Sequence[str], scores: Mapping[str, float]) -> str:
    said = f"On these pairs {best} is best: R@10, the mean of both directions, {100 * scores[best]:.1f} %"
    if not others:
        return f"{said}."
    close = []
    for other in others:
        chosen = [trial for name in (other, best) for trial in trials if trial.arm == name]
        figures = compare([t.folder for t in chosen], groups=[t.arm for t in chosen]).groups[1].figures
        intervals = [
            interval
            for name in HEADLINE
            for interval in (figures[name].difference_over_items, figures[name].difference_over_seeds)
            if interval is not None
        ]
        if any(low <= 0 for low, _ in intervals):
            close.append(other)
    second = others[0]
    lead = f"{said}, {100 * (scores[best] - scores[second]):.1f} points before {second}"
    if not close:
        return f"{lead}; it is ahead of all others over held-out pairs and seeds."
    if second in close:
        return f"{lead}, which is within noise ({', '.join(close)} cannot be told from it): take the cheapest of them, or train longer."
    return f"{lead}; {', '.join(close)} cannot be told from it."


def compare_and_write(
    runs: Sequence[str], data: str | None, out: Path | None, report: Path | None, json_path: Path | None, **options: Any
) -> None:
    """What `coalign compare` does: finished runs, or a contest on data; prints the comparison and writes what is asked for."""
    if bool(runs) == (data is not None):
        raise UserError(
            "Give either two runs or more, such as runs/clip runs/slip, or --data to train on, and not both."
        )
    if data is not None and out is None:
        raise UserError("Name a folder for the runs with --out.")
    for path in (json_path, report):
        if path:
            check_output(path)  # before the work
    if data is not None and out is not None:
        report = report or out / "contest.html"
        result: Contest | Comparison = contest(data, out, report=report, **options)
    else:
        result = compare(runs, report)
    comparison = result.comparison if isinstance(result, Contest) else result
    print_comparison(comparison)
    if isinstance(result, Contest):
        print("\n".join([result.advice, *efficiency_words(result.efficiency)]))
    if json_path:
        write_json(result.to_json(), json_path)
    if report:
        print(f"Report: {report}")
