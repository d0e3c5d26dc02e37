"""Times the stages of a training step: `timed` marks a stage, and a running `Stopwatch` adds up the time of each."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_running: Stopwatch | None = None


class Stopwatch:
    """Records the seconds spent in each stage of each step, excluding nested stages (a context manager).

    On a GPU it synchronizes at every stage boundary, which slows down a step a little.
    """

    def __init__(self, device: torch.device) -> None:
        self.steps: list[dict[str, float]] = []
        self._device = device
        self._stages: defaultdict[str, float] = defaultdict(float)
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
            self.steps.append(dict(self._stages))
            self._stages.clear()

    def _account(self) -> None:
        """Adds the time since the last boundary to the innermost open stage."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        elif self._device.type == "mps":
            torch.mps.synchronize()
        now = time.perf_counter()
        if self._open:
            self._stages[self._open[-1]] += now - self._since
        self._since = now


@contextmanager
def timed(name: str) -> Iterator[None]:
    """Marks a stage of a step. The outermost stage is the step itself; it gets the time outside all nested stages."""
    if _running is None:
        yield
        return
    _running.enter(name)
    try:
        yield
    finally:
        _running.leave()
