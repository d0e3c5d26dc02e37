"""What `evaluate` found, for people: tables on the terminal, and a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coalign import __version__
from coalign.errors import UserError
from coalign.report.page import Page
from coalign.run.model import check_output, write_file

Results = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str, str, str]  # what, value, interval, chance

_PAST = {"replace": "replaced", "swap": "swapped", "add": "added"}
_NAMED = {
    **{f"{what}_ap{at}": f"{what} AP{at}" for what in ("box", "mask") for at in ("", "50", "75")},
    "acc1": "top-1",
    "acc5": "top-5",
    "mean_per_class_recall": "mean per class",
}
_PLAIN = ("accuracy", "pointing", "iou", "plain", "guided", "difference", "text", "image", "group")
_HEADER = ("metric", "value", "95 % interval", "chance")


def print_results(results: Results) -> None:
    """The figures of `evaluate`, a table a task."""
    console = Console(highlight=False)
    for task, values in results.items():
        table = Table(*_HEADER, title=escape(_title(task, values)))
        for row in _rows(values):
            table.add_row(*map(escape, row))
        console.print(table)
        for note in _notes(values):
            console.print(note, markup=False)


def write_page(results: Results, model: str, path: Path) -> None:
    """One HTML page with a section a task."""
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
            page.table(("class, the worst first", "found"), [(name, _percent(rate)) for name, rate in by_rate])
    page.write(path)


def write_json(results: Mapping[str, Any], path: Path) -> None:
    check_output(path)
    text = json.dumps(results, indent=2, default=str) + "\n"
    try:
        if path.exists() and not path.is_file():  # such as /dev/stdout
            path.write_text(text)
        else:
            write_file(path, lambda temporary: temporary.write_text(text))
    except OSError as error:
        raise UserError(f"The results could not be written to {path}: {error.strerror}.") from error


def _title(task: str, values: Mapping[str, Any]) -> str:
    return f"{task}, {values['split']} ({values['samples']:,} samples)" if "split" in values else task


def _rows(values: Mapping[str, Any]) -> Iterator[Row]:
    chance = values.get("chance")
    for side in ("image_to_text", "text_to_image"):
        for metric, entry in values.get(side, {}).items():
            name = f"R@{metric[1:]}" if metric[1:].isdigit() else metric.replace("_", " ")
            shown = _number if metric == "median_rank" else _percent
            yield f"{side.replace('_', ' ')} {name}", *_cells(entry, shown), shown(entry["chance"])
    if "modality_gap" in values:
        yield "modality gap (0 to 2)", f"{values['modality_gap']:.2f}", "", ""
    for metric, entry in values.items():
        if metric in _PLAIN or metric.startswith(("pointing_", "iou_", "miou")):
            own = entry.get("chance", chance)
            name = f"mIOU@{metric[4:]}" if metric.startswith("miou") else metric.replace("_", " ")
            yield name, *_cells(entry), "" if own is None else _percent(own)
    for kind, entry in values.get("by_kind", {}).items():
        yield f"accuracy, {kind.replace('_', ' ')}", *_cells(entry), _percent(values["chance"])
    for how, entry in values.get("by_how", {}).items():
        yield f"mean of what was {_PAST[how]}", *_cells(entry), _percent(values["chance"])
    for metric, entry in values.get("intervals", {}).items():
        own = entry.get("chance", chance)
        of_chance = "" if own is None or metric == "acc5" else _percent(own)
        yield _NAMED.get(metric, metric), *_cells(entry), of_chance
    for name, entry in values.get("row", {}).items():
        yield f"{name}, {_NAMED[values['metrics'][name]]}", *_cells(entry), ""
    if "average" in values:
        yield "average", *_cells(values["average"]), ""


def _notes(values: Mapping[str, Any]) -> Iterator[str]:
    for reason, count in values.get("unreadable", {}).items():
        yield f"left out: {count:,} samples ({reason})"
    if values.get("unlabelled"):
        yield f"left out: {values['unlabelled']:,} samples of none of the classes"
    if values.get("untagged"):
        yield f"left out: {values['untagged']:,} samples with none of the {values['tags']:,} tags that two training samples have"
    if "folds" in values:
        yield f"{values['images']:,} images in {values['folds']} folds"
    if values.get("left_over"):
        yield f"left out: {values['left_over']:,} samples that made no whole fold"
    if values.get("differences"):
        yield f"not the papers' data: {'; '.join(values['differences'])}"


def _cells(entry: Mapping[str, float], shown: Any = None) -> tuple[str, str]:
    """A figure and its interval."""
    shown = shown or _percent
    return shown(entry["value"]), f"{shown(entry['low'])} – {shown(entry['high'])}"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _number(value: float) -> str:
    return f"{value:,.4g}"
