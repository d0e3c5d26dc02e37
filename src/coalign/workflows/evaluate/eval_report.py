"""Reports of evaluation results: tables on the terminal, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coalign.errors import UserError
from coalign.files import write_text
from coalign.metric import metrics_from_json
from coalign.report.class_results import ClassResults, class_results
from coalign.report.page import Page
from coalign.runs.folder import check_output
from coalign.version import __version__

Results = Mapping[str, Mapping[str, Any]]

_HEADER = ("metric", "value", "95 % interval", "chance")


def print_results(results: Results) -> None:
    """Prints the results of `evaluate`, one table per task."""
    console = Console(highlight=False)
    for task, values in results.items():
        table = Table(*_HEADER, title=escape(_title(task, values)))
        for row in _rows(values):
            table.add_row(*map(escape, row))
        console.print(table)
        for note in values["notes"]:
            console.print(note, markup=False)


def write_page(results: Results, model: str, path: Path) -> None:
    """Writes an HTML page with one section per task."""
    page = Page(
        f"Evaluation of {model}", f"coalign {__version__}; intervals are 95 % bootstrap intervals over the items"
    )
    for task, values in results.items():
        page.section(_title(task, values))
        page.table(_HEADER, _rows(values))
        for note in values["notes"]:
            page.text(note)
        if "per_class" in values:
            class_results(page, class_results_of(values))
    page.write(path)


def class_results_of(values: Mapping[str, Any]) -> ClassResults:
    """Returns the results by class in the details of a classification task."""
    confusion = values.get("confusion")
    return ClassResults(
        values["per_class"], None if confusion is None else np.array(confusion), values.get("most_confused", ())
    )


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes results as JSON. Raises UserError if the file cannot be written."""
    check_output(path)
    text = json.dumps(results, indent=2, default=str) + "\n"
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_text(text)
        else:
            write_text(path, text)
    except OSError as error:
        raise UserError(f"The results could not be written to {path}: {error.strerror}.") from error


def _title(task: str, values: Mapping[str, Any]) -> str:
    return f"{task}, {values['split']} ({values['samples']:,} samples)" if "split" in values else task


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Returns title, value, interval and chance of every metric."""
    return [
        (metric.title, metric.text(), metric.interval_text(), metric.chance_text())
        for metric in metrics_from_json(values["metrics"])
    ]
