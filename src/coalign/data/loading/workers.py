"""Loader workers: processes, or a thread, that compute a function of the task number ahead of time and reliably terminate."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from coalign.errors import UserError

T = TypeVar("T")
_WORKER_KILLED = (
    "A loader worker was killed, most likely because memory ran out; use fewer --workers or a smaller --batch-size."
)


def fetch_all(make: Callable[[int], T], tasks: range, workers: int, ahead: int) -> Generator[T, None, None]:
    """Yields `make(task)` for all tasks, in order.

    Workers are processes, which run ahead of the consumer by about `ahead` tasks in total, plus one each. With 0 workers, a thread of this
    process runs ahead by `ahead` tasks, at least one. A UserError is re-raised unchanged. Closing the generator terminates the workers.
    """
    if workers == 0:
        yield from _in_thread(make, tasks, max(1, ahead))
        return
    results = _results(_Tasks(make), tasks, min(workers, len(tasks)), ahead)
    try:
        for result in results:
            if isinstance(result, UserError):
                raise result
            yield result
    except RuntimeError as error:
        if str(error).startswith("DataLoader worker"):
            raise UserError(_WORKER_KILLED) from error
        raise
    finally:
        del results  # terminates the workers


@dataclass
class _Failure:
    error: BaseException


def _in_thread(make: Callable[[int], T], tasks: range, ahead: int) -> Generator[T, None, None]:
    results: queue.SimpleQueue[T | _Failure] = queue.SimpleQueue()
    slots, started, closed = threading.Semaphore(ahead), threading.Event(), threading.Event()
    threads = torch.get_num_threads()

    def work() -> None:
        torch.set_num_threads(1)  # a second team of threads would slow down the step's
        started.set()
        for task in tasks:
            slots.acquire()
            if closed.is_set():
                return
            try:
                results.put(make(task))
            except BaseException as error:
                results.put(_Failure(error))
                return

    thread = threading.Thread(target=work, name="loader", daemon=True)
    thread.start()
    try:
        started.wait()
        torch.set_num_threads(threads)  # the loader's thread has also set the default of threads that start later
        for _ in tasks:
            result = results.get()
            slots.release()
            if isinstance(result, _Failure):
                raise result.error
            yield result
    finally:
        closed.set()
        slots.release()  # the thread may be waiting for one
        thread.join()


class _Tasks(Dataset):
    """Dataset of `make(task)`. Returns UserErrors as values, since DataLoader would wrap a raised one in a traceback."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, task: int) -> Any:
        try:
            return self.make(task)
        except UserError as error:
            return error


def _results(dataset: _Tasks, tasks: range, workers: int, ahead: int) -> Iterator[Any]:
    if not tasks:
        return iter(())
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=tasks,
        num_workers=workers,
        prefetch_factor=1 + -(-ahead // workers),
        collate_fn=_unchanged,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # without it, each iterator would advance the global random state
    )
    return iter(loader)


def _unchanged(value: T) -> T:
    return value


def _start_worker(_: int) -> None:
    """Initializes a worker. DataLoader has already limited it to one thread."""
    if hasattr(os, "setpgid"):
        # keeps Ctrl-C and SIGTERM to the process group away: the trainer still needs the current batch
        os.setpgid(0, 0)
    threading.Thread(target=_exit_with_parent, args=(os.getppid(),), daemon=True).start()


def _exit_with_parent(parent: int) -> None:
    """Exits this process soon after its parent, even during a task; DataLoader's watchdog checks only between tasks."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
