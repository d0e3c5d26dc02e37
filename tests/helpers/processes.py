"""Two processes in one gloo process group."""

import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from coalign.training.distributed import join_world


def on_two_processes(work, folder, *arguments):
    """Runs `work(world, rank folder, *arguments)` on two processes. Returns both results. `work` must be a module-level function."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = [folder / str(rank) for rank in range(2)]
    for rank_folder in folders:
        rank_folder.mkdir()
    multiprocessing.spawn(_process, (port, work, folders, arguments), nprocs=2)
    return [torch.load(rank_folder / "result.pt") for rank_folder in folders]


def _process(rank, port, work, folders, arguments):
    os.environ.update(
        RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    torch.save(work(join_world("cpu"), folders[rank], *arguments), folders[rank] / "result.pt")
    dist.destroy_process_group()
