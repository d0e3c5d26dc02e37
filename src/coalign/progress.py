"""Progress of what takes longer than a few seconds, on standard error: bars on a terminal, else a line every half minute.

Operations may be nested and run in several threads; each has its own bar. Only the first process of `torchrun` shows progress.
"""

from __future__ import annotations

import math
import os
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, Group, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from coalign.formatting import duration

T = TypeVar("T")
_BAR_SECONDS = 0.5  # before a bar appears
_FIRST_SECONDS = 3.0  # before the first line
_LINE_SECONDS = 30.0  # between lines
_REFRESH_SECONDS = 0.1  # between changes of a bar
_clock = time.monotonic  # tests replace it


class Task:
    """An operation in progress. `update` shows how far it is."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = self._first = 0
        self._words: str | None = None
        self._began = _clock()
        self._bar: TaskID | None = None
        self._on_terminal = _BARS.visible()
        self._next = self._began + (_BAR_SECONDS if self._on_terminal else _FIRST_SECONDS)
        if os.environ.get("RANK", "0") != "0":
            self._next = math.inf

    def update(self, done: int, total: int | None = None, what: str | None = None, state: str | None = None) -> None:
        """Sets the number of items that are done and, if given, the number of all items and what is being done.

        state: words to show instead of the numbers, such as those of another process on what it does.
        """
        if total is not None and self._total is None:  # the time left is estimated from here
            self._first, self._began = done, _clock()
        self._done, self._total, self._what = done, total or self._total, what or self._what
        self._words = state
        self.show()

    def show(self) -> None:
        """Shows the bar, or prints a line if one is due."""
        now = _clock()
        if now < self._next:
            return
        state = self._state(now)
        if self._on_terminal:
            self._next = now + _REFRESH_SECONDS
            if self._bar is None:
                self._bar = _BARS.add(self._what, self._done, self._total, state)
            else:
                _BARS.update(self._bar, self._what, self._done, self._total, state)
        else:
            self._next = now + _LINE_SECONDS
            line = f"{self._what}: {state}\n" if state else f"{self._what} …\n"
            print(line, end="", file=sys.stderr, flush=True)  # in one piece, as other threads print too

    def end(self) -> None:
        if self._bar is not None:
            _BARS.remove(self._bar)

    def _state(self, now: float) -> str:
        """Returns "1,200 of 5,000 images, 12 s left", as far as that is known."""
        if self._words is not None:
            return self._words
        unit = f" {self._unit}" if self._unit else ""
        if self._total is None:
            return f"{self._done:,}{unit}" if self._done else ""
        count = f"{self._done:,} of {self._total:,}{unit}"
        if not self._first < self._done < self._total:
            return count
        left = (now - self._began) / (self._done - self._first) * (self._total - self._done)
        return f"{count}, {duration(max(0, round(left)))} left"


@contextmanager
def progress(what: str, total: int | None = None, unit: str = "") -> Iterator[Task]:
    """Shows the progress of the block, which calls `update` of the task that it receives.

    what: what is done, such as "Embedding images". total: the number of items; None: not known yet. unit: such as "steps".
    """
    task = Task(what, total, unit)
    try:
        yield task
    finally:
        task.end()


def track(items: Iterable[T], what: str, total: int | None = None, unit: str = "") -> Iterator[T]:
    """Yields the items, and shows how many were processed."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with progress(what, total, unit) as task:
        for done, item in enumerate(items):
            if done:
                task.update(done)
            yield item


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Shows what the block does, if it takes long and cannot tell how far it is."""
    with progress(what) as task:
        timer = threading.Timer(_BAR_SECONDS if _BARS.visible() else _FIRST_SECONDS, task.show)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()


@contextmanager
def drawn_elsewhere() -> Iterator[None]:
    """For a display that draws the bars itself, as `bars()`: a terminal has room for one display at a time."""
    _BARS.hosts += 1
    try:
        yield
    finally:
        _BARS.hosts -= 1


def bars() -> RenderableType:
    """Returns the bars of the operations in progress."""
    return _BARS.drawn()


class _Bars:
    """The bars on the terminal, for all threads of the process. The display is open while there is a bar."""

    def __init__(self) -> None:
        self.hosts = 0
        self._lock = threading.RLock()
        self._display: Progress | None = None
        self._count = 0

    def visible(self) -> bool:
        return self.hosts > 0 or (sys.stderr.isatty() and os.environ.get("TERM") != "dumb")

    def add(self, what: str, done: int, total: int | None, state: str) -> TaskID:
        with self._lock:
            if self._display is None:
                # what is redirected to a file stays there; what is printed to the terminal appears above the bars
                self._display = Progress(
                    TextColumn("{task.description}", markup=False), BarColumn(32), TextColumn("{task.fields[state]}"),
                    console=Console(stderr=True), transient=True, redirect_stdout=sys.stdout.isatty(),
                )  # fmt: skip
                if not self.hosts:
                    self._display.start()
            self._count += 1
            return self._display.add_task(what, total=total, completed=done, state=state)

    def update(self, bar: TaskID, what: str, done: int, total: int | None, state: str) -> None:
        with self._lock:
            if self._display is not None:
                self._display.update(bar, description=what, completed=done, total=total, state=state)

    def remove(self, bar: TaskID) -> None:
        with self._lock:
            if self._display is None:
                return
            self._display.remove_task(bar)
            self._count -= 1
            if not self._count:
                self._display.stop()
                self._display = None

    def drawn(self) -> RenderableType:
        with self._lock:
            return Group() if self._display is None else self._display.get_renderable()


_BARS = _Bars()
