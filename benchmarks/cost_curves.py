"""Scaling of the cost per step: time and memory with the batch size, and time with the number of processes.

Batch size: the time per pair and the peak tensor memory of a step, relative to the smallest batch, at once and in micro-batches of 64
(`--micro-batch`). Processes: the time of a step on one process with one thread, over the time with the same global batch on two
processes with one thread each; 2 would be perfect. The model and the batch are those of gradient_caching.py.

For scaling with the dataset size, see data_at_scale.py.

Run: python benchmarks/cost_curves.py [METHOD …] [--largest 1024] [--repeats 3]
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from gradient_caching import INFO, MODEL, SLICE, build, repeated
from lines import line
from memory import TensorPeak
from step_overhead import WORLD, make_batch, timed

from coalign.method import Method
from coalign.training.distributed import World, join_world
from coalign.training.step import forward_backward
from coalign.types import Batch

SMALLEST, SHARED = 64, 256


def step(method: Method, batch: Batch, world: World = WORLD, size: int | None = None) -> None:
    rows = [slice(start, start + size) for start in range(0, len(batch), size)] if size else None
    forward_backward(method, batch, INFO, world, slices=rows)
    method.zero_grad()


def against_batch(name: str, model: str, largest: int, repeats: int) -> None:
    method = build(name, model)
    smallest = make_batch(method.view_plan, SMALLEST)
    sizes = [SMALLEST << power for power in range((largest // SMALLEST).bit_length())]
    batches = {size: repeated(smallest, size) for size in sizes}
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for turn in range(1 + repeats):  # sizes alternate; the first turn is a warm-up
        for size, batch in batches.items():
            seconds = timed(lambda batch=batch: step(method, batch)) / size  # type: ignore[misc]
            if turn:
                times[size].append(seconds)

    def peak(size: int, slices: int | None) -> float:
        with TensorPeak() as tensors:
            step(method, batches[size], size=slices)
        return tensors.peak

    base_peak = peak(SMALLEST, None)
    for size in sizes:
        more = f"tensors × {peak(size, None) / base_peak:.2f}, in micro-batches of {SLICE} × {peak(size, SLICE) / base_peak:.2f}"
        ratios = [seconds / base for seconds, base in zip(times[size], times[SMALLEST])]
        line(f"{name}, time per pair at batch {size:,} over batch {SMALLEST}", ratios, more=more)


def run_rank(rank: int, size: int, port: int, name: str, model: str, repeats: int, out: str) -> None:
    """Runs in its own process: measures the seconds of each step on its share of the batch."""
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    world = join_world("cpu")
    method = build(name, model)
    rows = SHARED // size
    batch = make_batch(method.view_plan, SHARED)[slice(rank * rows, (rank + 1) * rows)]
    seconds = []
    for _ in range(1 + repeats):
        world.barrier()
        start = time.perf_counter()
        step(method, batch, world)
        world.barrier()
        seconds.append(time.perf_counter() - start)
    if rank == 0:
        Path(out).write_text(json.dumps(seconds[1:]))
    if size > 1:
        dist.destroy_process_group()


def against_processes(name: str, model: str, repeats: int) -> None:
    times = []
    for size in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        out = Path(model).with_name(f"{name}-{size}.json")
        multiprocessing.spawn(run_rank, (size, port, name, model, repeats, str(out)), nprocs=size)
        times.append(json.loads(out.read_text()))
    line(f"{name}, time of a step on one process over two", [one / two for one, two in zip(*times)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=["clip", "uniclip"], metavar="METHOD")
    parser.add_argument("--largest", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.json"
        model.write_text(json.dumps(MODEL))
        for name in options.methods:
            against_batch(name, str(model), options.largest, options.repeats)
            against_processes(name, str(model), options.repeats)


if __name__ == "__main__":
    main()
