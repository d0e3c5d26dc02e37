"""The data-efficiency factor: how many times fewer pairs a method needs than CLIP, from trials on fractions of the pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coalign.evaluation.metrics import over_runs

if TYPE_CHECKING:
    from coalign.run.reproduce import Trial

BASE = "clip"


@dataclass(frozen=True)
class Efficiency:
    """How many times fewer pairs a method needs for CLIP's score on all of them; below 1 it would need more."""

    factor: float
    over_seeds: tuple[float, float] | None  # 95 %, by the factor's logarithm
    bound: bool  # the curves meet at the least pairs that were tried, or below: the factor is this or farther from 1


def efficiencies(trials: Sequence[Trial], task: str = "retrieval") -> dict[str, Efficiency]:
    """Of each method that was trained on several fractions of the pairs, as CLIP was; by R@10 of a task, the mean of both directions."""
    arms = {trial.arm: trial.sweep.arms[trial.arm] for trial in trials}
    fractions = sorted({arm.train_fraction for arm in arms.values()})
    if len(fractions) < 2:
        return {}
    scores: dict[tuple[str, float], dict[int, float]] = {}
    for trial in trials:
        arm = arms[trial.arm]
        results = json.loads((trial.folder / "results.json").read_text())[task]
        value = np.mean([results[side]["r10"]["value"] for side in ("image_to_text", "text_to_image")])
        scores.setdefault((arm.recipe, arm.train_fraction), {})[trial.seed] = float(value)
    found = {}
    for method in dict.fromkeys(arm.recipe for arm in arms.values()):
        if method != BASE and (efficiency := _efficiency(scores, method, fractions)) is not None:
            found[method] = efficiency
    return found


def _efficiency(
    scores: Mapping[tuple[str, float], Mapping[int, float]], method: str, fractions: Sequence[float]
) -> Efficiency | None:
    def curve(name: str, seed: int | None) -> list[float] | None:
        each = [scores.get((name, fraction), {}) for fraction in fractions]
        if seed is None:
            return [float(np.mean(list(one.values()))) for one in each] if all(each) else None
        return [one[seed] for one in each] if all(seed in one for one in each) else None

    means, base = curve(method, None), curve(BASE, None)
    if means is None or base is None:
        return None
    overall = factor(fractions, means, base)
    seeds = sorted({seed for one in scores.values() for seed in one})
    curves = [(curve(method, seed), curve(BASE, seed)) for seed in seeds]
    logs = [math.log(factor(fractions, one, other)) for one, other in curves if one is not None and other is not None]
    interval = over_runs(logs) if len(logs) == len(seeds) else None
    return Efficiency(
        overall,
        None if interval is None else (math.exp(interval[0]), math.exp(interval[1])),
        bound=overall in (fractions[0], 1 / fractions[0]),
    )


def factor(fractions: Sequence[float], scores: Sequence[float], base: Sequence[float]) -> float:
    """How many times fewer pairs give the base's score on all pairs: 1/f where the scores, straight between the logarithms of the
    fractions, reach it. Where they do not, the base is asked for the method's score instead, and the factor is below 1."""

    def reached(curve: Sequence[float], wanted: float) -> float:
        place = len(curve) - 1
        while place and curve[place - 1] >= wanted:
            place -= 1
        if place == 0:
            return fractions[0]
        share = (wanted - curve[place - 1]) / (curve[place] - curve[place - 1])
        low, high = math.log(fractions[place - 1]), math.log(fractions[place])
        return math.exp(low + share * (high - low))

    return 1 / reached(scores, base[-1]) if scores[-1] >= base[-1] else reached(base, scores[-1])


def efficiency_words(efficiency: Mapping[str, Efficiency]) -> list[str]:
    words = []
    for name, found in efficiency.items():
        interval = (
            "" if found.over_seeds is None else f" (over seeds {found.over_seeds[0]:.2f} to {found.over_seeds[1]:.2f})"
        )
        least = ("at least " if found.factor > 1 else "at most ") if found.bound else ""
        words.append(
            f"{name}: {least}{found.factor:.2f} times fewer pairs than {BASE} for its score on all pairs{interval}."
        )
    return words
