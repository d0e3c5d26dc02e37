"""The claims of a table that one arm is better than another, decided over seeds and items."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from coalign.evaluation.metrics import Hierarchical, hierarchical
from coalign.experiments.compare.compare import read_finished
from coalign.experiments.tables.trials import Trial
from coalign.methods.table import Table, parts
from coalign.metric import Metric, Outcome

LEVEL = 0.05  # of the p-values, which are not corrected for the number of claims


def decide(sweep: Table, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """Returns each claim of the table with each headline metric: the difference, its interval and p-value over seeds and items, a verdict.

    Claims on arms without finished trials are left out. With a single run of an arm, there is no interval, and nothing is decided.
    """
    claimed = {arm for claim in sweep.claims for arm in claim}
    runs: dict[str, list[Mapping[str, Metric]]] = {}
    for trial in trials:
        if trial.arm in claimed:
            runs.setdefault(trial.arm, []).append(read_finished(trial.folder, trial.folder.name).metrics)
    return [
        _claim(lower, higher, metric, runs)
        for metric in sweep.headline_metrics
        for lower, higher in sweep.claims
        if {lower, higher} <= runs.keys()
    ]


def _claim(lower: str, higher: str, metric: str, runs: Mapping[str, Sequence[Mapping[str, Metric]]]) -> dict[str, Any]:
    names = parts(metric)
    better, worse = ([[run[name] for name in names] for run in runs[arm]] for arm in (higher, lower))
    found = None
    if min(len(better), len(worse)) > 1:
        found = hierarchical(_outcomes(better), _outcomes(worse))
    difference = _mean(better) - _mean(worse)
    return {
        "claim": f"{higher} is better than {lower}",
        "metric": metric,
        "title": title([each.title for each in better[0]]),
        "difference": difference,
        "interval": found and (found.low, found.high),
        "p": found and found.p,
        "verdict": _verdict(difference, found),
    }


def _outcomes(runs: Sequence[Sequence[Metric]]) -> list[list[Outcome]]:
    return [[metric.outcome for metric in run if metric.outcome] for run in runs]


def _mean(runs: Sequence[Sequence[Metric]]) -> float:
    values = [metric.value for run in runs for metric in run]
    return sum(values) / len(values)


def _verdict(difference: float, found: Hierarchical | None) -> str:
    if found is None or found.p is None or found.p >= LEVEL:
        return "undecided"
    return "holds" if difference > 0 else "does not hold"


def title(titles: Sequence[str]) -> str:
    """Returns the title of a metric, or "Test: R@10, mean of both directions" of two."""
    if len(titles) == 1:
        return titles[0]
    return f"{re.sub('image → text ', '', titles[0], flags=re.IGNORECASE)}, mean of both directions"
