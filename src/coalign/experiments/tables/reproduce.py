"""reproduce(): trains a table of experiments trial by trial, and compares its arms."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from scipy.stats import spearmanr

from coalign.config import DETECT, NOMINAL_PAIRS, DataConfig
from coalign.data.sources.open import open_source
from coalign.data.splits import has_column
from coalign.devices import best_device, device_line
from coalign.errors import UserError
from coalign.experiments.compare.compare import compare
from coalign.experiments.tables.claims import decide, title
from coalign.experiments.tables.data_efficiency import efficiencies, efficiency_words, fraction_draws, fraction_scores
from coalign.experiments.tables.launch_script import write_launch
from coalign.experiments.tables.registry import table
from coalign.experiments.tables.search import RESULT as SEARCH_RESULT
from coalign.experiments.tables.search import missing_trials, run_search, searches
from coalign.experiments.tables.trials import CLASSES, FEATURES, LAUNCH, Trial, finished, run_trials
from coalign.files import write_json
from coalign.methods.table import Table, parts
from coalign.metric import value_text
from coalign.report.compare_page import Comparison, Group
from coalign.runs.folder import data_name, read_results
from coalign.version import __version__
from coalign.workflows.train.preflight import check_trials
from coalign.workflows.train.start import check_track

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
    track: Sequence[str] = (),
    reading: DataConfig = DETECT,
    skip_data_checks: bool = False,
) -> Comparison | None:
    """Trains every arm of a table with seeds 0 to seeds - 1 in the folder `out`, then compares them: out/table.json, out/table.html.

    If the table has a search, it chooses settings and length of each arm first, on the held-out pairs: out/search.json. Finished trials are
    kept, interrupted ones are resumed. `jobs` trials run at once, each on its share of the cores. `arms`: train only these (default: all),
    and the arms whose weights or settings they take. The comparison covers all finished trials; it is None with fewer than two. `track`:
    tasks of `coalign eval` on which the trials are also evaluated, but not those of a search. `reading` names the columns of a table. A
    failed trial does not stop the others; it is named in a UserError at the end. Raises UserError if a check of the data finds a problem,
    unless `skip_data_checks`.

    With scale "paper" nothing is trained: out/launch.sh receives the commands that train the arms with the paper's recipes.
    """
    sweep, out = replace(table(name), reading=reading, skip_data_checks=skip_data_checks), Path(out)
    tracked = _check(name, sweep, arms, seeds, jobs, track, scale)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if sweep.classes and scale == "cpu":
            (out / CLASSES).write_text("\n".join(sweep.classes) + "\n")
    except OSError as error:
        raise UserError(f"The table cannot be written to {out}: {error.strerror}; choose another --out.") from error
    console = Console(highlight=False, soft_wrap=True)
    chosen = list(arms or sweep.arms)
    if scale == "paper":
        left_out = write_launch(out / LAUNCH, name, sweep, chosen, data, seeds)
        console.print(f"Commands written to {out / LAUNCH}. Nothing was trained.")
        if left_out:
            console.print(f"Omitted, as they have no recipe at that scale: {', '.join(left_out)}")
        return None
    bases = [base for arm in chosen if (base := sweep.arms[arm].weights_of) and base not in chosen]
    chosen = list(dict.fromkeys([*bases, *chosen]))
    missing = _unfinished(sweep, chosen, seeds, data, out, tuple(track))
    if missing:  # reports bad data before the trials start
        _check_data(name, sweep, data)
        check_trials(data, lambda number: sweep.config(missing[0].arm, missing[0].seed, number), console)
    failures = run_table(sweep, chosen, seeds, jobs, data, out, tuple(track))
    done = [trial for trial in table_trials(sweep, list(sweep.arms), seeds, data, out) if finished(trial)]
    _print_untracked(done, tracked, console)
    command = _command(name, data, seeds, jobs, arms, track)
    comparison = _compare(name, sweep, done, command, console) if len(done) > 1 else None
    if failures:
        of = "" if sweep.search else f" of {len(chosen) * seeds}"
        raise UserError(f"{len(failures)}{of} trials failed: {'; '.join(failures)}. Their logs are in {out}.")
    return comparison


def _check(
    name: str, sweep: Table, arms: Sequence[str], seeds: int, jobs: int, track: Sequence[str], scale: str
) -> list[str]:
    """Raises UserError if an option is invalid. Returns the names of the tracked tasks in results."""
    if unknown := [arm for arm in arms if arm not in sweep.arms]:
        raise UserError(f"The table {name} has no arm {unknown[0]!r}; its arms are {', '.join(map(repr, sweep.arms))}.")
    if seeds < 1 or jobs < 1:
        raise UserError(f"--seeds is {seeds} and --jobs {jobs}, but both must be at least 1.")
    if track and scale == "paper":
        raise UserError("--track evaluates trials, but --scale paper trains none; omit it.")
    return check_track(replace(sweep.config(next(iter(sweep.arms)), 0, NOMINAL_PAIRS), track=tuple(track)))


def _check_data(name: str, sweep: Table, data: str) -> None:
    """Raises UserError if the data cannot be split as the table needs."""
    source = open_source(data, reading=sweep.reading)
    splits, by, problem = source.splits or {}, sweep.val_by, ""
    without = [split for split in sweep.test_splits if split not in splits and not sweep.test_fraction]
    if by is not None and not has_column(source, by):
        problem = f"holds out values of the column {by!r}, which {source.name} does not have"
    elif without:
        problem = f"evaluates on the split {without[0]!r}, which {source.name} does not have"
    elif by is not None and "val" in splits:
        problem = f"holds out values of the column {by!r}, but {source.name} has its own validation split"
    if problem:
        raise UserError(f"The table {name} {problem}; use {sweep.data or 'other data'}.")


def table_trials(
    sweep: Table, arms: Sequence[str], seeds: int, data: str, out: Path, track: tuple[str, ...] = ()
) -> list[Trial]:
    """The trials of the arms; of a table with a search, those whose settings are chosen."""
    trained = {arm: sweep.arms[arm].weights_of or arm for arm in arms}
    choices = {arm: sweep.arms[of].choice for arm, of in trained.items()}
    if sweep.search is not None:
        found = searches(sweep, data, out)
        choices = {arm: found[of].choice for arm, of in trained.items() if of in found}
    return [
        Trial(sweep, arm, seed, data, out, choice, track) for seed in range(seeds) for arm, choice in choices.items()
    ]


def run_table(
    sweep: Table, arms: Sequence[str], seeds: int, jobs: int, data: str, out: Path, track: tuple[str, ...] = ()
) -> list[str]:
    """Runs the search, if there is one, and the trials that are not finished. Returns the failed ones."""
    if _unfinished(sweep, arms, seeds, data, out, track):
        print(device_line(best_device(None)), flush=True)
    failures = run_search(sweep, arms, data, out, jobs) if sweep.search else []
    trials = table_trials(sweep, arms, seeds, data, out, track)
    failures += run_trials([trial for trial in trials if not finished(trial)], jobs)
    _remove_features(sweep, seeds, data, out)
    return failures


def _unfinished(
    sweep: Table, arms: Sequence[str], seeds: int, data: str, out: Path, track: tuple[str, ...]
) -> list[Trial]:
    """The trials to run, as far as they are known: those of a table with a search follow from it."""
    unfinished = [trial for trial in table_trials(sweep, arms, seeds, data, out, track) if not finished(trial)]
    return unfinished + (missing_trials(sweep, arms, data, out) if sweep.search else [])


def _remove_features(sweep: Table, seeds: int, data: str, out: Path) -> None:
    """Removes the features that trials share, if no trial needs them anymore. Other processes may run other arms of the table."""
    arms = [arm for arm, row in sweep.arms.items() if row.start]
    trials = table_trials(sweep, arms, seeds, data, out)
    if len(trials) == len(arms) * seeds and all(map(finished, trials)):
        shutil.rmtree(out / FEATURES, ignore_errors=True)


def _print_untracked(trials: Sequence[Trial], tracked: Sequence[str], console: Console) -> None:
    """Names the finished trials that were not evaluated on the tasks of --track."""
    lacking = [trial for trial in trials if set(tracked) - read_results(trial.folder).get("tracked", {}).keys()]
    if lacking:
        console.print(
            f"Trained without all tasks of --track, so the table has no values of these: "
            f"{', '.join(trial.folder.name for trial in lacking)}; delete their folders to train them again.",
            markup=False,
        )


def _command(name: str, data: str, seeds: int, jobs: int, arms: Sequence[str], track: Sequence[str]) -> str:
    """The command of this call, with the names of data without their folders, and without options that do not change results."""
    words = ["coalign", "reproduce", name, "--data", data_name(data), "--seeds", str(seeds), "--jobs", str(jobs)]
    words += ["--arms", *arms] if arms else []
    tasks = (task.partition(":") for task in track)
    words += ["--track", *(f"{task}{colon}{data_name(of)}" for task, colon, of in tasks)] if track else []
    return shlex.join(words)


def _compare(name: str, sweep: Table, trials: Sequence[Trial], command: str, console: Console) -> Comparison:
    out = trials[0].out
    comparison = compare([trial.folder for trial in trials], out / "table.html", [trial.arm for trial in trials])
    headlines = {metric: parts(metric) for metric in sweep.headline_metrics}
    known = comparison.groups[0].metrics
    if missing := [part for each in headlines.values() for part in each if part not in known]:
        raise UserError(
            f"The table {name} decides by {missing[0]}, for which too few pairs are held out; use more data."
        )
    tasks = [task for task in sweep.retrieval_tasks if {f"{task}.{R10}", f"{task}.r10"} & headlines.keys()]
    sides = {task: [(task, R10), (task, "text_to_image.r10")] for task in tasks}
    by_fraction = {task: found for task in tasks if (found := fraction_scores(trials, sides[task]))}
    efficiency = {
        task: factors
        for task, found in by_fraction.items()
        if (factors := efficiencies(found, fraction_draws(trials, sides[task])))
    }
    values: dict[str, Any] = {
        "table": name,
        "title": sweep.title,
        "version": __version__,
        "commands": _commands(out / "table.json", command),
        "arms": {label: asdict(arm) for label, arm in sweep.arms.items()},
        "paper": sweep.paper_metric,
        "rank_correlation": {metric: rank_correlation(sweep, comparison, metric) for metric in headlines},
        "efficiency": {
            task: {name: asdict(one) for name, one in of_task.items()} for task, of_task in efficiency.items()
        },
        "by_fraction": by_fraction,
        "claims": decide(sweep, trials),
        **({"search": json.loads((out / SEARCH_RESULT).read_text())} if sweep.search else {}),
        **comparison.to_json(),
    }
    write_json(out / "table.json", values, indent=1, default=str)
    if sweep.paper_metric:
        print_against_paper(comparison, values, console)
    for claim in values["claims"]:
        console.print(f"{claim['claim']}, by {claim['title']}: {claim['verdict']}", markup=False)
    for task, factors in efficiency.items():
        split = sweep.retrieval_tasks[task]
        console.print(
            f"By R@10 on the {split} pairs, mean of both directions:",
            *efficiency_words(factors),
            sep="\n",
            markup=False,
        )
    return comparison


def _commands(path: Path, command: str) -> list[str]:
    """The commands that made the table: those of its earlier version, and the last one."""
    try:
        earlier = json.loads(path.read_text())["commands"]
    except (OSError, ValueError, KeyError):
        earlier = []
    return [*(each for each in earlier if each != command), command]


def rank_correlation(sweep: Table, comparison: Comparison, metric: str) -> float | None:
    """Spearman's rank correlation of our means with the paper's values, over the arms that have both; None with fewer than three."""
    pairs = [
        (_value(group, metric), paper)
        for group in comparison.groups
        if (paper := sweep.arms[group.name].paper) is not None
    ]
    ours, papers = zip(*pairs) if pairs else ((), ())
    if len(set(ours)) < 3 or len(set(papers)) < 3:
        return None
    return float(spearmanr(ours, papers).statistic)


def _value(group: Group, metric: str) -> float:
    return float(np.mean([group.metrics[part].value for part in parts(metric)]))


def print_against_paper(comparison: Comparison, values: Mapping[str, Any], console: Console) -> None:
    """Prints the paper's values beside ours, and their rank correlation."""
    table = RichTable(box=None, padding=(0, 2, 0, 0))
    first = comparison.groups[0].metrics
    titles = {name: title([first[part].title for part in parts(name)]) for name in values["rank_correlation"]}
    for column in ("", "paper", *titles.values()):
        table.add_column(column, justify="right" if column else "left")
    for group in comparison.groups:
        paper = values["arms"][group.name]["paper"]
        ours = [value_text(first[parts(name)[0]].kind, _value(group, name)) for name in titles]
        table.add_row(escape(group.name), "" if paper is None else f"{paper:g}", *ours)
    known = [
        "-" if found is None else f"{found:.2f}".replace("-", "−") for found in values["rank_correlation"].values()
    ]
    table.add_row("rank correlation with the paper", "", *known)
    console.print(f"Paper: {values['paper']}", markup=False)
    console.print(table)
