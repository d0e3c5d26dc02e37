"""Locks of files between processes, on any system. The system releases a lock when its process dies."""

from __future__ import annotations

import os
import sys
import time
from typing import IO, Any

_LOCKED = 1 << 30  # position of the locked byte on Windows, where a locked byte cannot be read

if sys.platform == "win32":
    import msvcrt

    def lock(file: IO[Any], wait: bool) -> None:
        """Locks an open file until it is closed. Raises BlockingIOError if another process holds the lock and `wait` is false."""
        descriptor, before = file.fileno(), os.lseek(file.fileno(), 0, os.SEEK_CUR)
        try:
            while True:
                os.lseek(descriptor, _LOCKED, os.SEEK_SET)
                try:
                    return msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
                except OSError as error:
                    if not wait:
                        raise BlockingIOError(*error.args) from error
                    time.sleep(1)
        finally:
            os.lseek(descriptor, before, os.SEEK_SET)

else:
    import fcntl

    def lock(file: IO[Any], wait: bool) -> None:
        """Locks an open file until it is closed. Raises BlockingIOError if another process holds the lock and `wait` is false."""
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
