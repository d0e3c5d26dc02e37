"""A row of the papers' tables: one metric on each of several datasets, and their average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from coalign.metric import Metric


def suite_metrics(main: Mapping[str, Metric]) -> list[Metric]:
    """Returns the main metric of each dataset under the dataset's name, and the average.

    The datasets are independent, so the average's half-widths are the root of the sum of squared half-widths over the number of datasets.
    """
    row = [replace(metric, name=name, title=f"{name}: {metric.title}") for name, metric in main.items()]
    mean = sum(metric.value for metric in row) / len(row)
    below = math.sqrt(sum((metric.value - (metric.low or 0.0)) ** 2 for metric in row)) / len(row)
    above = math.sqrt(sum((metric.value - (metric.high or 0.0)) ** 2 for metric in row)) / len(row)
    return [*row, Metric("average", "Average", "rate", mean, mean - below, mean + above, count=len(row))]
