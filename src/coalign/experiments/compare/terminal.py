"""The tables of `coalign compare` on the terminal."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coalign.formatting import duration
from coalign.metric import value_text
from coalign.report import compare_page
from coalign.report.compare_page import Comparison
from coalign.runs.folder import WITHOUT_LOOK_ALIKES


def print_comparison(comparison: Comparison, console: Console | None = None) -> None:
    """Prints a comparison as tables for a terminal of 100 columns."""
    console = console or Console(highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, 100)
    groups = comparison.groups
    several = any(len(group.runs) > 1 for group in groups)
    table = _plain_table(
        "run", "method", compare_page.seed_column(groups), "parameters", "steps", "samples seen", "training time"
    )
    for group in groups:
        numbers = (f"{round(number):,}" for number in (group.parameters, group.steps, group.samples_seen))
        seeds = ", ".join(map(str, group.seeds))
        table.add_row(escape(group.name), group.method, seeds, *numbers, duration(group.seconds))
    console.print(table)
    common, own = compare_page.differing(groups)
    if common:
        table = _plain_table("setting", *(escape(group.name) for group in groups))
        for name in common:
            words = (escape(compare_page.setting_text(group.settings, name)) for group in groups)
            table.add_row(compare_page.setting_name(name), *words)
        console.print(table)
    if own:
        differ = "setting also differs" if len(own) == 1 else "settings also differ"
        console.print(f"{len(own):,} method-specific {differ}; the page of --report has a list.")
    columns = ["", "value", "over items", *(["over seeds"] if several else [])]
    columns += ["difference", "over items", *(["over seeds"] if several else [])] if len(groups) > 1 else []
    table = _plain_table(*columns)
    names = [name for name in groups[0].metrics if not name.partition(".")[0].endswith(WITHOUT_LOOK_ALIKES)]
    for name in names:
        metric = groups[0].metrics[name]
        chance = None if metric.chance is None else f"[dim]{value_text(metric.kind, metric.chance)}[/dim]"
        heading = f"[bold]{escape(metric.title)}[/bold]"
        table.add_row(heading, chance, "[dim]chance[/dim]" if chance else None)
        for group in groups:
            table.add_row(
                *(
                    escape(cell or "")
                    for cell in compare_page.metric_cells(group, name, several, len(groups) > 1, False)
                )
            )
    console.print(table)
    what = "over items: 95 % bootstrap interval over the held-out items"
    what += "; over seeds: 95 % t-interval over the runs" if several else ""
    what += f"; differences are from {groups[0].name} on the same items" if len(groups) > 1 else ""
    console.print(f"{what}.", markup=False)
    if len(names) < len(groups[0].metrics):
        console.print("The page of --report also compares without held-out items that look like training images.")


def _plain_table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, header_style="dim")
    for position, column in enumerate(columns):
        table.add_column(column, overflow="fold", justify="left" if position == 0 else "right")
    return table
