"""A metric: one number of an evaluation, and how tables, pages and cards print it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from coalign.formatting import percent

if TYPE_CHECKING:
    import numpy as np

# rate: a fraction, printed as a percentage. rank: 1 is best. distance: between embeddings. difference: of two rates.
Kind = Literal["rate", "rank", "distance", "difference"]


@dataclass(frozen=True)
class Outcome:
    """The per-item values that a metric summarizes, for intervals and paired comparisons of models on the same items.

    Attributes:
        values: float64 [item].
        groups: int64 [item] or None. For the mean and the median, the clusters that the bootstrap draws as a whole, such as an image with
            all its captions; for the mean per class, the classes.
        statistic: What summarizes the values.
    """

    values: np.ndarray
    groups: np.ndarray | None = None
    statistic: Literal["mean", "mean per class", "median"] = "mean"


@dataclass(frozen=True)
class Metric:
    """A value with its 95 % interval. Rates and differences are fractions, not percentages.

    Attributes:
        name: The key in results, unique within its task, such as "image_to_text.r1".
        title: Such as "Image → text R@1".
        kind: "rate" (a fraction), "rank" (1 is best), "distance" (between embeddings) or "difference" (of two rates).
        value: The value.
        low: Lower end of the 95 % interval. None: no interval, as for a distance, which is one value for all items.
        high: Upper end of the interval.
        chance: The value of a random guess. None: unknown.
        count: The number of evaluated items.
        outcome: The per-item values, in results of this process only.
    """

    name: str
    title: str
    kind: Kind
    value: float
    low: float | None = None
    high: float | None = None
    chance: float | None = None
    count: int = 0
    outcome: Outcome | None = field(default=None, repr=False, compare=False)

    def prefixed(self, prefix: str) -> Metric:
        """Returns the metric with the title "Prefix: image → text R@1"."""
        return replace(self, title=f"{prefix}: {self.title[:1].lower()}{self.title[1:]}")

    def text(self) -> str:
        """Returns the value as tables print it, such as "38.1 %"."""
        return value_text(self.kind, self.value)

    def interval_text(self) -> str:
        """Returns "35.2–41.0 %", or "" without an interval."""
        return "" if self.low is None or self.high is None else interval_text(self.kind, self.low, self.high)

    def chance_text(self) -> str:
        """Returns the chance level likewise, or "" if it is unknown."""
        return "" if self.chance is None else value_text(self.kind, self.chance)

    def beats_chance(self) -> bool | None:
        """Returns whether the whole interval is better than chance; None if that is unknown."""
        if self.chance is None or self.low is None or self.high is None:
            return None
        margin = 1e-9 * abs(self.chance)  # of rounding: a model with constant embeddings has exactly the chance level
        return self.high < self.chance - margin if self.kind == "rank" else self.low > self.chance + margin

    def can_beat_chance(self) -> bool:
        """Whether any model can be better than chance. No model can for R@10 among ten captions: it is 100 %, whatever their order."""
        if self.chance is None:
            return True
        return self.chance > 1 if self.kind == "rank" else self.chance < 1 - 1e-9

    def to_json(self) -> dict[str, Any]:
        """Returns all fields except the name and the outcome, as in `results.json`."""
        return {name: value for name, value in vars(self).items() if name not in ("name", "outcome")}


def metrics_from_json(metrics: Mapping[str, Mapping[str, Any]]) -> list[Metric]:
    """Returns the metrics of a mapping from names to `Metric.to_json`."""
    return [Metric(name, **values) for name, values in metrics.items()]


def value_text(kind: Kind, value: float) -> str:
    if kind == "rate":
        return percent(value)
    if kind == "rank":
        return f"{value:,.1f}".removesuffix(".0")
    return difference_text("rate", value) if kind == "difference" else f"{value:.2f}"


def interval_text(kind: Kind, low: float, high: float) -> str:
    if kind == "difference":
        return f"{value_text(kind, low)} to {value_text(kind, high)}"
    return f"{value_text(kind, low).removesuffix(' %')}–{value_text(kind, high)}"


def difference_text(kind: Kind, difference: float) -> str:
    """Returns a difference with its sign: in percentage points for a rate, else in the metric's own unit."""
    scale, digits = (100 if kind in ("rate", "difference") else 1), (2 if kind == "distance" else 1)
    return f"{scale * difference:+.{digits}f}".replace("-", "−")
