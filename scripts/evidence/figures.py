"""The figures of the pages: file name without suffix -> figure."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from coalign.experiments.tables.registry import TABLES
from coalign.report import compare_figures
from evidence.table_page import OTHER_METRICS
from evidence.text import Values, interval, metric_title


def figures(tables: Mapping[str, Values]) -> dict[str, Figure]:
    """Returns one plot per table or, for tables with fractions of the pairs, per split."""
    found = {}
    for name, values in tables.items():
        if not values["efficiency"]:
            found[name] = values_by_arm(values)
        for task, by_method in values["efficiency"].items():
            found[f"{name}-{task}"] = by_fraction(values, task, list(by_method))
    return found


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
