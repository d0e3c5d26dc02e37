"""Where a step's time goes: the parts of a step name themselves, and a stopwatch, if one is running, adds them up."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_running: Stopwatch | None = None


class Stopwatch:
    """Seconds of each part of each step, without those of parts within it (a context manager). On a GPU every part waits for its end,
    which slows a step down a little."""

    def __init__(self, device: torch.device) -> None:
        self.steps: list[dict[str, float]] = []
        self._device = device
        self._parts: defaultdict[str, float] = defaultdict(float)
        self._open: list[str] = []
        self._since = 0.0

    def __enter__(self) -> Stopwatch:
        global _running
        _running = self
        return self

    def __exit__(self, *_: object) -> None:
        global _running
        _running = None

    def enter(self, name: str) -> None:
        self._account()
        self._open.append(name)

    def leave(self) -> None:
        self._account()
        self._open.pop()
        if not self._open:
            self.steps.append(dict(self._parts))
            self._parts.clear()

    def _account(self) -> None:
        """Gives the time since the last change to the part that was the innermost."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._open:
            self._parts[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def part(name: str) -> Iterator[None]:
    """A part of a step; the outermost is the step itself, and takes what is in none of the others."""
    if _running is None:
        yield
        return
    _running.enter(name)
    try:
        yield
    finally:
        _running.leave()
