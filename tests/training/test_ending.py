"""Distributed processes destroy their process group before the interpreter exits: otherwise gloo's threads may abort them."""

import os
import subprocess
import sys

import torch.distributed as dist

# exit handlers run in reverse order of registration
SCRIPT = """
import atexit
import torch.distributed as dist
from coalign.training.distributed import join_world
atexit.register(lambda: print(dist.is_initialized(), flush=True))
assert join_world("cpu").gather_objects("here") == ["here", "here"]
"""


def test_the_process_group_is_destroyed_at_exit():
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # listens on a free port
    environment = {
        **os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": "2",
        "TORCHELASTIC_USE_AGENT_STORE": "True", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    assert [process.communicate(timeout=120)[0] for process in processes] == ["False\n", "False\n"]
    assert [process.returncode for process in processes] == [0, 0]
