"""Loader workers: a function of a task number, computed ahead by processes that always end."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from coalign.errors import UserError

T = TypeVar("T")
_DIED = "A loader worker was killed, most likely for lack of memory: use fewer --workers or a smaller --batch-size."


def fetch_all(make: Callable[[int], T], tasks: range, workers: int, ahead: int) -> Generator[T, None, None]:
    """`make(task)` of all tasks, in order. Worker processes are `ahead` tasks, and one each, ahead of the consumer.

    A UserError in a worker is raised here as it is. Closing the iterator ends the workers.
    """
    results = _results(_Tasks(make), tasks, min(workers, len(tasks)), ahead)
    try:
        for result in results:
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise UserError(_DIED) from error
        raise
    finally:
        del results  # ends the workers


class _Tasks(Dataset):
    """`make(task)` as a data set. A UserError is a value: DataLoader would bury its sentence in a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, task: int) -> Any:
        try:
            return self.make(task)
        except UserError as error:
            return error


def _results(dataset: _Tasks, tasks: range, workers: int, ahead: int) -> Iterator[Any]:
    if workers == 0:
        return map(dataset.__getitem__, tasks)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=1 + -(-ahead // workers),
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # else each iterator advances the process's global random state
    )
    return iter(loader)


def _unchanged(value: T) -> T:
    return value


def _start_worker(_: int) -> None:
    """Runs first in every worker; DataLoader has already set one thread."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)  # Ctrl-C and a SIGTERM to the group are for the trainer, which still wants this step's batch
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    """End this process soon after its parent, whatever it is doing; DataLoader's own watch looks only between tasks."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
