"""Figures with bootstrap intervals: accuracy, mean per class, R@K, median rank.

An interval is the bootstrap percentile interval over the evaluated items: it says how far the figure would move with
another sample of items of the same kind, not with another training run, which `over_runs` says. With one item, or when
every item agrees, it has no width. Ties are not broken by position: a figure is its expectation when tied candidates are
put in random order, so a collapsed model scores exactly chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coalign.errors import UserError

REPLICATES = 1000
LEVEL = 0.95
TIE = 1e-6  # float32 cosines closer than this are equal: their last digits depend on how the sum was blocked
_CHUNK = 4_000_000  # numbers held at a time


@dataclass(frozen=True)
class Metric:
    """A figure with its interval; `n` is the number of items it was measured on. Rates are fractions, not per cent."""

    value: float
    low: float
    high: float
    n: int

    def to_json(self) -> dict[str, float | int]:
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}


def mean(scores: np.ndarray, clusters: np.ndarray | None = None, seed: int = 0) -> Metric:
    """Mean of scores [item]; the interval comes from resampling items, or whole `clusters` of items (int [item])."""
    scores = _checked(scores)
    if clusters is None:
        sums, counts = scores, np.ones(len(scores))
    else:
        _, inverse = np.unique(clusters, return_inverse=True)
        sums, counts = np.bincount(inverse, scores), np.bincount(inverse).astype(float)
    # Equal clusters are interchangeable: drawing how often each kind of cluster comes is the same, and far cheaper.
    kinds, multiplicity = np.unique(np.stack([sums, counts], 1), axis=0, return_counts=True)
    draws = [
        (weights @ kinds[:, 0]) / (weights @ kinds[:, 1]) for weights in _resamples(multiplicity, len(kinds), seed)
    ]
    return _metric(float(scores.mean()), np.concatenate(draws), len(scores))


def mean_per_class(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> Metric:
    """Mean over the classes that occur of the mean score within the class; scores and labels [item].

    The bootstrap is stratified: items are resampled within their class. Plain resampling would now and then lose a
    small class altogether, for which the figure is then undefined. A class with one item adds nothing to the width.
    """
    scores = _checked(scores)
    classes, labels = np.unique(labels, return_inverse=True)
    draws = np.zeros(REPLICATES)
    for label in range(len(classes)):
        values, multiplicity = np.unique(scores[labels == label], return_counts=True)
        weights = np.concatenate(list(_resamples(multiplicity, len(values), seed + label)))
        draws += (weights @ values) / multiplicity.sum() / len(classes)
    return _metric(float(per_class(scores, labels, len(classes)).mean()), draws, len(scores))


def per_class(scores: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Mean score of each class [class]; NaN for a class without items."""
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, scores, minlength=num_classes)
    return np.divide(sums, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def median(values: np.ndarray, clusters: np.ndarray | None = None, seed: int = 0) -> Metric:
    """Median of values [item] (the mean of the middle two of an even number); resampled as in `mean`."""
    values = _checked(values)
    return _metric(float(np.median(values)), _median_draws(values, clusters, seed), len(values))


def mean_median(
    values: Sequence[np.ndarray], clusters: np.ndarray, minus: Sequence[np.ndarray] = (), seed: int = 0
) -> Metric:
    """The mean over runs of each run's median of values [item], less the same of other runs on the same items if there are any.

    The same draws of items are taken for every run, so that the interval of a difference is that of paired runs.
    """
    runs, others = ([_checked(run) for run in side] for side in (values, minus))
    draws = np.mean([_median_draws(run, clusters, seed) for run in runs], axis=0)
    value = float(np.mean([np.median(run) for run in runs]))
    if others:
        draws = draws - np.mean([_median_draws(run, clusters, seed) for run in others], axis=0)
        value -= float(np.mean([np.median(run) for run in others]))
    return _metric(value, draws, len(runs[0]))


def _median_draws(values: np.ndarray, clusters: np.ndarray | None, seed: int) -> np.ndarray:
    """The median of every resample [replicate]; with clusters, the same resamples for any values."""
    if clusters is None:
        ordered, multiplicity = np.unique(values, return_counts=True)
        group = np.arange(len(ordered))
    else:
        _, inverse = np.unique(clusters, return_inverse=True)
        order = np.argsort(values, kind="stable")
        ordered, group = values[order], inverse[order]
        multiplicity = np.ones(inverse.max() + 1, dtype=int)
    draws = []
    for weights in _resamples(multiplicity, len(ordered), seed):
        passed = np.cumsum(weights[:, group], axis=1)  # [replicate, value]: how many items up to here
        total = passed[:, -1:]
        lower = ordered[np.argmax(passed > (total - 1) // 2, axis=1)]
        upper = ordered[np.argmax(passed > total // 2, axis=1)]
        draws.append((lower + upper) / 2)
    return np.concatenate(draws)


def over_runs(values: Sequence[float], minus: Sequence[float] | None = None) -> tuple[float, float] | None:
    """95 % t-interval of the mean of a figure over runs that differ in their seed, or of its difference to other runs' mean (Welch).

    It says how far another choice of seeds would move the figure on the same items. None with a single run on a side.
    """
    from scipy.special import stdtrit  # not at the top: training starts without it

    sides = [np.asarray(side, dtype=np.float64) for side in (values, minus) if side is not None]
    if any(len(side) < 2 for side in sides):
        return None
    squares = [side.var(ddof=1) / len(side) for side in sides]  # of the standard errors
    freedom = sum(squares) ** 2 / max(sum(s**2 / (len(side) - 1) for s, side in zip(squares, sides)), 1e-300)
    half = float(stdtrit(max(1.0, freedom), (1 + LEVEL) / 2) * sum(squares) ** 0.5)
    middle = float(sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0))
    return middle - half, middle + half


def hit_probability(better: np.ndarray, tied_wrong: np.ndarray, tied_right: np.ndarray, k: int) -> np.ndarray:
    """Probability that one of the first `k` places holds a right candidate, when tied candidates stand in random order.

    Per query: `better` wrong candidates stand before the best right one; `tied_wrong` wrong and `tied_right` right ones
    (itself included) are tied with it. All candidates tied gives the level of chance.
    """
    places = np.maximum(k - better, 0)
    miss = np.ones(np.shape(better), dtype=np.float64)
    for place in range(k):  # the chance that this place, too, gets a wrong one
        wrong_left = np.maximum(tied_wrong - place, 0)
        miss *= np.where(place < places, wrong_left / np.maximum(wrong_left + tied_right, 1), 1.0)
    return 1 - miss


def chance_median_rank(wrong: np.ndarray, right: np.ndarray) -> float:
    """The rank that a random order does not exceed for half of the queries; each has `wrong` and `right` candidates."""
    kinds, weights = np.unique(np.stack([wrong, right], 1), axis=0, return_counts=True)
    wrong_t, total = torch.from_numpy(kinds[:, 0]).double(), torch.from_numpy(kinds.sum(1)).double()

    def found(rank: int) -> float:  # share of queries whose best right candidate is among the first `rank`
        log_miss = wrong_t.add(1).lgamma() - (wrong_t - rank).clamp(min=0).add(1).lgamma()
        log_miss = log_miss - total.add(1).lgamma() + (total - rank).clamp(min=0).add(1).lgamma()
        miss = torch.where(wrong_t >= rank, log_miss.exp(), 0.0).numpy()
        return float(1 - (miss * weights).sum() / weights.sum())

    low, high = 1, int(total.max())
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if found(middle) >= 0.5 - 1e-9 else (middle + 1, high)
    return float(low)


def _resamples(multiplicity: np.ndarray, width: int, seed: int) -> Iterator[np.ndarray]:
    """How often each kind comes, int [some replicates, kind], REPLICATES rows in all; `width` bounds the memory."""
    generator = np.random.default_rng(seed)
    n = int(multiplicity.sum())
    chunk = max(1, _CHUNK // max(width, len(multiplicity)))
    for start in range(0, REPLICATES, chunk):
        yield generator.multinomial(n, multiplicity / n, size=min(chunk, REPLICATES - start))


def _metric(value: float, draws: np.ndarray, n: int) -> Metric:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Metric(value, float(low), float(high), n)


def _checked(scores: np.ndarray) -> np.ndarray:
    if len(scores) == 0:
        raise UserError("There is nothing to evaluate: the data gave 0 usable items; check the data set and its split.")
    return np.asarray(scores, dtype=np.float64)
