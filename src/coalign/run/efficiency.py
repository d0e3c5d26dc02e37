"""The data-efficiency factor: how many times fewer pairs a method needs than CLIP, from trials on fractions of the pairs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from coalign.evaluation.metrics import over_runs
from coalign.run.model import RESULTS

if TYPE_CHECKING:
    from coalign.run.reproduce import Trial

BASE = "clip"


@dataclass(frozen=True)
class Efficiency:
    """How many times fewer pairs a method needs for CLIP's score on all of them; below 1 it would need more."""

    factor: float
    over_seeds: tuple[float, float] | None  # 95 %, by the factor's logarithm
    bound: bool  # the curves meet at the least pairs that were tried, or below: the factor is this or farther from 1


# method -> fraction of the pairs -> seed -> R@10, the mean of both directions
Scores = dict[str, dict[float, dict[int, float]]]


def fraction_scores(trials: Sequence[Trial], task: str = "retrieval") -> Scores:
    """Of every method that was trained on several fractions; empty if none was."""
    scores: Scores = {}
    for trial in trials:
        arm = trial.sweep.arms[trial.arm]
        results = json.loads((trial.folder / RESULTS).read_text())[task]
        value = np.mean([results[side]["r10"]["value"] for side in ("image_to_text", "text_to_image")])
        scores.setdefault(arm.recipe, {}).setdefault(arm.train_fraction, {})[trial.seed] = float(value)
    return {method: of_fraction for method, of_fraction in scores.items() if len(of_fraction) > 1}


def efficiencies(scores: Scores) -> dict[str, Efficiency]:
    """Of each method that was trained on the fractions that CLIP was."""
    base = scores.get(BASE, {})
    return {
        method: _efficiency(of_fraction, base)
        for method, of_fraction in scores.items()
        if method != BASE and of_fraction.keys() == base.keys()
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
