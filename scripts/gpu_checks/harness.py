"""What a check is, and how it measures: time, memory, and the difference of two steps."""

from __future__ import annotations

import gc
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from memory import TensorPeak
from torch import Tensor

OK, FAILED, NO_MEMORY, SKIPPED, NEEDS_CUDA = "ok", "FAILED", "OUT OF MEMORY", "skipped (time)", "needs CUDA"


@dataclass
class Row:
    """A measurement of a check, or why there is none."""

    check: str
    what: str = ""
    value: float | None = None
    unit: str = ""
    limit: str = ""  # such as "at most 24"; "": stated only
    status: str = OK
    detail: str = ""


class Failed(Exception):
    """A check found something wrong that is not a number over its limit."""


def measured(
    what: str, value: float, unit: str = "", *, at_most: float | None = None, at_least: float | None = None
) -> Row:
    """Returns a row that fails if the value is beyond its limit, or NaN."""
    holds = (at_most is None or value <= at_most) and (at_least is None or value >= at_least) and value == value
    limit = f"at most {at_most:g}" if at_most is not None else f"at least {at_least:g}" if at_least is not None else ""
    return Row("", what, float(value), unit, limit, OK if holds else FAILED)


@dataclass(frozen=True)
class Machine:
    """The device to check. A toy machine runs the same code at toy size, and states speed without a limit."""

    device: torch.device
    toy: bool

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def limit(self, value: float) -> float | None:
        """Returns a limit of speed or memory, which holds at full size only."""
        return None if self.toy else value

    def seconds(self, work: Callable[[], Any], repeats: int = 5, warmup: int = 2) -> float:
        """Returns the median time of `work`."""
        for _ in range(1 if self.toy else warmup):
            work()
        times = []
        for _ in range(1 if self.toy else repeats):
            self.synchronize()
            start = time.perf_counter()
            work()
            self.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_gb(self, work: Callable[[], Any], reserved: bool = False) -> float:
        """Returns the peak memory while `work` runs: on a GPU of all tensors, or all that the allocator holds; on a CPU of new tensors."""
        if not self.is_cuda:
            with TensorPeak() as memory:
                work()
            return memory.peak
        self.free()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        peak = torch.cuda.max_memory_reserved if reserved else torch.cuda.max_memory_allocated
        return peak(self.device) / 2**30

    def free(self) -> None:
        """Returns unused memory to the device."""
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Check:
    """A check, with its time on a GPU in seconds, by which it is skipped if too little is left."""

    name: str
    run: Callable[[Machine], list[Row]]
    seconds: float
    needs_cuda: bool = False


def run_check(check: Check, machine: Machine) -> list[Row]:
    """Returns the rows of a check. Exceptions become a row."""
    if check.needs_cuda and not machine.is_cuda:
        return [Row(check.name, status=NEEDS_CUDA)]
    # convolutions may use TF32 by default, but float32 is compared with float64
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    try:
        rows = check.run(machine)
        machine.synchronize()
    except torch.OutOfMemoryError as error:
        rows = [Row("", status=NO_MEMORY, detail=first_line(error))]
        traceback.clear_frames(error.__traceback__)
    except Exception as error:
        rows = [Row("", status=FAILED, detail=f"{type(error).__name__}: {first_line(error)}")]
        traceback.print_exception(error)
        traceback.clear_frames(error.__traceback__)
    for row in rows:
        row.check = check.name
    return rows


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0][:200]


def relative_error(values: Mapping[str, Tensor], reference: Mapping[str, Tensor]) -> float:
    """Returns the norm of the difference of all tensors over the norm of the reference. Raises Failed if a tensor is missing."""
    if values.keys() != reference.keys():
        raise Failed(f"only one of both has {', '.join(sorted(values.keys() ^ reference.keys()))}")
    errors = [
        (values[name].detach().cpu().double() - each.detach().cpu().double()).norm() for name, each in reference.items()
    ]
    norms = [each.detach().cpu().double().norm() for each in reference.values()]
    return float(torch.stack(errors).norm() / torch.stack(norms).norm().clamp(min=1e-30))
