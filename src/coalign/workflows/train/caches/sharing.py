"""Locks of the feature files that runs share: one run computes a file, on all of its processes, while the others wait."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from coalign.errors import UserError
from coalign.locks import lock
from coalign.training.distributed import World


@contextmanager
def alone(folder: Path, paths: Sequence[Path], world: World, console: Console) -> Iterator[None]:
    """Context in which no other run writes to the files `paths` of `folder`, which it creates. All processes must enter it.

    Raises UserError on all processes if the folder cannot be written.
    """
    with ExitStack() as locks:
        for path in paths:
            waits = False
            # not longer in one step than the other processes wait for the first
            while not on_first(world, partial(_lock, folder, path, locks)):
                if world.is_first and not waits:
                    console.print(f"Waiting for another run, which computes the same features in {folder} …")
                waits = True
                time.sleep(1)
        yield


def _lock(folder: Path, path: Path, locks: ExitStack) -> bool:
    """Locks a file until `locks` is closed. Returns False if another run holds its lock."""
    with ExitStack() as own:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = own.enter_context(open(path.with_suffix(".lock"), "w"))
        except OSError as error:
            raise UserError(
                f"The features cannot be written to {folder} ({error.strerror}); choose another --feature-folder."
            ) from error
        try:
            lock(file, wait=False)
        except BlockingIOError:
            return False
        locks.enter_context(own.pop_all())
    return True


def on_first(world: World, action: Callable[[], Any]) -> Any:
    """Returns on all processes what `action` returns on the first one. Raises its UserError on all, too."""
    result, failure = None, None
    if world.is_first:
        try:
            result = action()
        except UserError as error:
            failure = str(error)
    result, failure = world.broadcast((result, failure))
    if failure:
        raise UserError(failure)
    return result
