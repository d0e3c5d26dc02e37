"""The GPU check at toy size on the CPU: every check passes, finds a planted error, and does not stop the others."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
FAKE_WORKER = """
import json, os, sys
from pathlib import Path
names, rows = sys.argv[1 : sys.argv.index("--worker")], Path(sys.argv[sys.argv.index("--worker") + 1])
for name in names:
    if name == "MP-NCE":
        os.abort()
    row = json.dumps({"check": name, "what": "value", "value": 1.0})
    with rows.open("a") as file:
        file.write(row + "\\n" + json.dumps({"finished": name}) + "\\n")
    if name == "fp16 scaler":
        sys.exit(3)
"""


@pytest.fixture
def gpu_check(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(ROOT / "scripts"), *sys.path])  # `gpu_checks` also appends to it
    import gpu_check

    return gpu_check


@pytest.fixture
def machine(gpu_check):
    return gpu_check.Machine(torch.device("cpu"), toy=True)


@pytest.mark.slow
def test_all_checks_pass_at_toy_size(tmp_path, gpu_check):
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "scripts" / "gpu_check.py"), "--toy", "--out", str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = json.loads(out.read_text())["rows"]
    assert {row["check"] for row in rows} == set(gpu_check.CHECKS)
    assert {row["status"] for row in rows} == {"ok"}, [row for row in rows if row["status"] != "ok"]
    assert sum(row["limit"] != "" for row in rows) > 60
    assert not (ROOT / "results" / "gpu.json").exists(), "commit only what a GPU has measured"


def failed(rows):
    return [row.what for row in rows if row.status == "FAILED"]


def test_a_wrong_gradient_fails_its_row_only(monkeypatch, gpu_check, machine):
    from gpu_checks import steps

    assert not failed(gpu_check.run_check(gpu_check.CHECKS["step of clip"], machine))
    right = steps.step

    def wrong(method, batch, device, *, dtype=torch.float32, **options):
        loss, gradients, state = right(method, batch, device, dtype=dtype, **options)
        if dtype == torch.float32:
            gradients["text.projection.weight"] *= 1.01
        return loss, gradients, state

    monkeypatch.setattr(steps, "step", wrong)
    rows = gpu_check.run_check(gpu_check.CHECKS["step of clip"], machine)
    assert failed(rows) == [f"{model}, float32: gradient, relative error" for model in ("Transformer", "ResNet")]


def test_failures_and_lack_of_memory_become_rows(gpu_check, machine):
    def run(error):
        def fail(machine):
            raise error

        (row,) = gpu_check.run_check(replace(gpu_check.CHECKS["MP-NCE"], run=fail), machine)
        return row.check, row.status, row.detail

    assert run(ValueError("shapes differ\nat …")) == ("MP-NCE", "FAILED", "ValueError: shapes differ")
    assert run(torch.OutOfMemoryError("CUDA out of memory.")) == ("MP-NCE", "OUT OF MEMORY", "CUDA out of memory.")
    needs_cuda = replace(gpu_check.CHECKS["MP-NCE"], needs_cuda=True)
    assert [row.status for row in gpu_check.run_check(needs_cuda, machine)] == ["needs CUDA"]


def test_values_beyond_their_limit_fail(gpu_check):
    from gpu_checks.harness import measured

    statuses = [
        measured("", value, at_most=most, at_least=least).status
        for value, most, least in ((1, 1, None), (2, 1, None), (2, None, 3), (float("nan"), 1, None), (5, None, None))
    ]
    assert statuses == ["ok", "FAILED", "FAILED", "FAILED", "ok"]


def test_a_check_that_does_not_fit_is_skipped(gpu_check, machine):
    check = gpu_check.CHECKS["MP-NCE"]
    rows = gpu_check.rows_of(check, replace(machine, toy=False), time.monotonic() + check.seconds - 1)
    assert [row.status for row in rows] == ["skipped (time)"]


def test_a_crash_costs_one_check(monkeypatch, tmp_path, gpu_check):
    """A worker that dies, or that cannot use the GPU any more, is started again for the other checks."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE_WORKER)
    monkeypatch.setattr(gpu_check, "__file__", str(worker))
    names = ["step of clip", "fp16 scaler", "MP-NCE", "Triton kernels"]
    rows = gpu_check.run(names, toy=True, minutes=1)
    assert [(row.check, row.status) for row in rows] == [(n, "FAILED" if n == "MP-NCE" else "ok") for n in names]
