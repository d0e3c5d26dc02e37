"""What a run gained and lost between its start and its end, on the terminal and on the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from coalign.metric import Metric, difference_text
from coalign.report.page import Page


@dataclass(frozen=True)
class Change:
    """A metric of a task at the start and at the end of a run, and their difference on the same items.

    low, high: its paired 95 % interval. None: the metric has no values by item, or the items are not the same.
    """

    task: str  # TASK:DATA
    start: Metric
    end: Metric
    low: float | None = None
    high: float | None = None

    @property
    def difference(self) -> float:
        return self.end.value - self.start.value

    def verdict(self) -> str:
        """Returns "gained", "lost" or "no significant change"; "" without an interval."""
        if self.low is None or self.high is None:
            return ""
        if self.low <= 0 <= self.high:
            return "no significant change"
        return "gained" if (self.low > 0) != (self.end.kind == "rank") else "lost"

    def interval_text(self) -> str:
        """Returns "−8.0 to −4.1", or "" without an interval."""
        if self.low is None or self.high is None:
            return ""
        return f"{difference_text(self.end.kind, self.low)} to {difference_text(self.end.kind, self.high)}"

    def sentence(self) -> str:
        """Returns a line such as "zeroshot:birds: zero-shot top-1 accuracy 54.2 % → 48.1 %, −6.1 (95 % interval −8.0 to −4.1): lost"."""
        title = f"{self.end.title[:1].lower()}{self.end.title[1:]}"
        line = f"{self.task}: {title} {self.start.text()} → {self.end.text()}, {difference_text(self.end.kind, self.difference)}"
        return f"{line} (95 % interval {self.interval_text()}): {self.verdict()}" if self.low is not None else line

    def to_json(self) -> dict[str, Any]:
        return {"difference": self.difference, "low": self.low, "high": self.high, "verdict": self.verdict()}


def changes_section(page: Page, changes: Sequence[Change], notes: Sequence[str]) -> None:
    """Adds a table of all changes, if there are any."""
    if not changes and not notes:
        return
    page.section(
        "Gained and lost",
        "The tasks of --track, evaluated with the weights at the start of the run and at its end. Differences of rates are in percentage "
        "points; intervals are paired 95 % bootstrap intervals over the same items.",
    )
    rows = [
        (
            each.task,
            each.end.title,
            each.start.text(),
            each.end.text(),
            difference_text(each.end.kind, each.difference),
            each.interval_text(),
            each.verdict(),
        )
        for each in changes
    ]
    page.table(("task", "metric", "start", "end", "difference", "95 % interval", ""), rows)
    for note in notes:
        page.text(note)
