"""Progress of long work: a bar on a terminal, else a line every half minute, both with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coalign.formatting import duration

_LINE_SECONDS = 30.0
_clock = time.monotonic  # tests replace it


@contextmanager
def show_progress(console: Console | None, description: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields a function that takes how much of `total` is done. Without a console, it shows nothing."""
    if console is None:
        yield lambda done: None
    elif console.is_terminal:
        columns = TextColumn("{task.description}"), BarColumn(32), MofNCompleteColumn(), TimeRemainingColumn()
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(description, total=total)
            yield lambda done: bar.update(task, completed=done)
    else:
        yield _Lines(console, description, total)


class _Lines:
    def __init__(self, console: Console, description: str, total: int) -> None:
        self._console, self._description, self._total = console, description, total
        self._began = self._last = _clock()

    def __call__(self, done: int) -> None:
        now = _clock()
        if done and now - self._last >= _LINE_SECONDS:
            self._last = now
            left = (now - self._began) / done * (self._total - done)
            self._console.print(f"{self._description}: {done:,}/{self._total:,}  ETA {duration(left)}")
