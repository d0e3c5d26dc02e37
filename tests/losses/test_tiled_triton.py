"""The kernels in Triton's interpreter, compared with PyTorch, and compiled for GPUs, which does not need a GPU."""

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
results = []
weighted = {"BY_ROWS": True, "BY_COLUMNS": True, "OUT": m.MAX_OUT}
for capability in (80, 90):
    for kernel, more, warps in ((m._sums_kernel, {}, 4), (m._weighted_kernel, weighted, 8)):
        constants = sizes | more
        signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
        values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, values)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps})
        results.append({"bytes": len(compiled.asm["cubin"]), "shared": compiled.metadata.shared})
print(json.dumps(results))
"""


def test_kernels_in_the_interpreter():
    cases = Path(__file__).with_name("interpreted_triton.py")
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    # without conftest.py's shape checks around every function, because the interpreter reads the kernels' source
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--noconftest", str(cases)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert result.returncode == 0, result.stdout
    assert "10 passed" in result.stdout


def test_kernels_compile_and_fit_shared_memory(tmp_path):
    """Compiles for A100 and H100. The smallest shared memory of any GPU with TF32 is 99 KB."""
    script = tmp_path / "compile_kernels.py"
    script.write_text(COMPILE)
    result = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    kernels = json.loads(result.stdout)
    assert len(kernels) == 4
    assert all(kernel["bytes"] and kernel["shared"] <= 99 * 1024 for kernel in kernels), kernels


def test_cpu_uses_pytorch(monkeypatch):
    monkeypatch.setenv("COALIGN_TRITON", "1")
    assert tiled._backend(torch.zeros(1)) is tiled
