"""Logs of a run: metrics, progress display, bad samples, non-finite steps. Also the handler of stop signals."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from coalign.errors import NotFinite, UserError
from coalign.files import write_bytes
from coalign.formatting import duration
from coalign.progress import bars, drawn_elsewhere

_clock = time.monotonic  # tests replace it

# Keys of metrics.jsonl that differ between two equal runs.
TIMINGS = ("seconds", "pairs_per_second", "data_wait")


def open_rows(path: Path, keep: Callable[[int, dict[str, Any]], bool]) -> tuple[FileIO, list[dict[str, Any]]]:
    """Opens a JSON-lines file for appending, after removing torn lines of a killed run and rows for which keep(index, row) is False.

    Returns the file and the kept rows.
    """
    rows: list[dict[str, Any]] = []
    lines: list[bytes] = []
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(row, dict) and keep(len(rows), row):
            rows.append(row)
            lines.append(line)
    write_bytes(path, b"".join(lines))
    return FileIO(path, "a"), rows


def _write_row(file: FileIO, row: Mapping[str, Any]) -> None:
    try:
        file.write(json.dumps(row).encode() + b"\n")  # unbuffered: no row is lost if the process is killed
    except OSError as error:
        raise UserError(
            f"{file.name!s} could not be written ({error.strerror}); free some disk space, then resume."
        ) from error


class RunLog:
    """Writes metrics.jsonl, TensorBoard events if it is installed, and the progress display (a context manager, for rank 0).

    A row of metrics.jsonl has "step", the values, and `TIMINGS`: seconds of training (summed over interruptions), pairs_per_second, and
    data_wait, the fraction of time spent waiting for data. Non-finite values become null. On resume, rows from `start_step` on are
    removed, because those steps run again.

    evals: the validations to come, each of which the ETA expects to take as long as the last one.
    """

    def __init__(
        self,
        run_dir: Path,
        total_steps: int,
        interactive: bool,
        start_step: int = 0,
        row_every: int = 1,
        line_seconds: float = 30.0,
        console: Console | None = None,
        evals: int = 0,
    ) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._file, rows = open_rows(run_dir / "metrics.jsonl", lambda _, row: row.get("step", start_step) < start_step)
        self._total_steps = total_steps
        self._next_step = start_step
        self._row_every = row_every
        self._line_seconds = line_seconds
        self._last_line = -math.inf
        self._began = _clock() - max((row.get("seconds", 0.0) for row in rows), default=0.0)
        self._restart_window()
        self._recent: deque[tuple[float, int]] | None = None  # (seconds, steps) between rows, for the ETA
        self._evals_left, self._eval_seconds = evals, 0.0  # seconds of the last validation
        self._shown: dict[str, str] = {}
        self._console = console or Console()
        self._live: Live | None = None
        self._exit = ExitStack()
        if interactive:
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)
        self._board = _tensorboard(run_dir, start_step)

    def __enter__(self) -> RunLog:
        if self._live is not None:
            self._exit.enter_context(self._live)
            self._exit.enter_context(drawn_elsewhere())  # of a validation
        return self

    def __exit__(self, *exception: object) -> None:
        self._exit.close()
        self.sync()
        self._file.close()
        if self._board is not None:
            self._board.close()

    def step(
        self, step: int, values: Mapping[str, Any], *, pairs: int, wait_seconds: float, bad_samples: int = 0
    ) -> None:
        """Logs a training step.

        values: numbers or scalar tensors, read only if a row is due (reading synchronizes with the GPU). pairs: size of the global
        batch. wait_seconds: time spent waiting for data. bad_samples: total so far.
        """
        self._next_step = step + 1
        self._window_steps += 1
        self._window_pairs += pairs
        self._window_waited += wait_seconds
        last = step + 1 >= self._total_steps
        if step % self._row_every and not last:
            return
        numbers = {name: float(value) for name, value in values.items()}
        now = _clock()
        elapsed = max(now - self._window_began, 1e-9)
        speed = self._window_pairs / elapsed
        wait = min(1.0, self._window_waited / elapsed)
        if self._recent is None:
            self._recent = deque(maxlen=50)  # the first window is not representative: workers start, kernels compile
        else:
            self._recent.append((elapsed, self._window_steps))
        self._restart_window()
        timings = (round(now - self._began, 3), round(speed, 2), round(wait, 4))
        self._write(step, numbers, dict(zip(TIMINGS, timings)))
        shown = _distinct_rates({name: _number(name, value) for name, value in numbers.items()})
        shown |= {"pairs/s": f"{speed:,.4g}", "data wait": f"{wait:.0%}", "bad samples": f"{bad_samples:,}"}
        self._shown = {name: text for name, text in self._shown.items() if not name.startswith("lr/")} | shown
        if self._live is None and (last or now - self._last_line >= self._line_seconds):
            self._last_line = now
            line = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.note(f"{self._position()}  {line}  {self._eta()}")

    def evaluation(self, step: int, values: Mapping[str, Any], seconds: float = 0.0) -> None:
        """Logs validation results as a separate row. Their time, `seconds`, does not count toward pairs per second."""
        self._restart_window()
        self._evals_left, self._eval_seconds = self._evals_left - 1, seconds
        numbers = {name: float(value) for name, value in values.items()}
        self._write(step, numbers, {})
        shown = {name: _number(name, value) for name, value in numbers.items()}
        self._shown |= shown
        self.note(f"{self._position()}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))

    def note(self, text: str) -> None:
        """Prints a line above the progress display."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def sync(self) -> None:
        """Flushes the rows to disk. Call it before saving a checkpoint of their steps."""
        os.fsync(self._file.fileno())

    def _restart_window(self) -> None:
        self._window_began = _clock()
        self._window_steps = self._window_pairs = 0
        self._window_waited = 0.0

    def _write(self, step: int, numbers: Mapping[str, float], timings: Mapping[str, float]) -> None:
        row = {name: value if math.isfinite(value) else None for name, value in numbers.items()} | dict(timings)
        _write_row(self._file, {"step": step, **row})
        if self._board is not None:
            for name, value in row.items():
                if value is not None:
                    self._board.add_scalar(name, value, step)

    def _position(self) -> str:
        return f"step {self._next_step:,}/{self._total_steps:,}"

    def _eta(self) -> str:
        if not self._recent:
            return "ETA -"
        seconds, steps = map(sum, zip(*self._recent))
        training = seconds / steps * max(0, self._total_steps - self._next_step)
        return f"ETA {duration(training + self._eval_seconds * max(0, self._evals_left))}"

    def _render(self) -> Group:
        head = Table.grid(padding=(0, 2))
        bar = ProgressBar(total=max(1, self._total_steps), completed=self._next_step, width=32)
        head.add_row(Text(self._position()), bar, Text(self._eta()))
        body = Table.grid(padding=(0, 1, 0, 2))
        cells = [(Text(name, style="dim"), Text(value)) for name, value in list(self._shown.items())]
        columns = max(1, min(3, self._console.width // 32))
        for first in range(0, len(cells), columns):
            body.add_row(*(text for cell in cells[first : first + columns] for text in cell))
        return Group(head, body, bars())


def _tensorboard(run_dir: Path, start_step: int) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=start_step)


def _number(name: str, value: Any) -> str:
    value = float(value)
    return f"{value:.2e}" if name.split("/")[0] == "lr" else f"{value:.4g}"


def _distinct_rates(shown: Mapping[str, str]) -> dict[str, str]:
    """Returns the values without the learning rates of parts that are printed the same as an earlier one."""
    rates: set[str] = set()
    kept = {}
    for name, text in shown.items():
        if name == "lr" or name.startswith("lr/"):
            if text in rates:
                continue
            rates.add(text)
        kept[name] = text
    return kept


class BadSampleLog:
    """Lists each unusable sample once in bad_samples.jsonl, and enforces the budget for them.

    On resume, `state` is the `state_dict` of the checkpoint. Rows written after it are removed, because their steps run again.
    """

    def __init__(self, run_dir: Path, budget_fraction: float = 0.01, state: Mapping[str, Any] | None = None) -> None:
        self.path = run_dir / "bad_samples.jsonl"
        self.budget_fraction = budget_fraction
        self.counts: Counter[str] = Counter(state["counts"] if state else {})
        run_dir.mkdir(parents=True, exist_ok=True)
        num_kept = self.total
        self._file, rows = open_rows(self.path, lambda index, _: index < num_kept)
        self._keys = {row["key"] for row in rows}

    @property
    def total(self) -> int:
        return self.counts.total()

    def add(self, entries: Iterable[tuple[str, str, str, int]]) -> None:
        """Logs the entries (key, reason, detail, epoch) whose sample is not listed yet."""
        for key, reason, detail, epoch in entries:
            if key not in self._keys:
                self._keys.add(key)
                self.counts[reason] += 1
                _write_row(self._file, {"key": key, "reason": reason, "detail": detail, "epoch": epoch})

    def check(self, samples_seen: int) -> None:
        """Raises UserError if the fraction of bad samples exceeds the budget. samples_seen: distinct samples, good and bad.

        The fraction is taken of at least 1,000 samples: one bad sample among the first ten is not significant.
        """
        if self.total > self.budget_fraction * max(samples_seen, 1000):
            raise UserError(
                f"{self.total:,} of the {samples_seen:,} samples seen so far are unusable ({self.summary()}), more "
                f"than the budget of {100 * self.budget_fraction:.4g} %; they are listed in {self.path}. Clean the "
                "data (see `coalign data check`), or raise --max-bad-fraction."
            )

    def summary(self) -> str:
        """Returns the counts by reason, most common first."""
        return ", ".join(f"{reason}: {count:,}" for reason, count in self.counts.most_common())

    def state_dict(self) -> dict[str, Any]:
        os.fsync(self._file.fileno())
        return {"counts": dict(self.counts)}

    def close(self) -> None:
        self._file.close()


class NonFiniteGuard:
    """Counts steps skipped for a non-finite loss or gradient, and stops the run after `limit` consecutive ones.

    Every rank has a guard, so that all stop together. The guard with a `run_dir` lists the samples in non_finite.jsonl.
    """

    def __init__(
        self, run_dir: Path | None, limit: int = 10, start_step: int = 0, state: Mapping[str, int] | None = None
    ) -> None:
        self.limit = limit
        self.total = state["total"] if state else 0
        self.in_a_row = state["in_a_row"] if state else 0
        self._run_dir = run_dir
        if run_dir is not None and (run_dir / "non_finite.jsonl").exists():
            open_rows(run_dir / "non_finite.jsonl", lambda _, row: row.get("step", start_step) < start_step)[0].close()

    def step(self, step: int, finite: bool, samples: Sequence[int | str] = (), what: str = "loss or gradient") -> None:
        """Records that a step was taken (finite) or skipped. samples: indices of the global batch. Raises NotFinite at the limit."""
        if finite:
            self.in_a_row = 0
            return
        self.total += 1
        self.in_a_row += 1
        if self._run_dir is not None:
            with FileIO(self._run_dir / "non_finite.jsonl", "a") as file:
                _write_row(file, {"step": step, "what": what, "samples": list(samples)})
        if self.in_a_row >= self.limit:
            where = f" (samples in {self._run_dir / 'non_finite.jsonl'})" if self._run_dir is not None else ""
            raise NotFinite(
                f"The {what} was not finite for {self.in_a_row} consecutive steps, most recently step {step}{where}; "
                "lower the learning rate, lengthen the warm-up, or train in fp32 or bf16 instead of fp16."
            )

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total, "in_a_row": self.in_a_row}


class StopSignal:
    """Context in which SIGINT and SIGTERM set `requested`, so that the loop can save and stop. A second Ctrl-C kills the process.

    A launcher may forward the Ctrl-C that the terminal sent to all processes, so signals within a second count as one.
    """

    def __init__(self) -> None:
        self.requested: str | None = None  # the signal's name
        self._since = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # other threads receive no signals
            self._before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested is None:
            self.requested, self._since = signal.Signals(number).name, _clock()
        elif number == signal.SIGINT and _clock() - self._since >= 1.0:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h")  # the display hides the cursor
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
