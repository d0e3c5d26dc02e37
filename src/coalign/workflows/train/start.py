"""The start of a run: its weights, to interpolate with, and its results on the tasks of --track, to compare the end with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from coalign.config import TrainConfig
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import UserError
from coalign.evaluation.metrics import estimate
from coalign.files import write_json
from coalign.method import Method
from coalign.metric import Metric, Outcome, metrics_from_json
from coalign.report.changes import Change
from coalign.runs.folder import START_OUTCOMES, START_RESULTS
from coalign.runs.outcomes import item_hashes, read_outcomes, write_outcomes
from coalign.runs.run import Run, initial_weights
from coalign.training import checkpoint
from coalign.training.distributed import World
from coalign.training.sharding import full_tensors, unsharded
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.evaluate.evaluate import OpenTasks, open_tasks, parse_tasks


def save_start(out: Path, method: Method, config: TrainConfig, world: World) -> None:
    """Saves the weights that a new run starts from, unless all are random, as the checkpoint "start"."""
    weights = full_tensors(initial_weights(method, config), world.is_first)
    if weights and world.is_first:
        checkpoint.save(out, "start", weights)
    world.barrier()


def check_track(config: TrainConfig) -> list[str]:
    """Returns the tasks of `config.track`, as TASK:DATA. Raises UserError if one does not exist or has no data."""
    return [f"{task.name}:{data}" for task, data in parse_tasks(config.track, EvalConfig(data_root=config.data_root))]


@dataclass
class Tracked:
    """Results of the tasks at one time, by TASK:DATA."""

    metrics: dict[str, list[Metric]] = field(default_factory=dict)
    items: dict[str, np.ndarray] = field(default_factory=dict)  # hashes of the samples
    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # as `evaluate` returns them


@dataclass
class TrackedChanges:
    """The changes between start and end, notes on tasks that cannot be compared, and the values for results.json by TASK:DATA."""

    changes: list[Change] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    values: dict[str, dict[str, Any]] = field(default_factory=dict)
    end: Tracked = field(default_factory=Tracked)

    def lines(self) -> list[str]:
        """Returns what to print: the change of each task's main metric, and the notes."""
        main = [each for each in self.changes if each.end.name == self.values[each.task]["end"]["main_metric"]]
        return [*(each.sentence() for each in main), *self.notes]


class Tracking:
    """Evaluates a run on the tasks of `config.track` at its start and at its end.

    Opens their data, and raises UserError if a task lacks something that it needs. All processes share the work.
    """

    def __init__(
        self, data: str, out: Path, config: TrainConfig, method: Method, tokenizer: Tokenizer, world: World
    ) -> None:
        self.out, self.config, self.world, self.method = out, config, world, method
        self._run = Run(out, data, config, tokenizer, method, "in training")
        self._opened = self._open()
        self.start = Tracked()

    def evaluate_start(self, first_step: int) -> list[str]:
        """Evaluates the start of a new run and stores the results, or reads those of a resumed run. Returns what to print."""
        if not self.config.track:
            return []
        if first_step:
            self.start = _read(self.out)
            if missing := [each for each in check_track(self.config) if each not in self.start.values]:
                raise UserError(
                    f"The run in {self.out} was not evaluated on {missing[0]} at its start, so --track cannot add it; omit it."
                )
            return []
        self.start = self._evaluate(self._opened)
        if self.world.is_first:
            _write(self.out, self.start)
        return [_start_line(task, values) for task, values in self.start.values.items()]

    def evaluate_end(self) -> TrackedChanges:
        """Evaluates the result and compares it with the start."""
        end = self._evaluate(self._open()) if self.config.track else Tracked()
        result = TrackedChanges(end=end)
        for task, metrics in end.metrics.items():
            same_data = np.array_equal(end.items[task], self.start.items[task])
            if not same_data:
                result.notes.append(
                    f"{task}: its data changed during the run, so start and end are not on the same items."
                )
            starts = {metric.name: metric for metric in self.start.metrics[task]}
            found = [_change(task, starts[each.name], each, same_data) for each in metrics if each.name in starts]
            result.changes += found
            result.values[task] = {
                "start": self.start.values[task],
                "end": end.values[task],
                "changes": {each.end.name: each.to_json() for each in found},
            }
        return result

    def _eval_config(self) -> EvalConfig:
        return EvalConfig(data_root=self.config.data_root, workers=self.config.workers or 0)

    def _open(self) -> OpenTasks:
        config = self._eval_config()
        model = EvalModel(self._run.encoder(), self._run)
        return open_tasks(model, parse_tasks(self.config.track, config), config, self.world)

    def _evaluate(self, opened: OpenTasks) -> Tracked:
        tracked = Tracked()
        with unsharded(self.method):
            for each in opened.run():
                tracked.metrics[each.name] = list(each.result.metrics)
                tracked.items[each.name] = item_hashes(each.samples.source, each.samples.indices.tolist(), ())
                tracked.values[each.name] = each.to_json()
        return tracked


def _change(task: str, start: Metric, end: Metric, same_data: bool) -> Change:
    one, other = start.outcome, end.outcome
    if not same_data or one is None or other is None or not _same_items(one, other):
        return Change(task, start, end)
    found = estimate([other], [one])
    return Change(task, start, end, found.low, found.high)


def _same_items(one: Outcome, other: Outcome) -> bool:
    """Whether the values of two outcomes belong to the same items, as an image may be unreadable at one time only."""
    if one.groups is None or other.groups is None:
        return one.groups is other.groups and len(one.values) == len(other.values)
    return np.array_equal(one.groups, other.groups)


def _start_line(task: str, values: Mapping[str, Any]) -> str:
    metric = next((each for each in metrics_from_json(values["metrics"]) if each.name == values["main_metric"]), None)
    if metric is None:
        return f"Start, {task}: no metric"
    return f"Start, {task}: {metric.title[:1].lower()}{metric.title[1:]} {metric.text()} (95 % interval {metric.interval_text()})"


def _write(out: Path, tracked: Tracked) -> None:
    """Tasks are numbered in the file of outcomes, as their names may contain any character."""
    numbers = {task: str(number) for number, task in enumerate(tracked.values)}
    write_outcomes(
        out,
        {numbers[task]: metrics for task, metrics in tracked.metrics.items()},
        {numbers[task]: items for task, items in tracked.items.items()},
        START_OUTCOMES,
    )
    write_json(out / START_RESULTS, tracked.values, default=str)


def _read(out: Path) -> Tracked:
    try:
        values = json.loads((out / START_RESULTS).read_text())
        items, outcomes = read_outcomes(out, START_OUTCOMES)
        tracked = Tracked(values=values)
        for number, (task, result) in enumerate(values.items()):
            tracked.items[task] = items[str(number)]
            tracked.metrics[task] = [
                replace(metric, outcome=outcomes.get(f"{number}.{metric.name}"))
                for metric in metrics_from_json(result["metrics"])
            ]
    except (OSError, ValueError, KeyError, TypeError, UserError) as error:
        raise UserError(
            f"The results at the start of the run in {out} ({START_RESULTS}, {START_OUTCOMES}) are missing or damaged; omit --track."
        ) from error
    return tracked
