"""Reports of evaluation results: tables on the terminal, and an HTML page."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coalign.errors import UserError
from coalign.files import write_text
from coalign.formatting import foil_kind, percent
from coalign.report.page import Page
from coalign.runs.folder import check_output
from coalign.version import __version__

Results = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str, str, str]  # metric, value, interval, chance

_TITLES = {
    **{f"{kind}_ap{iou}": f"{kind} AP{iou}" for kind in ("box", "mask") for iou in ("", "50", "75")},
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
}
_RATES = ("accuracy", "pointing", "iou", "plain", "guided", "difference", "text", "image", "group")
_HEADER = ("metric", "value", "95 % interval", "chance")


def print_results(results: Results) -> None:
    """Prints the results of `evaluate`, one table per task."""
    console = Console(highlight=False)
    for task, values in results.items():
        table = Table(*_HEADER, title=escape(_title(task, values)))
        for row in _rows(values):
            table.add_row(*map(escape, row))
        console.print(table)
        for note in _notes(values):
            console.print(note, markup=False)


def write_page(results: Results, model: str, path: Path) -> None:
    """Writes an HTML page with one section per task."""
    page = Page(
        f"Evaluation of {model}", f"coalign {__version__}; intervals are 95 % bootstrap intervals over the items"
    )
    for task, values in results.items():
        page.section(_title(task, values))
        page.table(_HEADER, list(_rows(values)))
        for note in _notes(values):
            page.text(note)
        per_class = {name: rate for name, rate in values.get("per_class", {}).items() if rate is not None}
        if per_class:
            by_rate = sorted(per_class.items(), key=lambda item: item[1])
            page.table(("class, worst first", "recall"), [(name, percent(rate)) for name, rate in by_rate])
    page.write(path)


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


def _rows(values: Mapping[str, Any]) -> Iterator[Row]:
    chance = values.get("chance")
    for side in ("image_to_text", "text_to_image"):
        for metric, entry in values.get(side, {}).items():
            name = f"R@{metric[1:]}" if metric[1:].isdigit() else metric.replace("_", " ")
            show = _number if metric == "median_rank" else percent
            yield f"{side.replace('_', ' ')} {name}", *_cells(entry, show), show(entry["chance"])
    if "modality_gap" in values:
        yield "modality gap (0 to 2)", f"{values['modality_gap']:.2f}", "", ""
    for metric, entry in values.items():
        if metric in _RATES or metric.startswith(("pointing_", "iou_", "miou")):
            metric_chance = entry.get("chance", chance)
            name = f"mIOU@{metric[4:]}" if metric.startswith("miou") else metric.replace("_", " ")
            yield name, *_cells(entry), "" if metric_chance is None else percent(metric_chance)
    for kind, entry in values.get("by_kind", {}).items():
        yield f"accuracy, {foil_kind(kind)}", *_cells(entry), percent(values["chance"])
    for how, entry in values.get("by_how", {}).items():
        yield f"accuracy, {how} (mean over kinds)", *_cells(entry), percent(values["chance"])
    for metric, entry in values.get("intervals", {}).items():
        metric_chance = entry.get("chance", chance)
        shown_chance = "" if metric_chance is None or metric == "acc5" else percent(metric_chance)
        yield _TITLES.get(metric, metric), *_cells(entry), shown_chance
    for name, entry in values.get("row", {}).items():
        yield f"{name}, {_TITLES[values['metrics'][name]]}", *_cells(entry), ""
    if "average" in values:
        yield "average", *_cells(values["average"]), ""


def _notes(values: Mapping[str, Any]) -> Iterator[str]:
    for reason, count in values.get("unreadable", {}).items():
        yield f"skipped: {count:,} samples ({reason})"
    if values.get("unlabeled"):
        yield f"skipped: {values['unlabeled']:,} samples without one of the classes"
    if values.get("untagged"):
        yield (
            f"skipped: {values['untagged']:,} samples without any of the {values['tags']:,} tags that occur on at least two training "
            "samples"
        )
    if "folds" in values:
        yield f"{values['images']:,} images in {values['folds']} folds"
    if values.get("left_over"):
        yield f"skipped: {values['left_over']:,} samples beyond the last whole fold"
    if values.get("differences"):
        yield f"differs from the papers' data: {'; '.join(values['differences'])}"


def _cells(entry: Mapping[str, float], show: Callable[[float], str] = percent) -> tuple[str, str]:
    """Returns a metric's value and interval as text."""
    return show(entry["value"]), f"{show(entry['low'])} – {show(entry['high'])}"


def _number(value: float) -> str:
    return f"{value:,.4g}"
