"""The data-efficiency factor: how many times fewer pairs than CLIP a method needs, from trials on fractions of the pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coalign.evaluation.metrics import LEVEL, arm_draws
from coalign.runs.folder import read_results
from coalign.runs.outcomes import read_outcomes

if TYPE_CHECKING:
    from coalign.experiments.tables.trials import Trial
    from coalign.metric import Outcome

BASE = "clip"


@dataclass(frozen=True)
class Efficiency:
    """How many times fewer pairs a method needs to reach CLIP's score on all pairs; below 1, it needs more.

    Attributes:
        factor: The factor.
        interval: 95 % interval by `arm_draws`, over seeds and held-out items. None if a fraction has a single seed.
        bound: Whether the curves cross at or below the smallest fraction: the factor is this, or farther from 1.
    """

    factor: float
    interval: tuple[float, float] | None
    bound: bool


# method, or arm -> fraction of the pairs -> seed -> score, such as R@10, mean of both directions
Scores = dict[str, dict[float, dict[int, float]]]
Draws = Mapping[str, Mapping[float, np.ndarray]]  # method -> fraction -> mean score in each replicate of a bootstrap


def fraction_scores(trials: Sequence[Trial], metrics: Sequence[tuple[str, str]]) -> Scores:
    """The scores of every arm that was trained on several fractions: the mean of metrics, each given by its task and its name.

    Empty if a trial lacks one of them.
    """
    scores: Scores = {}
    for trial in trials:
        tasks = read_results(trial.folder)["tasks"]
        if any(name not in tasks.get(task, {"metrics": {}})["metrics"] for task, name in metrics):
            return {}
        value = np.mean([tasks[task]["metrics"][name]["value"] for task, name in metrics])
        fraction = trial.sweep.arms[trial.arm].train_fraction
        scores.setdefault(trial.sweep.whole(trial.arm), {}).setdefault(fraction, {})[trial.seed] = float(value)
    return {arm: by_fraction for arm, by_fraction in scores.items() if len(by_fraction) > 1}


def fraction_draws(trials: Sequence[Trial], metrics: Sequence[tuple[str, str]]) -> Draws:
    """Bootstrap draws of the same scores, over seeds and the held-out items, which all trials share.

    Empty if an arm has a single seed.
    """
    runs: dict[tuple[str, float], list[list[Outcome]]] = {}
    for trial in trials:
        outcomes = read_outcomes(trial.folder)[1]
        key = trial.sweep.whole(trial.arm), trial.sweep.arms[trial.arm].train_fraction
        runs.setdefault(key, []).append([outcomes[f"{task}.{name}"] for task, name in metrics])
    draws: dict[str, dict[float, np.ndarray]] = {}
    if all(len(of_arm) > 1 for of_arm in runs.values()):
        for (arm, fraction), values in zip(runs, arm_draws(list(runs.values()))[1]):
            draws.setdefault(arm, {})[fraction] = values
    return draws


def efficiencies(scores: Scores, draws: Draws | None = None) -> dict[str, Efficiency]:
    """The factor of each method that was trained on the same fractions as CLIP; with an interval if there are draws."""
    base = scores.get(BASE, {})
    return {
        method: _efficiency(by_fraction, base, *((draws[method], draws[BASE]) if draws else ()))
        for method, by_fraction in scores.items()
        if method != BASE and by_fraction.keys() == base.keys()
    }


def _efficiency(
    scores: Mapping[float, Mapping[int, float]],
    base: Mapping[float, Mapping[int, float]],
    *draws: Mapping[float, np.ndarray],
) -> Efficiency:
    fractions = sorted(scores)
    means = [[float(np.mean(list(one[fraction].values()))) for fraction in fractions] for one in (scores, base)]
    overall = factor(fractions, *means)
    interval = None
    if draws:
        ours, theirs = (np.stack([one[fraction] for fraction in fractions], 1).tolist() for one in draws)
        factors = [factor(fractions, *replicate) for replicate in zip(ours, theirs)]
        low, high = np.quantile(factors, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        interval = float(low), float(high)
    return Efficiency(overall, interval, bound=overall in (fractions[0], 1 / fractions[0]))


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
            if found.interval is None
            else f" (95 % interval over seeds and items {found.interval[0]:.2f} to {found.interval[1]:.2f})"
        )
        least = ("at least " if found.factor > 1 else "at most ") if found.bound else ""
        lines.append(
            f"{name}: {least}{found.factor:.2f} × as data-efficient as {BASE}, by the pairs needed for equal scores{interval}."
        )
    return lines
