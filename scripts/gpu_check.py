"""Checks that coalign works on a GPU, and measures how fast: values against the CPU, kernels, memory, speed.

Each check is independent: one that fails or runs out of memory is a row that says so, and the others go on. The checks run in a worker
process, which is started again if one of them ends it (a crash, or a CUDA error, after which a process cannot use the GPU). A check that
would not fit in the remaining time is skipped. The exit status is 1 if a check fails.

Without a GPU, or with --toy, the same code runs at toy size.

Run: python scripts/gpu_check.py [CHECK …] [--minutes 8] [--out results/gpu.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from gpu_checks import losses, speed, steps
from gpu_checks.harness import FAILED, NO_MEMORY, SKIPPED, Check, Machine, Row, run_check
from rich.console import Console
from rich.table import Table

from coalign.version import __version__

ROOT = Path(__file__).parents[1]
CHECKS = {
    check.name: check for check in (*steps.CHECKS, *losses.CHECKS, *speed.CHECKS, steps.COMPILED)
}  # the slowest to start last
CUDA_BROKEN = 3  # exit status of a worker that cannot use the GPU any more
GRACE = 30  # seconds beyond the time limit after which a worker is killed


def work(names: list[str], machine: Machine, deadline: float, rows_file: Path) -> None:
    """Runs checks in this process, and appends the rows of each to a file."""
    for name in names:
        for row in rows_of(CHECKS[name], machine, deadline):
            print(f"{row.check}: {row.what or row.detail or 'all'}: {shown(row.value)} {row.status}", flush=True)
            with rows_file.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
        with rows_file.open("a") as file:
            file.write(json.dumps({"finished": name}) + "\n")
        machine.free()
        try:
            machine.synchronize()
        except RuntimeError:
            sys.exit(CUDA_BROKEN)


def rows_of(check: Check, machine: Machine, deadline: float) -> list[Row]:
    if not machine.toy and deadline - time.monotonic() < check.seconds:
        return [Row(check.name, status=SKIPPED)]
    return run_check(check, machine)


def run(names: list[str], toy: bool, minutes: float) -> list[Row]:
    """Runs checks in worker processes. Returns their rows."""
    deadline, rows = time.monotonic() + 60 * minutes, []
    # on a CPU, the kernels run in Triton's interpreter, which must be enabled before Triton is imported
    environment = os.environ | ({} if torch.cuda.is_available() and not toy else {"TRITON_INTERPRET": "1"})
    while names:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            path.touch()
            command = [sys.executable, __file__, *names, "--worker", str(path), "--deadline", str(deadline)]
            process = subprocess.Popen([*command, *(["--toy"] if toy else [])], env=environment)
            try:
                status = process.wait(max(0.0, deadline - time.monotonic()) + GRACE)
                ended = f"the process ended with status {status}"
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                status, ended = 1, "ran past the time limit"
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        finished = [line["finished"] for line in lines if "finished" in line]
        names = [name for name in names if name not in finished]
        rows += [Row(**line) for line in lines if line.get("check") in finished]
        if names and status != CUDA_BROKEN:  # the first unfinished check ended the process
            rows.append(Row(names.pop(0), status=FAILED, detail=ended))
    return rows


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def print_table(rows: list[Row], title: str) -> None:
    table = Table("check", "measurement", "value", "limit", "", title=title, title_justify="left")
    last = ""
    for row in rows:
        name, last = ("" if row.check == last else row.check), row.check
        table.add_row(name, row.what or row.detail, f"{shown(row.value)} {row.unit}".strip(), row.limit, row.status)
    Console().print(table)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", default=list(CHECKS), metavar="CHECK")
    parser.add_argument("--toy", action="store_true", help="run on the CPU at toy size (default without a GPU)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time limit")
    parser.add_argument("--out", type=Path, help="JSON file of the rows (default on a GPU: results/gpu.json)")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.checks if name not in CHECKS]:
        parser.error(f"unknown check {unknown[0]!r}; available checks: {', '.join(CHECKS)}")
    toy = options.toy or not torch.cuda.is_available()
    machine = Machine(torch.device("cpu") if toy else torch.device("cuda", 0), toy)
    if options.worker:
        work(options.checks, machine, options.deadline, options.worker)
        return 0
    start = time.monotonic()
    rows = run(options.checks, toy, options.minutes)
    device = "CPU, toy size" if toy else torch.cuda.get_device_name()
    print_table(rows, f"{device}, {(time.monotonic() - start) / 60:.1f} minutes")
    out = options.out or (None if toy else ROOT / "results" / "gpu.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        machine_facts = {"device": device, "torch": torch.__version__, "cuda": torch.version.cuda}
        text = json.dumps({"version": __version__, **machine_facts, "rows": [asdict(row) for row in rows]}, indent=1)
        out.write_text(text + "\n")
    return int(any(row.status in (FAILED, NO_MEMORY) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
