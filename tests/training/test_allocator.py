import ctypes
import subprocess
import sys

import pytest

PROGRAM = """
import resource
import torch
from coalign.training.allocator import keep_freed_memory
if {keep}:
    keep_freed_memory()
for i in range(30):
    if i == 15:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(16_000_000)  # 64 MB, freed at once
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="needs glibc")
def test_reused_memory_causes_no_page_faults():
    faults = [
        int(subprocess.run([sys.executable, "-c", PROGRAM.format(keep=keep)], capture_output=True, check=True).stdout)
        for keep in (False, True)
    ]
    assert faults[0] > 10 * (faults[1] + 1)
