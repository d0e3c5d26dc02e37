"""reproduce(): trains a table of experiments trial by trial, and compares its arms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from scipy.stats import spearmanr

from coalign.config import DETECT, DataConfig
from coalign.errors import UserError
from coalign.experiments import tag_pretraining as tag_pretraining
from coalign.experiments.compare import compare
from coalign.experiments.data_efficiency import efficiencies, efficiency_words, fraction_scores
from coalign.experiments.launch_script import write_launch
from coalign.experiments.tables import table
from coalign.experiments.trials import CLASSES, LAUNCH, TAG_ENCODER, Trial, finished, run_trials
from coalign.files import write_json
from coalign.methods.table import Table
from coalign.metric import value_text
from coalign.report.compare_page import ComparedMetric, Comparison
from coalign.version import __version__
from coalign.workflows.train.preflight import check_trials

R10 = "image_to_text.r10"  # a table whose headline is this metric of a task also measures data efficiency by it


def reproduce(
    name: str,
    data: str,
    out: str | Path,
    *,
    scale: Literal["cpu", "paper"] = "cpu",
    seeds: int = 3,
    jobs: int = 1,
    arms: Sequence[str] = (),
    reading: DataConfig = DETECT,
    skip_data_checks: bool = False,
) -> Comparison | None:
    """Trains every arm of a table with seeds 0 to seeds - 1 in the folder `out`, then compares them: out/table.json, out/table.html.

    Finished trials are kept, interrupted ones are resumed. `jobs` trials run at once, each on its share of the cores. `arms`: train only
    these (default: all), and the arms whose weights they evaluate. The comparison covers all finished trials; it is None with fewer than
    two. `reading` names the columns of a table. A failed trial does not stop the others; it is named in a UserError at the end. Raises
    UserError if a check of the data finds a problem, unless `skip_data_checks`.

    With scale "paper" nothing is trained: out/launch.sh receives the commands that train the arms with the paper's recipes.
    """
    sweep, out = replace(table(name), reading=reading, skip_data_checks=skip_data_checks), Path(out)
    if unknown := [arm for arm in arms if arm not in sweep.arms]:
        raise UserError(f"The table {name} has no arm {unknown[0]!r}; its arms are {', '.join(map(repr, sweep.arms))}.")
    if seeds < 1 or jobs < 1:
        raise UserError(f"--seeds is {seeds} and --jobs {jobs}, but both must be at least 1.")
    try:
        out.mkdir(parents=True, exist_ok=True)
        if sweep.classes and scale == "cpu":
            (out / CLASSES).write_text("\n".join(sweep.classes) + "\n")
    except OSError as error:
        raise UserError(f"The table cannot be written to {out}: {error.strerror}; choose another --out.") from error
    console = Console(highlight=False, soft_wrap=True)
    if scale == "paper":
        left_out = write_launch(out / LAUNCH, name, sweep, list(arms or sweep.arms), data, seeds)
        console.print(f"Commands written to {out / LAUNCH}. Nothing was trained.")
        if left_out:
            console.print(f"Omitted, as they have no recipe at that scale: {', '.join(left_out)}")
        return None
    chosen = list(arms or sweep.arms)
    bases = [base for arm in chosen if (base := sweep.arms[arm].weights_of) and base not in chosen]
    trials = [Trial(sweep, arm, seed, data, out) for seed in range(seeds) for arm in dict.fromkeys([*bases, *chosen])]
    missing = [trial for trial in trials if not finished(trial)]
    if missing:
        # reports bad data before the trials start
        check_trials(data, lambda number: sweep.config(missing[0].arm, missing[0].seed, number), console)
    if missing and sweep.pretraining_scenes and not (out / TAG_ENCODER).exists():
        console.print(f"Pretraining the arms' image encoder on the tags of {sweep.pretraining_scenes:,} other scenes …")
        tag_pretraining.train(sweep.pretraining_scenes, sweep.image_size or 64, out / TAG_ENCODER)
    failures = run_trials(missing, jobs)
    done = [Trial(sweep, arm, seed, data, out) for arm in sweep.arms for seed in range(seeds)]
    done = [trial for trial in done if finished(trial)]
    comparison = _compare(name, sweep, done, console) if len(done) > 1 else None
    if failures:
        raise UserError(
            f"{len(failures)} of {len(trials)} trials failed: {'; '.join(failures)}. Their logs are in {out}."
        )
    return comparison


def _compare(name: str, sweep: Table, trials: Sequence[Trial], console: Console) -> Comparison:
    out = trials[0].out
    comparison = compare([trial.folder for trial in trials], out / "table.html", [trial.arm for trial in trials])
    if missing := [metric for metric in sweep.headline_metrics if metric not in comparison.groups[0].metrics]:
        raise UserError(
            f"The table {name} decides by {missing[0]}, for which too few pairs are held out; use more data."
        )
    trained = {trial.arm for trial in trials}
    steps = [(lower, higher) for lower, higher in sweep.claims if {lower, higher} <= trained]
    differences = {step: _differences(step, trials) for step in steps}
    tasks = [task for task in sweep.retrieval_tasks if f"{task}.{R10}" in sweep.headline_metrics]
    sides = {task: [(task, R10), (task, "text_to_image.r10")] for task in tasks}
    by_fraction = {task: found for task in tasks if (found := fraction_scores(trials, sides[task]))}
    efficiency = {task: factors for task, found in by_fraction.items() if (factors := efficiencies(found))}
    values: dict[str, Any] = {
        "table": name,
        "title": sweep.title,
        "version": __version__,
        "arms": {label: asdict(arm) for label, arm in sweep.arms.items()},
        "paper": sweep.paper_metric,
        "rank_correlation": {figure: rank_correlation(sweep, comparison, figure) for figure in sweep.headline_metrics},
        "efficiency": {
            task: {name: asdict(one) for name, one in of_task.items()} for task, of_task in efficiency.items()
        },
        "by_fraction": by_fraction,
        "claims": [
            _claim(name, pair, figures[name])
            for name in sweep.headline_metrics
            for pair, figures in differences.items()
        ],
        **comparison.to_json(),
    }
    write_json(out / "table.json", values, indent=1, default=str)
    if sweep.paper_metric:
        print_against_paper(comparison, values, console)
    for task, factors in efficiency.items():
        split = sweep.retrieval_tasks[task]
        console.print(
            f"By R@10 on the {split} pairs, mean of both directions:",
            *efficiency_words(factors),
            sep="\n",
            markup=False,
        )
    return comparison


def rank_correlation(sweep: Table, comparison: Comparison, metric: str) -> float | None:
    """Spearman's rank correlation of our means with the paper's values, over the arms that have both; None with fewer than three."""
    pairs = [
        (group.metrics[metric].value, paper)
        for group in comparison.groups
        if (paper := sweep.arms[group.name].paper) is not None
    ]
    ours, papers = zip(*pairs) if pairs else ((), ())
    if len(set(ours)) < 3 or len(set(papers)) < 3:
        return None
    return float(spearmanr(ours, papers).statistic)


def print_against_paper(comparison: Comparison, values: Mapping[str, Any], console: Console) -> None:
    """Prints the paper's values beside ours, their rank correlation, and a verdict on each claim."""
    table = RichTable(box=None, padding=(0, 2, 0, 0))
    for column in ("", "paper", *(comparison.groups[0].metrics[name].title for name in values["rank_correlation"])):
        table.add_column(column, justify="right" if column else "left")
    for group in comparison.groups:
        paper = values["arms"][group.name]["paper"]
        found = [group.metrics[name] for name in values["rank_correlation"]]
        ours = [value_text(metric.kind, metric.value) for metric in found]
        table.add_row(escape(group.name), "" if paper is None else f"{paper:g}", *ours)
    known = [
        "-" if found is None else f"{found:.2f}".replace("-", "−") for found in values["rank_correlation"].values()
    ]
    table.add_row("rank correlation with the paper", "", *known)
    console.print(f"Paper: {values['paper']}", markup=False)
    console.print(table)
    for claim in values["claims"]:
        console.print(
            f"{claim['claim']}, by {comparison.groups[0].metrics[claim['metric']].title}: {claim['verdict']}",
            markup=False,
        )


def _differences(arms: tuple[str, str], trials: Sequence[Trial]) -> Mapping[str, ComparedMetric]:
    """All metrics of the second arm, with their differences from the first."""
    chosen = [trial for arm in arms for trial in trials if trial.arm == arm]
    return compare([t.folder for t in chosen], groups=[t.arm for t in chosen]).groups[1].metrics


def _claim(name: str, arms: tuple[str, str], metric: ComparedMetric) -> dict[str, Any]:
    """The claim that the second arm is better: decided only if the intervals over items and over seeds agree."""
    intervals = [metric.difference_over_items, metric.difference_over_seeds]
    known = [interval for interval in intervals if interval is not None]
    verdict = "undecided"
    if len(known) == len(intervals):
        verdict = "holds" if all(low > 0 for low, _ in known) else verdict
        verdict = "does not hold" if all(high < 0 for _, high in known) else verdict
    return {
        "claim": f"{arms[1]} is better than {arms[0]}",
        "metric": name,
        "difference": metric.difference,
        "over_items": metric.difference_over_items,
        "over_seeds": metric.difference_over_seeds,
        "verdict": verdict,
    }
