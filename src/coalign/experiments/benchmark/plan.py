"""What a benchmark trains in its time: how many trials of which length each method gets for its search, and how long the rest takes."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from coalign.config import OptimizerConfig
from coalign.errors import UserError
from coalign.formatting import duration
from coalign.methods.search import halved

LENGTHS = (1.0, 2.0, 4.0)  # of trials, in multiples of the shortest
FEWEST, MOST = 3, 12  # trials of a search
ENOUGH = 5.0  # epochs of the shortest trials of every method; if they had fewer, fewer trials are better
LONGEST = 100.0  # epochs of any method, as few pairs are learned by heart; the others get the time that this leaves
OVERHEAD = 20.0  # seconds of a trial besides training: start, evaluation, report


class TooShort(UserError):
    """The time is too short. `minutes` are enough."""

    def __init__(self, message: str, minutes: int) -> None:
        super().__init__(message)
        self.minutes = minutes


@dataclass(frozen=True)
class Plan:
    """The budget of a benchmark, the same for every method.

    Attributes:
        trials: The trials of each search.
        epochs: By method, the epochs of its shortest trials.
        speeds: By method, pairs per second of a trial.
        seconds: The estimated time of all trials.
    """

    trials: int
    epochs: dict[str, float]
    speeds: dict[str, float]
    seconds: float

    def lines(self, seeds: int) -> list[str]:
        """Returns what to print before the trials start."""
        lines = []
        for method, shortest in self.epochs.items():
            lengths = [f"{shortest * length:.3g}" for length in LENGTHS]
            lines.append(
                f"{method}: {self.speeds[method]:,.0f} pairs/s; {', '.join(lengths[:-1])} or {lengths[-1]} epochs"
            )
        extended = " and ".join(str(halved(self.trials, times)) for times in range(1, len(LENGTHS)))
        return [
            *lines,
            f"Search: {self.trials} trials per method, of which {extended} are extended. Then {seeds} new seed{'s' * (seeds > 1)} per "
            f"method, evaluated on the test pairs. About {duration(self.seconds)} in all.",
        ]


def make_plan(
    speeds: Mapping[str, float],
    num_pairs: int,
    minutes: float,
    *,
    spent: float,
    fractions: int,
    seeds: int,
    jobs: int,
    longest: float | None = None,
) -> Plan:
    """Returns as many trials per method as leave their shortest ones `ENOUGH` epochs, and the lengths that fill the time.

    speeds: pairs per second of each method. minutes: in all. spent: seconds of these that are over. fractions: the number of fractions to
    train on. jobs: trials that run at once. longest: epochs of every method's longest trials; then as many trials as fit into the time.
    Raises TooShort, a UserError, if even the fewest trials do not fit.
    """
    seconds = 60 * minutes - spent
    most = {
        method: LONGEST / LENGTHS[-1] * num_pairs / speed for method, speed in speeds.items()
    }  # seconds of a shortest trial
    for trials in range(MOST, FEWEST - 1, -1):
        fixed, units = _cost(trials, len(speeds), fractions, seeds, jobs)
        if longest is None:
            time = _filled(max(0.0, (seconds - fixed) / units), most.values())
            times = {method: min(time, each) for method, each in most.items()}
            fits = min(times[method] * speed for method, speed in speeds.items()) >= ENOUGH * num_pairs
        else:
            times = {method: longest / LENGTHS[-1] * num_pairs / speed for method, speed in speeds.items()}
            fits = fixed + units * fmean(times.values()) <= seconds
        if fits:
            break
    slowest = min(speeds, key=speeds.__getitem__)
    least = times.values() if longest else [min(num_pairs / speeds[slowest], each) for each in most.values()]
    needed = fixed + units * fmean(least)
    if not fits and needed > seconds:
        what = f"{longest:g} epochs" if longest else f"an epoch of {slowest} in its shortest trials"
        enough = math.ceil((needed + spent) / 60)
        raise TooShort(
            f"--minutes {minutes:g} is too short for {what}, with {FEWEST} trials and {seeds} seeds per method; give {enough} or more, or "
            "omit a method.",
            enough,
        )
    epochs = {method: float(f"{times[method] * speed / num_pairs:.3g}") for method, speed in speeds.items()}
    return Plan(trials, epochs, dict(speeds), fixed + units * fmean(times.values()))


def _filled(mean: float, most: Collection[float]) -> float:
    """Returns the longest time that methods can have if none takes more than its most, and their mean is at most `mean`."""
    waiting, total = sorted(most), mean * len(most)
    while waiting and waiting[0] * len(waiting) <= total:
        total -= waiting.pop(0)
    return total / len(waiting) if waiting else math.inf


def _cost(trials: int, methods: int, fractions: int, seeds: int, jobs: int) -> tuple[float, float]:
    """Returns the seconds that do not depend on the length of the trials, and the training time in shortest trials."""
    # an extended trial continues before its cool-down
    kept = 1 - OptimizerConfig.cooldown_fraction
    steps = [longer - kept * shorter for shorter, longer in pairwise((0.0, *LENGTHS))]
    rounds = [(halved(trials, times), step) for times, step in enumerate(steps)]
    rounds += [(fractions - 1, sum(steps)), (fractions * seeds, LENGTHS[-1])]
    batches = [math.ceil(methods * count / jobs) for count, _ in rounds]
    return OVERHEAD * sum(batches), sum(batch * length for batch, (_, length) in zip(batches, rounds))
