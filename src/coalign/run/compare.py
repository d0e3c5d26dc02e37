"""compare(): finished runs side by side, on the same held-out items."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import flatten, to_json
from coalign.errors import UserError
from coalign.evaluation import metrics
from coalign.evaluation.metrics import Metric
from coalign.report.compare_page import Comparison, Figure, Group, compare_page
from coalign.run.model import RESULTS, SavedConfig, check_output, read_config
from coalign.run.outcomes import Outcome, read_outcomes
from coalign.run.reporting import read_rows
from coalign.run.train import FREE_TO_CHANGE

# Runs that differ in nothing else are of one group. Patience decides where a run ends.
NO_DIFFERENCE = FREE_TO_CHANGE - {"patience"} | {"seed"}
HELD_OUT_COUNTS = ("images", "captions", "distinct_captions")


@dataclass
class Finished:
    """What a finished run left behind."""

    name: str
    saved: SavedConfig
    settings: dict[str, Any]  # by dotted name, without what makes no difference
    results: dict[str, Any]
    steps: int
    seconds: float
    parameters: int  # trained ones
    items: dict[str, np.ndarray]
    outcomes: dict[str, Outcome]
    validations: list[dict[str, float]]


def compare(
    runs: Sequence[str | Path], report: str | Path | None = None, groups: Sequence[str] | None = None
) -> Comparison:
    """The figures of finished runs with intervals, and their differences to the first run's on the same items.

    Runs that differ in their seed alone become one group, whose figures are means; or those that `groups`, a name for each run,
    calls the same. Figures that some runs lack (zero-shot without classes) are left out. With `report`, writes a page to this HTML
    file. UserError for folders that are no finished runs, for a run that comes twice, and for runs that held out different pairs.
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
    finished = [_read(folder, name) for folder, name in zip(folders, _names(folders))]
    for run in finished[1:]:
        _check_same_items(finished[0], run)
    grouped: dict[str, list[Finished]] = {}
    for run, key in zip(finished, groups or [json.dumps(run.settings, sort_keys=True) for run in finished]):
        grouped.setdefault(key, []).append(run)
    members = list(grouped.values())
    for group in members:
        _check_seeds(group)
    different = _different([group[0].settings for group in members])
    figures = [name for name in finished[0].outcomes if all(name in run.outcomes for run in finished)]
    names = list(grouped) if groups else _group_names(members)
    found = [
        _group(name, group, members[0] if number else None, different, figures)
        for number, (name, group) in enumerate(zip(names, members))
    ]
    shared = {name: value for name, value in finished[0].settings.items() if name not in different}
    counts = {name: finished[0].results["retrieval"][name] for name in HELD_OUT_COUNTS}
    comparison = Comparison(found, shared, counts)
    if report is not None:
        compare_page(comparison).write(Path(report))
    return comparison


# ---------------------------------------------------------------- reading


def _read(folder: Path, name: str) -> Finished:
    saved = read_config(folder)
    if not (folder / RESULTS).exists():
        raise UserError(f"The run {folder} is not finished; go on with it by `coalign train … --resume auto`.")
    items, outcomes = read_outcomes(folder)
    if not outcomes:
        raise UserError(f"The run {folder} held nothing out, so that there are no figures to compare.")
    try:
        results = json.loads((folder / RESULTS).read_text())
        parameters, ran = sum(results["parameters"].values()), results["run"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
        raise UserError(f"{folder / RESULTS} is not what a finished run writes: {reason}.") from error
    flat = flatten({"data": _shown_data(saved.data), "num_train": saved.num_train, **to_json(saved.config)})
    for key in ("classes", "pretrained"):
        if flat[key]:
            flat[key] = Path(flat[key]).name
    settings = {key: value for key, value in flat.items() if key not in NO_DIFFERENCE}
    validations = _validations(read_rows(folder / "metrics.jsonl"), saved.config.batch_size)
    return Finished(
        name, saved, settings, results, ran["step"], ran["seconds"], parameters, items, outcomes, validations
    )


def _shown_data(data: str) -> str:
    """Where a folder lies makes no difference, and is nobody else's business."""
    return Path(data).name if Path(data).is_absolute() else data


def _validations(rows: Sequence[dict[str, Any]], batch_size: int) -> list[dict[str, float]]:
    """The rows of validations, with the pairs seen and the seconds passed until then, and the mean of their recalls."""
    seconds = {row["step"]: row["seconds"] for row in rows if "seconds" in row}
    found = []
    for row in rows:
        values = {
            key: value for key, value in row.items() if key.startswith("val/") and isinstance(value, (int, float))
        }
        if not values:
            continue
        point = {"step": row["step"] + 1, "samples": (row["step"] + 1) * batch_size, **values}
        if row["step"] in seconds:
            point["seconds"] = seconds[row["step"]]
        recalls = [value for key, value in values.items() if key.rpartition("_r")[2].isdigit()]
        if recalls:
            point["mean_recall"] = sum(recalls) / len(recalls)
        found.append(point)
    return found


def _check_same_items(first: Finished, other: Finished) -> None:
    for task in first.items.keys() & other.items.keys():
        if not np.array_equal(first.items[task], other.items[task]):
            what = "were evaluated on different held-out pairs"
            if task == "zero_shot":
                what = "classified different images, or among different classes"
            elif task == "foils":
                what = "chose between different captions"
            raise UserError(
                f"{first.name} and {other.name} {what}, so that their figures cannot be compared; "
                "evaluate both on the same data with `coalign eval`."
            )


def _check_seeds(group: Sequence[Finished]) -> None:
    first: dict[int, str] = {}
    for run in group:
        seed = run.saved.config.seed
        if seed in first:
            raise UserError(
                f"{first[seed]} and {run.name} have the same settings and the same seed: they are one run twice; leave one away."
            )
        first[seed] = run.name


# ---------------------------------------------------------------- names and settings


def _names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names, or their paths where two would have the same."""
    counts = Counter(folder.resolve().name for folder in folders)
    return [str(folder) if counts[folder.resolve().name] > 1 else folder.resolve().name for folder in folders]


def _group_names(members: Sequence[Sequence[Finished]]) -> list[str]:
    """A single run has its own name, several seeds that of their method where no other group has it."""
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


# ---------------------------------------------------------------- figures


def _group(
    name: str, runs: Sequence[Finished], first: Sequence[Finished] | None, different: set[str], figures: Sequence[str]
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
        figures={key: _figure(key, runs, first) for key in figures},
        validations=[run.validations for run in runs],
    )


def _figure(name: str, runs: Sequence[Finished], first: Sequence[Finished] | None) -> Figure:
    outcomes = [run.outcomes[name] for run in runs]
    others = [] if first is None else [run.outcomes[name] for run in first]
    values, other_values = ([_value(outcome) for outcome in side] for side in (outcomes, others))
    kind = outcomes[0].kind
    figure = Figure(
        kind="rate" if kind == "class rate" else kind,
        value=float(np.mean(values)),
        over_items=_over_items(outcomes),
        over_seeds=metrics.over_runs(values),
        n=len(outcomes[0].values),
        chance=_chance(runs[0].results, name),
    )
    if not others:
        return figure
    return replace(
        figure,
        difference=float(np.mean(values) - np.mean(other_values)),
        difference_over_items=_over_items(outcomes, others),
        difference_over_seeds=metrics.over_runs(values, other_values),
    )


def _value(outcome: Outcome) -> float:
    """The figure of one run."""
    if outcome.kind == "rank":
        return float(np.median(outcome.values))
    if outcome.kind == "class rate":
        assert outcome.clusters is not None
        num_classes = int(outcome.clusters.max()) + 1
        return float(np.nanmean(metrics.per_class(outcome.values, outcome.clusters, num_classes)))
    return float(outcome.values.mean())


def _over_items(outcomes: Sequence[Outcome], minus: Sequence[Outcome] = ()) -> tuple[float, float] | None:
    """The bootstrap interval; None for what is of all items together."""
    if outcomes[0].kind == "distance":
        return None
    metric = _bootstrap(outcomes, minus)
    return metric.low, metric.high


def _bootstrap(outcomes: Sequence[Outcome], minus: Sequence[Outcome] = ()) -> Metric:
    """The figure as a mean over runs, less that of other runs: items are drawn, and every run is seen on the same draws."""
    kind, clusters = outcomes[0].kind, outcomes[0].clusters
    values, others = ([outcome.values for outcome in side] for side in (outcomes, minus))
    if kind == "rank":
        assert clusters is not None
        return metrics.mean_median(values, clusters, others)
    scores = np.mean(values, axis=0) - (np.mean(others, axis=0) if others else 0.0)
    if kind == "class rate":
        assert clusters is not None
        return metrics.mean_per_class(scores, clusters)
    return metrics.mean(scores, clusters)


def _chance(results: dict[str, Any], name: str) -> float | None:
    task, *path = name.split(".")
    if not task.startswith("retrieval"):
        return None if path == ["acc5"] else float(results[task]["chance"])
    if path == ["modality_gap"]:
        return None
    side, figure = path
    return float(results[task][side][figure]["chance"])
