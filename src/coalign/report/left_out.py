"""The part of a page that lists what opening the data left out, and what lies unread beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from coalign.report.page import Page

MAX_PLACES = 200  # rows of the table of places


@dataclass
class LeftOutTable:
    """What opening the data found, but has in none of its samples."""

    counts: Mapping[str, int] = field(default_factory=dict)  # images, rows or archive members by reason
    places: Sequence[tuple[str, str]] = ()  # file or row, and reason
    unread: Sequence[str] = ()  # what looks like data


def left_out_sections(page: Page, table: LeftOutTable) -> None:
    """Adds a section on what is left out, and one on what is not read, if there is any."""
    if table.counts or table.places:
        page.section("Left out", "Found while opening the data, but in none of its samples.")
        if table.counts:
            page.table(["reason", "images or rows"], list(table.counts.items()))
        page.table(["where", "why"], table.places[:MAX_PLACES])
    if table.unread:
        page.section("Not read", "Lies beside the data and looks like data, but is not read.")
        page.table(["what"], [[each] for each in table.unread])
