"""The figures of the pages: file name without suffix -> figure."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure

from coalign.experiments.tables.registry import TABLES
from coalign.report import compare_figures
from evidence.summary import compared_tables, other_methods
from evidence.table_page import OTHER_METRICS
from evidence.text import Values, interval, metric_title


def figures(tables: Mapping[str, Values]) -> dict[str, Figure]:
    """Returns the plot of differences from CLIP, and one plot per table or, for tables with fractions of the pairs, per split."""
    found = {"beside-clip": beside_clip(tables)}
    for name, values in tables.items():
        if not values["efficiency"]:
            found[name] = values_by_arm(values)
        for task, by_method in values["efficiency"].items():
            found[f"{name}-{task}"] = by_fraction(values, task, list(by_method))
    return found


def beside_clip(tables: Mapping[str, Values]) -> Figure:
    """Each method's difference from CLIP, with its interval over seeds, in every table that has both."""
    settings = compared_tables(tables)
    triples = {
        name: [difference_over_seeds(each.metrics.get(name)) for each in settings] for name in other_methods(settings)
    }
    labels = [f"{each.table}\n{each.num_train:,} pairs; {each.split}" for each in settings]
    return compare_figures.points(labels, triples, difference_to="CLIP")


def difference_over_seeds(metric: Values | None) -> tuple[float, float, float]:
    """Returns the difference from CLIP with its interval over seeds; NaN if there is none."""
    found = metric and metric["difference_over_seeds"]
    return (metric["difference"], *found) if metric and found else (math.nan,) * 3


def values_by_arm(values: Values) -> Figure:
    """R@10 in both directions on every split, zero-shot and probe accuracy, and the mean over foils."""
    first = values["groups"][0]["metrics"]
    shown = [
        f"{task}.{side}.r10"
        for task in TABLES[values["table"]].retrieval_tasks
        for side in ("image_to_text", "text_to_image")
    ]
    shown += [metric for metric in OTHER_METRICS if metric in first and first[metric]["kind"] == "rate"]
    shown = [metric for metric in first if metric in shown]
    triples = {each["name"]: [interval(each["metrics"][metric]) for metric in shown] for each in values["groups"]}
    return compare_figures.points(
        [metric_title(values, metric) for metric in shown], triples, [first[metric]["chance"] for metric in shown]
    )


def by_fraction(values: Values, task: str, methods: list[str]) -> Figure:
    """R@10 of each method against the fraction of the pairs."""
    scores = {
        method: {float(fraction): seeds for fraction, seeds in curve.items()}
        for method, curve in values["by_fraction"][task].items()
    }
    split = TABLES[values["table"]].retrieval_tasks[task]
    on = "the held-out pairs" if split == "held out" else f"the {split} split"
    return compare_figures.by_fraction(scores, title=f"R@10 on {on}, mean of both directions")
