"""Bootstrap intervals of metrics: mean, mean per class, median; of one model, of runs, and of paired differences.

An interval is the bootstrap percentile interval over the evaluated items. It covers the choice of items, not the training run;
`over_runs` covers the latter, and `hierarchical` both. Its width is zero for a single item, and when all items agree. Ties are not broken
by position: a rate is its expected value under a random order of the tied candidates, and a median rank takes such an order for each query
(see `drawn_ranks`). So a collapsed model scores exactly chance.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from coalign.errors import UserError
from coalign.metric import Kind, Metric, Outcome
from coalign.progress import track

REPLICATES = 1000
HIERARCHICAL_REPLICATES = 10_000
LEVEL = 0.95
TIE = 1e-6  # float32 cosines closer than this are equal: their last digits depend on the order of summation
_GOLDEN = (5**0.5 - 1) / 2  # the multiples of the golden ratio are evenly scattered over [0, 1)
_CHUNK = 4_000_000  # numbers in memory at a time


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval over items."""

    value: float
    low: float
    high: float
    count: int  # items


def measure(
    name: str, title: str, outcome: Outcome, chance: float | None = None, kind: Kind | None = None, seed: int = 0
) -> Metric:
    """Returns the metric that summarizes the outcome. kind: rank for a median, else rate, unless given."""
    found = estimate([outcome], seed=seed)
    kind = kind or ("rank" if outcome.statistic == "median" else "rate")
    return Metric(name, title, kind, found.value, found.low, found.high, chance, found.count, outcome)


def estimate(outcomes: Sequence[Outcome], minus: Sequence[Outcome] = (), seed: int = 0) -> Estimate:
    """Returns the mean over runs of the outcomes' statistic, minus the mean of the `minus` runs if there are any.

    All outcomes have the same items, groups and statistic. Every run uses the same resamples, so a difference's interval is paired.
    """
    first = outcomes[0]
    values, others = ([outcome.values for outcome in side] for side in (outcomes, minus))
    if first.statistic == "median":
        # resamples by item can be shared
        groups = np.arange(len(first.values)) if first.groups is None else first.groups
        return mean_median(values, groups, others, seed)
    scores = np.mean(values, axis=0) - (np.mean(others, axis=0) if others else 0.0)
    if first.statistic == "mean per class":
        assert first.groups is not None
        return mean_per_class(scores, first.groups, seed)
    return mean(scores, first.groups, seed)


def mean(scores: np.ndarray, clusters: np.ndarray | None = None, seed: int = 0) -> Estimate:
    """Returns the mean of scores [item]; the interval resamples items, or whole `clusters` of items (int [item])."""
    scores = _as_float64(scores)
    if clusters is None:
        sums, counts = scores, np.ones(len(scores))
    else:
        _, inverse = np.unique(clusters, return_inverse=True)
        sums, counts = np.bincount(inverse, scores), np.bincount(inverse).astype(float)
    # Equal clusters are interchangeable, and drawing the count of each kind of cluster is far cheaper.
    kinds, multiplicity = np.unique(np.stack([sums, counts], 1), axis=0, return_counts=True)
    draws = [
        (weights @ kinds[:, 0]) / (weights @ kinds[:, 1]) for weights in _resamples(multiplicity, len(kinds), seed)
    ]
    return _estimate(float(scores.mean()), np.concatenate(draws), len(scores))


def mean_per_class(scores: np.ndarray, labels: np.ndarray, seed: int = 0) -> Estimate:
    """Returns the mean of the per-class means of scores, over the classes that occur; scores and labels [item].

    The bootstrap is stratified: items are resampled within their class. Plain resampling would sometimes drop a small class entirely,
    and the metric would be undefined. A class with one item adds nothing to the width.
    """
    scores = _as_float64(scores)
    classes, labels = np.unique(labels, return_inverse=True)
    draws = np.zeros(REPLICATES)
    for label in range(len(classes)):
        values, multiplicity = np.unique(scores[labels == label], return_counts=True)
        weights = np.concatenate(list(_resamples(multiplicity, len(values), seed + label)))
        draws += (weights @ values) / multiplicity.sum() / len(classes)
    return _estimate(float(per_class(scores, labels, len(classes)).mean()), draws, len(scores))


def per_class(scores: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the mean score of each class [class]; NaN for a class without items."""
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, scores, minlength=num_classes)
    return np.divide(sums, counts, out=np.full(num_classes, np.nan), where=counts > 0)


def mean_median(
    values: Sequence[np.ndarray], clusters: np.ndarray | None, minus: Sequence[np.ndarray] = (), seed: int = 0
) -> Estimate:
    """Returns the mean over runs of each run's median of values [item], minus the mean of the `minus` runs' medians if there are any.

    Items are resampled as in `mean`. The median of an even number of values is the mean of the middle two. All runs share the same
    resamples of items, so the interval of a difference is paired.
    """
    runs, others = ([_as_float64(run) for run in side] for side in (values, minus))
    draws = np.mean([_median_draws(run, clusters, seed) for run in runs], axis=0)
    value = float(np.mean([np.median(run) for run in runs]))
    if others:
        draws = draws - np.mean([_median_draws(run, clusters, seed) for run in others], axis=0)
        value -= float(np.mean([np.median(run) for run in others]))
    return _estimate(value, draws, len(runs[0]))


def _median_draws(
    values: np.ndarray, clusters: np.ndarray | None, seed: int, replicates: int = REPLICATES
) -> np.ndarray:
    """Returns the median of every resample [replicate]; with clusters, the resamples do not depend on the values."""
    if clusters is None:
        ordered, multiplicity = np.unique(values, return_counts=True)
        group = np.arange(len(ordered))
    else:
        _, inverse = np.unique(clusters, return_inverse=True)
        order = np.argsort(values, kind="stable")
        ordered, group = values[order], inverse[order]
        multiplicity = np.ones(inverse.max() + 1, dtype=int)
    draws = []
    for weights in _resamples(multiplicity, len(ordered), seed, replicates):
        cumulative = np.cumsum(weights[:, group], axis=1)  # [replicate, value]: number of items up to this value
        total = cumulative[:, -1:]
        lower = ordered[np.argmax(cumulative > (total - 1) // 2, axis=1)]
        upper = ordered[np.argmax(cumulative > total // 2, axis=1)]
        draws.append((lower + upper) / 2)
    return np.concatenate(draws)


def over_runs(values: Sequence[float], minus: Sequence[float] | None = None) -> tuple[float, float] | None:
    """Returns the 95 % t-interval of a metric's mean over runs with different seeds, or of the difference from `minus` (Welch).

    It covers the choice of seeds, on the same items. Returns None if either side has a single run.
    """
    from scipy.special import stdtrit  # imported late: training does not need it

    sides = [np.asarray(side, dtype=np.float64) for side in (values, minus) if side is not None]
    if any(len(side) < 2 for side in sides):
        return None
    variances = [side.var(ddof=1) / len(side) for side in sides]  # squared standard errors
    freedom = sum(variances) ** 2 / max(sum(v**2 / (len(side) - 1) for v, side in zip(variances, sides)), 1e-300)
    half_width = float(stdtrit(max(1.0, freedom), (1 + LEVEL) / 2) * sum(variances) ** 0.5)
    center = float(sides[0].mean() - (sides[1].mean() if len(sides) > 1 else 0))
    return center - half_width, center + half_width


# ---------------------------------------------------------------- over seeds and items

Runs = Sequence[Sequence[Outcome]]  # run -> the outcomes of the same metrics


@dataclass(frozen=True)
class Hierarchical:
    """A value or a difference with its 95 % interval over seeds and items, and the p-value of the difference."""

    value: float
    low: float
    high: float
    p: float | None  # two-sided; None for the value of one arm


def hierarchical(runs: Runs, minus: Runs = (), seed: int = 0) -> Hierarchical:
    """Returns the mean over runs and metrics, minus the mean of the `minus` runs if there are any, by `arm_draws`.

    p is twice the smaller of (1 + draws on the other side of 0) / (1 + draws), at most 1.
    """
    values, draws = arm_draws([runs, *([minus] if minus else [])], seed)
    value, found = (values[0] - values[1], draws[0] - draws[1]) if minus else (values[0], draws[0])
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    smaller = min(np.count_nonzero(found <= 0), np.count_nonzero(found >= 0))
    p = min(1.0, 2 * (1 + smaller) / (1 + len(found))) if minus else None
    return Hierarchical(float(value), float(low), float(high), p)


def holm(p_values: Sequence[float], planned: int | None = None) -> list[float]:
    """Returns the p-values adjusted by Holm for `planned` tests (default: these); tests without a p-value yet count as 1."""
    planned = len(p_values) if planned is None else planned
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (planned - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def arm_draws(arms: Sequence[Runs], seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean over runs and metrics of each arm [arm], and its draws by a hierarchical bootstrap [arm, replicate].

    An arm is two or more runs with different seeds. A replicate draws the clusters of items, such as images with all their captions, which
    are common to all runs of all arms and, if they are means, to all metrics; and for each arm, independently, its seeds (Davison and
    Hinkley 1997, section 3.8; with crossed items and seeds, Owen 2007). The bootstrap variance of the mean of k seeds is too small by the
    factor (k - 1) / k, so the deviations of a replicate's seeds from the mean of all are multiplied by sqrt(k / (k - 1)) (Hesterberg 2015).

    Variance of single items in single runs counts both as variance of items and of seeds, so intervals are wide if it dominates. They are
    narrow if seeds dominate and are few: with 3 seeds per arm, 95 % intervals then covered 91 % in a simulation.
    """
    assert all(len(runs) > 1 for runs in arms)
    of_run = _run_draws([run for runs in arms for run in runs], seed)
    generator = np.random.default_rng([seed, 1])
    draws, first = [], 0
    for k in map(len, arms):
        own = of_run[:, first : first + k]
        first += k
        center = own.mean(1)
        weights = generator.multinomial(k, np.full(k, 1 / k), size=len(own)) / k
        draws.append(center + (k / (k - 1)) ** 0.5 * ((weights * own).sum(1) - center))
    values = [np.mean([_statistic(outcome) for run in runs for outcome in run]) for runs in arms]
    return np.array(values), np.array(draws)


def _statistic(outcome: Outcome) -> float:
    if outcome.statistic == "mean per class":
        _, labels = np.unique(_groups(outcome), return_inverse=True)
        return float(per_class(outcome.values, labels, labels.max() + 1).mean())
    return float(np.median(outcome.values) if outcome.statistic == "median" else np.mean(outcome.values))


def _run_draws(runs: Runs, seed: int) -> np.ndarray:
    """Returns the mean over metrics of each run in every resample of the items [replicate, run]."""
    metrics = list(zip(*runs))
    if any(metric[0].statistic == "mean" for metric in metrics):
        assert all(metric[0].statistic == "mean" for metric in metrics)
        return _mean_draws(metrics, seed)
    draw = {"median": _run_medians, "mean per class": _run_class_means}
    return np.mean([draw[metric[0].statistic](metric, seed) for metric in metrics], axis=0)


def _groups(outcome: Outcome) -> np.ndarray:
    return np.arange(len(outcome.values)) if outcome.groups is None else outcome.groups


def _mean_draws(metrics: Sequence[Sequence[Outcome]], seed: int) -> np.ndarray:
    """Like `_run_draws`, of metrics that are means: [metric][run]. They have the same clusters of items, such as images."""
    clusters = np.unique(np.concatenate([_groups(metric[0]) for metric in metrics]))
    columns = []  # of each metric: every run's sums, and the number of items
    for metric in metrics:
        row = np.searchsorted(clusters, _groups(metric[0]))
        for values in (*(run.values for run in metric), np.ones(len(row))):
            columns.append(np.bincount(row, values, minlength=len(clusters)))
    kinds, multiplicity = np.unique(np.stack(columns, 1), axis=0, return_counts=True)  # see `mean`
    num_runs, parts = len(metrics[0]), []
    for weights in _resamples(multiplicity, kinds.shape[1], seed, HIERARCHICAL_REPLICATES):
        sums = (weights @ kinds).reshape(len(weights), len(metrics), num_runs + 1)
        parts.append((sums[:, :, :-1] / sums[:, :, -1:]).mean(1))
    return np.concatenate(parts)


def _run_medians(metric: Sequence[Outcome], seed: int) -> np.ndarray:
    clusters = _groups(metric[0])
    return np.stack([_median_draws(run.values, clusters, seed, HIERARCHICAL_REPLICATES) for run in metric], 1)


def _run_class_means(metric: Sequence[Outcome], seed: int) -> np.ndarray:
    """Resamples the items within their class, as `mean_per_class` does."""
    classes, labels = np.unique(_groups(metric[0]), return_inverse=True)
    scores, draws = np.stack([run.values for run in metric], 1), np.zeros((HIERARCHICAL_REPLICATES, len(metric)))
    for label in range(len(classes)):
        kinds, multiplicity = np.unique(scores[labels == label], axis=0, return_counts=True)
        found = _resamples(multiplicity, kinds.shape[1], seed + label, HIERARCHICAL_REPLICATES)
        draws += np.concatenate([weights @ kinds for weights in found]) / multiplicity.sum() / len(classes)
    return draws


# ---------------------------------------------------------------- ties


def hit_probability(better: np.ndarray, tied_incorrect: np.ndarray, tied_correct: np.ndarray, k: int) -> np.ndarray:
    """Returns the probability of a correct candidate among the top `k`, if tied candidates are in random order.

    Per query: `better` incorrect candidates rank above the best correct one; `tied_incorrect` incorrect and `tied_correct` correct
    candidates (itself included) are tied with it. If all candidates are tied, this is the chance level.
    """
    slots = np.maximum(k - better, 0)
    miss = np.ones(np.shape(better), dtype=np.float64)
    for slot in range(k):  # the probability that this slot is incorrect too
        remaining = np.maximum(tied_incorrect - slot, 0)
        miss *= np.where(slot < slots, remaining / np.maximum(remaining + tied_correct, 1), 1.0)
    return 1 - miss


def drawn_ranks(better: np.ndarray, tied_incorrect: np.ndarray, tied_correct: np.ndarray) -> np.ndarray:
    """Returns each query's rank of the best correct candidate in one random order of its tied candidates (int64 [query]).

    The arguments are those of `hit_probability`. The draws are fixed and stratified: the queries take different, evenly
    distributed quantiles of their distributions. If all candidates are tied, the ranks are those of a random order, so their median is the
    chance level, which models with random, distinct similarities have too.
    """
    incorrect = torch.from_numpy(tied_incorrect).double()
    total = torch.from_numpy(tied_incorrect + tied_correct).double()
    scattered = torch.arange(len(better)).double().mul(_GOLDEN).frac()
    # Queries take their quantiles in the order of their ties, so that those of queries with similar ties are evenly distributed.
    in_order = torch.from_numpy(np.lexsort((better, tied_incorrect, tied_correct)))
    quantile = torch.empty_like(scattered)
    quantile[in_order] = scattered.argsort().argsort().double().add(0.5) / len(better)

    def is_hit(rank: torch.Tensor) -> torch.Tensor:
        """Whether the best correct candidate is among the first `rank` tied ones at the query's quantile."""
        log_miss = incorrect.add(1).lgamma() - (incorrect - rank).clamp(min=0).add(1).lgamma()
        log_miss = log_miss - total.add(1).lgamma() + (total - rank).clamp(min=0).add(1).lgamma()
        miss = torch.where(incorrect >= rank, log_miss.exp(), 0.0)
        return 1 - miss >= quantile - 1e-9

    low, high = torch.ones(len(better), dtype=torch.int64), torch.from_numpy(tied_incorrect).long() + 1
    while bool((low < high).any()):
        middle = (low + high) // 2
        hit = is_hit(middle)
        low, high = torch.where(hit, low, middle + 1).minimum(high), torch.where(hit, middle, high)
    return np.asarray(better) + low.numpy()


def _resamples(multiplicity: np.ndarray, width: int, seed: int, replicates: int = REPLICATES) -> Iterator[np.ndarray]:
    """Yields the count of each kind, int [replicate, kind], in chunks of `replicates` rows in total; `width` bounds the memory."""
    generator = np.random.default_rng(seed)
    n = int(multiplicity.sum())
    chunk = max(1, _CHUNK // max(width, len(multiplicity)))
    for start in track(range(0, replicates, chunk), "Bootstrap", unit="parts"):
        yield generator.multinomial(n, multiplicity / n, size=min(chunk, replicates - start))


def _estimate(value: float, draws: np.ndarray, count: int) -> Estimate:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), count)


def _as_float64(scores: np.ndarray) -> np.ndarray:
    if len(scores) == 0:
        raise UserError(
            "There is nothing to evaluate: the data has no usable samples; check the dataset and its split."
        )
    return np.asarray(scores, dtype=np.float64)
