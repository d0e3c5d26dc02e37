"""A row of the papers' tables: one metric on each of several datasets, and their average."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


def suite_row(results: Mapping[str, Mapping[str, Any]], kind: str, names: Iterable[str]) -> dict[str, Any]:
    """Returns the main metric of the task `kind` on each dataset, with its interval, and the average.

    The datasets are independent, so the average's half-widths are the root of the sum of squared half-widths over the number of datasets.
    """
    by_name = {name: results[f"{kind}:{name}"] for name in names}
    row = {name: result["intervals"][result["main_metric"]] for name, result in by_name.items()}
    mean = sum(entry["value"] for entry in row.values()) / len(row)
    below, above = (
        math.sqrt(sum((entry["value"] - entry[edge]) ** 2 for entry in row.values())) / len(row)
        for edge in ("low", "high")
    )
    average = {"value": mean, "low": mean - below, "high": mean + above, "n": len(row)}
    metrics = {name: result["main_metric"] for name, result in by_name.items()}
    return {"task": "suite", "row": row, "average": average, "metrics": metrics}
