"""compare(): finished runs on the same held-out items, with intervals and paired differences."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import TrainConfig, fields_marked, flatten, to_json
from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.experiments.compare.terminal import print_comparison
from coalign.files import read_rows
from coalign.metric import Metric, Outcome, metrics_from_json
from coalign.progress import progress
from coalign.report.compare_page import ComparedMetric, Comparison, Group, compare_page
from coalign.runs.folder import (
    TRACKED,
    WITHOUT_LOOK_ALIKES,
    SavedConfig,
    check_output,
    public,
    read_config,
    read_results,
)
from coalign.runs.outcomes import read_outcomes
from coalign.workflows.evaluate.eval_report import write_results

HELD_OUT_COUNTS = ("images", "captions", "distinct_captions")


@dataclass
class Finished:
    """A finished run, as read from its folder."""

    name: str
    saved: SavedConfig
    settings: dict[str, Any]  # by dotted name: data, number of training pairs, and the settings that are compared
    results: dict[str, Any]
    steps: int
    seconds: float
    cpu_seconds: float
    parameters: int  # trainable
    items: dict[str, np.ndarray]  # by task: hashes of its items
    metrics: dict[str, Metric]  # by full name, such as "retrieval.image_to_text.r1", with their outcomes
    validations: list[dict[str, float]]


def compare(
    runs: Sequence[str | Path], report: str | Path | None = None, groups: Sequence[str] | None = None
) -> Comparison:
    """Compares finished runs by their metrics, with intervals and paired differences from the first run on the same held-out items.

    Runs that differ only in their seed form one group, whose metrics are means over seeds. Metrics that some runs lack (such as zero-shot
    without classes) are omitted.

    Args:
        runs: Two or more folders of finished runs.
        report: Write a page to this HTML file. None: no page.
        groups: The name of each run's group. None: group by settings.

    Returns:
        The groups with their metrics, and the settings that they share.

    Raises:
        UserError: A folder has no finished run, a run is given twice, or the runs have different held-out pairs, or were evaluated by
            versions of coalign that resize images otherwise.

    Example:
        ```python
        comparison = coalign.compare(["runs/clip", "runs/mcd"], report="compare.html")
        metric = comparison.groups[1].metrics["retrieval.image_to_text.r1"]
        print(metric.difference, metric.difference_over_items)
        ```
    """
    if report is not None:
        check_output(Path(report))
    folders = [Path(run) for run in runs]
    if len(folders) < 2:
        raise UserError("There is nothing to compare; give two runs or more, such as runs/clip runs/slip.")
    twice = [folder for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise UserError(
            f"The run {next(f for f in folders if f.resolve() in twice)} is given twice; name each run once."
        )
    finished = [read_finished(folder, name) for folder, name in zip(folders, _names(folders))]
    own = _tasks_of_training(finished)
    for run in finished[1:]:
        _check_same_items(finished[0], run, own)
        _check_same_view(finished[0], run)
    grouped: dict[str, list[Finished]] = {}
    for run, key in zip(finished, groups or [json.dumps(run.settings, sort_keys=True) for run in finished]):
        grouped.setdefault(key, []).append(run)
    members = list(grouped.values())
    for group in members:
        _check_seeds(group)
    different = _different([group[0].settings for group in members])
    metric_names = [
        name
        for name in finished[0].metrics
        if all(name in run.metrics for run in finished) and name.partition(".")[0] not in own
    ]
    names = list(grouped) if groups else _group_names(members)
    compared = []
    with progress("Bootstrap of the comparison", len(members), "groups") as task:
        for number, (name, group) in enumerate(zip(names, members)):
            compared.append(_group(name, group, members[0] if number else None, different, metric_names))
            task.update(number + 1)
    shared = {name: value for name, value in finished[0].settings.items() if name not in different}
    counts = {name: finished[0].results["tasks"]["retrieval"][name] for name in HELD_OUT_COUNTS}
    comparison = Comparison(compared, shared, counts)
    if report is not None:
        compare_page(comparison).write(Path(report))
    return comparison


# ---------------------------------------------------------------- reading


def read_finished(folder: Path, name: str) -> Finished:
    """Reads a finished run. Raises UserError if there is none, or if it held out no pairs."""
    saved = read_config(folder)
    results = read_results(folder)
    items, outcomes = read_outcomes(folder)
    if not outcomes:
        raise UserError(f"The run {folder} held out no pairs, so it has no metrics to compare.")
    parameters, ran = sum(results["parameters"].values()), results["run"]
    tasks, items, outcomes = _with_tracked(results, items, outcomes)
    metrics = _metrics(tasks, outcomes)
    flat = flatten({"data": public(saved.data), "num_train": saved.num_train, **to_json(saved.config)})
    for key in ("classes", "pretrained", "image_tower", "text_tower"):
        if flat[key]:
            flat[key] = Path(flat[key]).name
    if flat["tokenizer"]:
        flat["tokenizer"] = public(flat["tokenizer"])
    compared = {"data", "num_train", *fields_marked(TrainConfig, "compared")}
    settings = {key: value for key, value in flat.items() if key.partition(".")[0] in compared}
    if saved.extended_from:
        settings["extended_from"] = ", ".join(f"{each:g}" for each in saved.extended_from)
    if saved.interpolated:
        settings["weights"] = saved.interpolated
    validations = _validations(read_rows(folder / "metrics.jsonl"), saved.config.batch_size)
    return Finished(
        name,
        saved,
        settings,
        results,
        ran["step"],
        ran["seconds"],
        ran["cpu_seconds"],
        parameters,
        items,
        metrics,
        validations,
    )


def _with_tracked(
    results: Mapping[str, Any], items: dict[str, np.ndarray], outcomes: Mapping[str, Outcome]
) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[str, Outcome]]:
    """Adds the tasks of --track, at the end of the run, to the tasks, their items and outcomes, by names without folders."""
    names = {}
    tasks = dict(results["tasks"])
    for number, (task, values) in enumerate(results.get("tracked", {}).items()):
        kind, _, data = task.partition(":")
        name = names[f"{TRACKED}{number}"] = f"{kind}:{public(data)}"
        metrics = (metric.prefixed(name) for metric in metrics_from_json(values["end"]["metrics"]))
        tasks[name] = {"metrics": {metric.name: metric.to_json() for metric in metrics}}
    items = {names.get(task, task): hashes for task, hashes in items.items()}
    renamed = {}
    for key, outcome in outcomes.items():
        task, dot, metric = key.partition(".")
        renamed[names.get(task, task) + dot + metric] = outcome
    return tasks, items, renamed


def _metrics(tasks: Mapping[str, Any], outcomes: Mapping[str, Outcome]) -> dict[str, Metric]:
    """Returns the metrics that have an outcome and can differ from chance, by their full names."""
    found = {
        f"{task}.{metric.name}": metric
        for task, result in tasks.items()
        for metric in metrics_from_json(result["metrics"])
    }
    return {
        name: replace(metric, outcome=outcomes[name])
        for name, metric in found.items()
        if name in outcomes and metric.can_beat_chance()
    }


def _validations(rows: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, float]]:
    """The validations of a run, with samples seen and elapsed seconds."""
    seconds = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
    validations = []
    for row in rows:
        values = {
            key: value for key, value in row.items() if key.startswith("val/") and isinstance(value, (int, float))
        }
        if not values:
            continue
        point = {"step": row["step"] + 1, "samples": (row["step"] + 1) * batch_size, **values}
        if row["step"] in seconds:
            point["seconds"] = seconds[row["step"]]
        validations.append(point)
    return validations


def _tasks_of_training(runs: Sequence[Finished]) -> set[str]:
    """Returns the tasks whose items depend on the training pairs, and so differ between the runs: those without look-alikes."""
    tasks = {task for run in runs for task in run.items if task.endswith(WITHOUT_LOOK_ALIKES)}

    def is_shared(task: str) -> bool:
        items = [run.items.get(task) for run in runs]
        return all(each is not None and np.array_equal(each, items[0]) for each in items)  # type: ignore[arg-type]

    return {task for task in tasks if not is_shared(task)}


def _check_same_items(first: Finished, other: Finished, apart_from: set[str]) -> None:
    for task in (first.items.keys() & other.items.keys()) - apart_from:
        if not np.array_equal(first.items[task], other.items[task]):
            raise UserError(
                f"{first.name} and {other.name} were evaluated on different held-out samples, classes or foils ({task}), so their metrics "
                "cannot be compared; evaluate both on the same data with `coalign eval`."
            )


def _check_same_view(first: Finished, other: Finished) -> None:
    views = [run.results.get("evaluation_view", 0) for run in (first, other)]
    if views[0] != views[1]:
        raise UserError(
            f"{first.name} and {other.name} were evaluated by versions of coalign that resize images otherwise; evaluate "
            f"{(first if views[0] < views[1] else other).name} again with `coalign train … --resume auto`."
        )


def _check_seeds(group: Sequence[Finished]) -> None:
    first: dict[int, str] = {}
    for run in group:
        seed = run.saved.config.seed
        if seed in first:
            raise UserError(
                f"{first[seed]} and {run.name} have the same settings and the same seed: they are the same run twice; omit one."
            )
        first[seed] = run.name


# ---------------------------------------------------------------- names and settings


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' names, or their paths if two names are equal."""
    counts = Counter(folder.resolve().name for folder in folders)
    return [str(folder) if counts[folder.resolve().name] > 1 else folder.resolve().name for folder in folders]


def _group_names(members: Sequence[Sequence[Finished]]) -> list[str]:
    """A single run keeps its name. Several seeds take the method's name, if no other group has the same method."""
    methods = Counter(group[0].saved.config.method for group in members)
    names = []
    for group in members:
        method = group[0].saved.config.method
        more = f"{group[0].name} + {len(group) - 1}"
        names.append(group[0].name if len(group) == 1 else method if methods[method] == 1 else more)
    counts = Counter(names)
    return [group[0].name if counts[name] > 1 else name for name, group in zip(names, members)]


def _different(settings: Sequence[dict[str, Any]]) -> set[str]:
    names = {name for each in settings for name in each}
    missing = object()
    return {
        name for name in names if any(each.get(name, missing) != settings[0].get(name, missing) for each in settings)
    }


# ---------------------------------------------------------------- metrics


def _group(
    name: str,
    runs: Sequence[Finished],
    first: Sequence[Finished] | None,
    different: set[str],
    metric_names: Sequence[str],
) -> Group:
    steps = float(np.mean([run.steps for run in runs]))
    return Group(
        name=name,
        runs=[run.name for run in runs],
        seeds=[run.saved.config.seed for run in runs],
        method=runs[0].saved.config.method,
        settings={key: value for key, value in runs[0].settings.items() if key in different},
        parameters=runs[0].parameters,
        steps=steps,
        samples_seen=steps * runs[0].saved.config.batch_size,
        seconds=float(np.mean([run.seconds for run in runs])),
        cpu_seconds=float(np.mean([run.cpu_seconds for run in runs])),
        metrics={key: _metric(key, runs, first) for key in metric_names},
        validations=[run.validations for run in runs],
    )


def _metric(name: str, runs: Sequence[Finished], first: Sequence[Finished] | None) -> ComparedMetric:
    ours, theirs = ([run.metrics[name] for run in side] for side in (runs, first or ()))
    values, other_values = ([metric.value for metric in side] for side in (ours, theirs))
    metric = ComparedMetric(
        title=ours[0].title,
        kind=ours[0].kind,
        value=float(np.mean(values)),
        over_items=_over_items(ours),
        over_seeds=metrics.over_runs(values),
        count=ours[0].count,
        chance=ours[0].chance,
    )
    if not theirs:
        return metric
    return replace(
        metric,
        difference=float(np.mean(values) - np.mean(other_values)),
        difference_over_items=_over_items(ours, theirs),
        difference_over_seeds=metrics.over_runs(values, other_values),
    )


def _over_items(runs: Sequence[Metric], minus: Sequence[Metric] = ()) -> tuple[float, float] | None:
    """The bootstrap interval; None for a metric without items, such as a distance."""
    if runs[0].low is None:
        return None
    ours, theirs = ([metric.outcome for metric in side if metric.outcome] for side in (runs, minus))
    found = metrics.estimate(ours, theirs)
    return found.low, found.high


def compare_and_write(runs: Sequence[str], report: Path | None, json_path: Path | None) -> None:
    """`coalign compare`: prints the comparison, and writes the page and the JSON file."""
    if json_path:
        check_output(json_path)  # before the work
    comparison = compare(runs, report)
    print_comparison(comparison)
    if json_path:
        write_results(comparison.to_json(), json_path)
    if report:
        print(f"Report: {report}")
