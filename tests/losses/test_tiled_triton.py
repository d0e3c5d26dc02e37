"""The kernels in Triton's interpreter, against the same sums in PyTorch; and compiled, which needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from coalign.losses import tiled

pytest.importorskip("triton")
COMPILE = """
import json, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from coalign.losses import tiled_triton as m

floats = ("queries", "keys", "scale", "row_sums", "row_gradient", "column_sums", "column_gradient", "result", "sums")
types = dict.fromkeys(floats, "*fp32") | {"row_labels": "*i32", "column_labels": "*i32"}
types |= dict.fromkeys(["num_rows", "num_columns", "dim"], "i32")
sizes = {"LABELS": 2, "ROWS": m.ROWS, "COLUMNS": m.COLUMNS, "CHUNK": m.CHUNK, "PRECISION": "tf32x3"}
found = []
weighted = {"BY_ROWS": True, "BY_COLUMNS": True, "OUT": m.MAX_OUT}
for capability in (80, 90):
    for kernel, more, warps in ((m._sums_kernel, {}, 4), (m._weighted_kernel, weighted, 8)):
        constants = sizes | more
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        found.append({"bytes": len(compiled.asm["cubin"]), "shared": compiled.metadata.shared})
print(json.dumps(found))
"""


def test_in_the_interpreter():
    cases = Path(__file__).with_name("interpreted_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # without the checks of shapes that conftest.py puts around every function: the interpreter reads a kernel's source
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", str(cases)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout
    assert "10 passed" in result.stdout


def test_they_compile_within_what_a_gpu_has(tmp_path):
    """For an A100 and an H100, without either; the least shared memory of a processor that has TF32 is 99 KB."""
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert len(found) == 4
    assert all(kernel["bytes"] and kernel["shared"] <= 99 * 1024 for kernel in found), found


def test_a_cpu_keeps_to_pytorch(monkeypatch):
    monkeypatch.setenv("COALIGN_TRITON", "1")
    assert tiled._made_by(torch.zeros(1)) is tiled
