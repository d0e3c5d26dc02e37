"""Progress of computing features: a bar on a terminal, else a line every half minute."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from coalign.data.loading.feature_file import MISSING, FeatureFile
from coalign.formatting import duration

_LINE_SECONDS = 30.0
_clock = time.monotonic  # tests replace it


class FeatureProgress:
    """Shows how many rows of a file are complete, over all processes."""

    def __init__(self, console: Console, interactive: bool, prints: bool) -> None:
        self._console, self._interactive, self._prints = console, interactive, prints

    @contextmanager
    def show(self, name: str, file: FeatureFile) -> Iterator[None]:
        self._name, self._file, self._first = name, file, self._done(file)
        self._began = self._last_line = _clock()
        if not (self._prints and self._interactive):
            self._bar = None
            yield
            return
        columns = (
            TextColumn("features of {task.description}"),
            BarColumn(32),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as self._bar:
            self._task = self._bar.add_task(name, total=file.rows, completed=self._first)
            yield

    def update(self) -> None:
        """Shows the state of the file."""
        if not self._prints:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done(self._file))
        elif _clock() - self._last_line >= _LINE_SECONDS:
            self._last_line, done = _clock(), self._done(self._file)
            left = (_clock() - self._began) / max(1, done - self._first) * (self._file.rows - done)
            self._console.print(f"features of {self._name}: {done:,}/{self._file.rows:,}  ETA {duration(left)}")

    @staticmethod
    def _done(file: FeatureFile) -> int:
        return int(np.count_nonzero(file.state != MISSING))
