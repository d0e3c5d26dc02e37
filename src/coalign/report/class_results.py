"""The part of a page that shows a classification by class: recalls, confusion matrix, most confused classes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from coalign.formatting import percent
from coalign.report import figures
from coalign.report.page import Page


@dataclass
class ClassResults:
    """The results of a classification by class."""

    per_class: Mapping[str, float | None]  # recall by class name; None for a class without images
    confusion: np.ndarray | None = None  # int [true class, predicted class]; None if there are too many classes to show
    # the most frequent mistakes: true, predicted, images, fraction
    most_confused: Sequence[Mapping[str, Any]] = field(default_factory=list)


def class_results(page: Page, results: ClassResults, figure_name: str | None = None) -> None:
    """Adds the results to the page, the worst classes first. figure_name: of the file with the confusion matrix; None: no file."""
    if results.confusion is not None:
        figure = figures.confusion_matrix(results.confusion, list(results.per_class))
        page.figure(
            figure,
            "Confusion matrix: rows are true classes, columns are predicted classes. Color: fraction of the true class.",
            name=figure_name,
        )
    if results.most_confused:
        rows = [
            (each["true"], each["predicted"], each["images"], percent(each["fraction"]))
            for each in results.most_confused
        ]
        page.table(
            ("true class", "predicted class", "images", "fraction of the class"), rows, "Most frequent mistakes."
        )
    known = {name: rate for name, rate in results.per_class.items() if rate is not None}
    if known:
        by_rate = sorted(known.items(), key=lambda item: item[1])
        page.table(("class, worst first", "recall"), [(name, percent(rate)) for name, rate in by_rate])
