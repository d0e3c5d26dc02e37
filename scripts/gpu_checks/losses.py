"""Tiled losses: the Triton kernels compared with PyTorch, and MP-NCE at the scale that MCD and UniCLIP need."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tiled_losses
import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.losses import tiled
from gpu_checks.harness import NEEDS_CUDA, Check, Machine, Row, measured, relative_error

DIRECTIONS = ("rows", "both", "within")
ERROR = 2e-5  # of float32, as in the tests in Triton's interpreter


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Context in which the tiled losses use `tiled_triton` or, for `tiled`, PyTorch."""
    module, original = importlib.import_module(f"coalign.losses.{name}"), tiled._backend
    tiled._backend = lambda tensor: module
    try:
        yield
    finally:
        tiled._backend = original


def can_run_triton(machine: Machine) -> bool:
    """Whether the kernels run: on a GPU, or on a CPU in Triton's interpreter (TRITON_INTERPRET=1)."""
    if machine.is_cuda:
        return True
    try:
        import triton
    except ImportError:
        return False
    return bool(triton.knobs.runtime.interpret) if hasattr(triton, "knobs") else False


def triton_kernels(machine: Machine) -> list[Row]:
    if not can_run_triton(machine):
        return [Row("", status=NEEDS_CUDA)]
    num_rows, num_columns, dim = (40, 70, 24) if machine.toy else (4096, 8192, 512)
    rows = []
    for direction in DIRECTIONS:
        run = _sums(direction, num_rows, num_columns, dim, machine)
        with backend("tiled"):
            exact = run(torch.float64)
            plain = run(torch.float32)
        with backend("tiled_triton"):
            ours = run(torch.float32)
        for label, values in (("Triton", ours), ("PyTorch", plain)):
            for what in ("values", "gradients"):
                error = relative_error(
                    *({k: v for k, v in x.items() if (k == "sums") == (what == "values")} for x in (values, exact))
                )
                rows.append(measured(f"{direction}, {label}: {what}, relative error", error, at_most=ERROR))
        del exact, plain, ours
        if machine.is_cuda:  # the interpreter's speed says nothing
            rows += _compare_speed(direction, lambda: run(torch.float32), machine)  # noqa: B023
    return rows


def _sums(
    direction: str, num_rows: int, num_columns: int, dim: int, machine: Machine
) -> Callable[[torch.dtype], dict[str, Tensor]]:
    """Returns a function of the dtype that computes the sums of a direction, and their gradients for given ones."""
    torch.manual_seed(0)
    first, second = (F.normalize(torch.randn(n, dim), dim=-1).to(machine.device) for n in (num_rows, num_columns))
    labels = [torch.randint(0, n, (n, 2), device=machine.device) for n in (num_rows, num_columns)]
    upstream = torch.randn(num_rows + num_columns, device=machine.device)

    def run(dtype: torch.dtype) -> dict[str, Tensor]:
        q, k, scale = (
            x.to(dtype).requires_grad_() for x in (first, second, torch.tensor([30.0], device=machine.device))
        )
        leaves = {"queries": q, "keys": k, "scale": scale}
        if direction == "rows":
            sums = tiled.negatives_logsumexp(q, k, scale, *labels)
        elif direction == "both":
            sums = torch.cat(tiled.negatives_logsumexp_both_ways(q, k, scale, *labels))
        else:
            sums = tiled.negatives_logsumexp_within(q, scale, labels[0])
            leaves.pop("keys")
        gradients = torch.autograd.grad(sums, list(leaves.values()), upstream[: len(sums)].to(dtype))
        return {"sums": sums.detach(), **dict(zip(leaves, gradients))}

    return run


def _compare_speed(what: str, run: Callable[[], object], machine: Machine) -> list[Row]:
    """Returns time and memory of PyTorch over those of Triton."""
    seconds, peaks = {}, {}
    for name in ("tiled", "tiled_triton"):
        with backend(name):
            seconds[name], peaks[name] = machine.seconds(run), machine.peak_gb(run)
    return [
        measured(f"{what}: time of PyTorch over Triton", seconds["tiled"] / seconds["tiled_triton"]),
        measured(f"{what}: memory of PyTorch over Triton", peaks["tiled"] / peaks["tiled_triton"]),
    ]


def mp_nce(machine: Machine) -> list[Row]:
    """MP-NCE of 8,192 pairs in 4 views: values compared with the dense version on fewer pairs, time and memory."""
    small, full = (16, 32) if machine.toy else (1024, 8192)
    values = tiled_losses.inputs(small, machine.device)
    losses = {name: getattr(tiled_losses, name)(values) for name in ("ours", "dense")}
    gradients = {name: dict(zip("abc", torch.autograd.grad(loss, values))) for name, loss in losses.items()}
    rows = [
        measured(
            "loss, relative difference from dense", abs(float(losses["ours"] / losses["dense"]) - 1), at_most=1e-5
        ),
        measured("gradient, relative difference from dense", relative_error(*gradients.values()), at_most=1e-4),
    ]
    del values, losses, gradients
    values = tiled_losses.inputs(full, machine.device)

    def run() -> None:
        tiled_losses.step(tiled_losses.ours, values)

    size = f"{full:,} pairs × 4 views"
    rows.append(measured(f"{size}, step", machine.seconds(run, repeats=3, warmup=1), "s"))
    rows.append(
        measured(f"{size}, peak memory", machine.peak_gb(run), "GB", at_most=machine.limit(tiled_losses.SCALE_GB))
    )
    return rows + (_compare_speed(size, run, machine) if machine.is_cuda else [])


CHECKS = [Check("Triton kernels", triton_kernels, 40), Check("MP-NCE", mp_nce, 40)]
