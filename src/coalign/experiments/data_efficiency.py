"""The data-efficiency factor: how many times fewer pairs than CLIP a method needs, from trials on fractions of the pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coalign.evaluation.metrics import over_runs
from coalign.runs.folder import read_results

if TYPE_CHECKING:
    from coalign.experiments.trials import Trial

BASE = "clip"


@dataclass(frozen=True)
class Efficiency:
    """How many times fewer pairs a method needs to reach CLIP's score on all pairs; below 1, it needs more.

    Attributes:
        factor: The factor.
        over_seeds: 95 % t-interval, computed for the factor's logarithm. None if a seed is missing.
        bound: Whether the curves cross at or below the smallest fraction: the factor is this, or farther from 1.
    """

    factor: float
    over_seeds: tuple[float, float] | None
    bound: bool


# method -> fraction of the pairs -> seed -> score, such as R@10, mean of both directions
Scores = dict[str, dict[float, dict[int, float]]]


def fraction_scores(trials: Sequence[Trial], metrics: Sequence[tuple[str, str]]) -> Scores:
    """The scores of every method that was trained on several fractions: the mean of metrics, each given by its task and its name.

    Empty if a trial lacks one of them.
    """
    scores: Scores = {}
    for trial in trials:
        arm = trial.sweep.arms[trial.arm]
        tasks = read_results(trial.folder)["tasks"]
        if any(name not in tasks.get(task, {"metrics": {}})["metrics"] for task, name in metrics):
            return {}
        value = np.mean([tasks[task]["metrics"][name]["value"] for task, name in metrics])
        scores.setdefault(arm.recipe, {}).setdefault(arm.train_fraction, {})[trial.seed] = float(value)
    return {method: by_fraction for method, by_fraction in scores.items() if len(by_fraction) > 1}


def efficiencies(scores: Scores) -> dict[str, Efficiency]:
    """The factor of each method that was trained on the same fractions as CLIP."""
    base = scores.get(BASE, {})
    return {
        method: _efficiency(by_fraction, base)
        for method, by_fraction in scores.items()
        if method != BASE and by_fraction.keys() == base.keys()
    }


def _efficiency(scores: Mapping[float, Mapping[int, float]], base: Mapping[float, Mapping[int, float]]) -> Efficiency:
    fractions = sorted(scores)
    means = [[float(np.mean(list(one[fraction].values()))) for fraction in fractions] for one in (scores, base)]
    overall = factor(fractions, *means)
    every = {seed for one in (scores, base) for of_seed in one.values() for seed in of_seed}
    complete = [seed for seed in sorted(every) if all(seed in one[f] for one in (scores, base) for f in fractions)]
    logs = [
        math.log(factor(fractions, *([one[f][seed] for f in fractions] for one in (scores, base)))) for seed in complete
    ]
    interval = over_runs(logs) if len(complete) == len(every) else None
    return Efficiency(
        overall,
        None if interval is None else (math.exp(interval[0]), math.exp(interval[1])),
        bound=overall in (fractions[0], 1 / fractions[0]),
    )


def factor(fractions: Sequence[float], scores: Sequence[float], base: Sequence[float]) -> float:
    """How many times fewer pairs reach the base's score on all pairs: 1/f, with f interpolated linearly in log fraction.

    If the method never reaches it, the factor is the fraction at which the base reaches the method's score, below 1.
    """

    def crossing(curve: Sequence[float], target: float) -> float:
        upper = len(curve) - 1
        while upper and curve[upper - 1] >= target:
            upper -= 1
        if upper == 0:
            return fractions[0]
        share = (target - curve[upper - 1]) / (curve[upper] - curve[upper - 1])
        low, high = math.log(fractions[upper - 1]), math.log(fractions[upper])
        return math.exp(low + share * (high - low))

    return 1 / crossing(scores, base[-1]) if scores[-1] >= base[-1] else crossing(base, scores[-1])


def efficiency_words(efficiency: Mapping[str, Efficiency]) -> list[str]:
    lines = []
    for name, found in efficiency.items():
        interval = (
            ""
            if found.over_seeds is None
            else f" (95 % interval over seeds {found.over_seeds[0]:.2f} to {found.over_seeds[1]:.2f})"
        )
        least = ("at least " if found.factor > 1 else "at most ") if found.bound else ""
        lines.append(
            f"{name}: {least}{found.factor:.2f} × as data-efficient as {BASE}, by the pairs needed for equal scores{interval}."
        )
    return lines
