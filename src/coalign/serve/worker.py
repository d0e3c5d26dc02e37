"""A thread that runs one function after another, so that many requests do not compete for the processor or fill the memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

T = TypeVar("T")


class Worker:
    """Runs functions in one thread, in the order of the requests."""

    def __init__(self, limit: int) -> None:
        self.limit, self.pending = limit, 0
        self._lock = asyncio.Lock()
        self._thread = ThreadPoolExecutor(1)

    async def run(self, request: Request, function: Callable[[], T]) -> T:
        """Returns the function's result. Skips it if the client has left meanwhile. Raises HTTPException if too many requests wait."""
        if self.pending >= self.limit:
            raise HTTPException(503, "Too many requests are waiting; try again in a moment.", {"retry-after": "2"})
        self.pending += 1
        try:
            async with self._lock:
                if await request.is_disconnected():
                    raise ClientDisconnect
                return await asyncio.get_running_loop().run_in_executor(self._thread, function)
        finally:
            self.pending -= 1

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
