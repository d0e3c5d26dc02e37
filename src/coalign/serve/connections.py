"""Connections with time limits for headers and for clients that do not read, which uvicorn's own protocol lacks."""

from __future__ import annotations

import asyncio
import json
from http import HTTPStatus
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from coalign.serve.limits import Limits


class _Timer:
    """Calls a function unless it is stopped in time."""

    def __init__(self) -> None:
        self.handle: asyncio.TimerHandle | None = None

    def start(self, loop: asyncio.AbstractEventLoop, seconds: float, function: Any) -> None:
        """Starts the timer, unless it runs already."""
        if self.handle is None:
            self.handle = loop.call_later(seconds, function)

    def stop(self) -> None:
        if self.handle is not None:
            self.handle.cancel()
            self.handle = None


class BoundedProtocol(H11Protocol):
    """An HTTP connection of uvicorn that closes if its client takes too long.

    A connection without a request that is being processed must send all headers of one within `request_seconds`, however the bytes arrive;
    so must one whose body is still arriving after the response. A client that does not read its response is dropped after
    `write_seconds`. If there are more than `connections`, the one that has been without a request longest makes room. Bodies are limited in
    `guard.py`, which sees them.
    """

    limits: ClassVar[Limits]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._idle, self._writing = _Timer(), _Timer()
        self._idle_since = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether no request is being processed."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self.limits.connections:
            others = [each for each in self.connections if each is not self and each.is_idle]  # type: ignore[union-attr]
            if others:
                min(others, key=lambda each: each._idle_since).drop()  # type: ignore[union-attr]
            else:
                self._refuse(503, "The server has too many open connections; try again in a moment.")

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self._idle.stop()
        self._writing.stop()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.start(self.loop, self.limits.write_seconds, self.drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._writing.stop()

    def send_400_response(self, msg: str) -> None:
        if self.is_idle:
            self._refuse(400, "The request is not valid HTTP.")
        else:  # a body that breaks off its own encoding, while the response may be under way
            self.drop()

    def drop(self) -> None:
        """Closes the connection without waiting for its client."""
        self.connections.discard(self)
        self.transport.abort()

    def _watch(self) -> None:
        """Runs the time limit if no request is being processed."""
        if not self.is_idle or self.transport.is_closing():
            self._idle.stop()
        elif self._idle.handle is None:
            self._idle_since = self.loop.time()
            self._idle.start(self.loop, self.limits.request_seconds, self.drop)

    def _refuse(self, status: int, sentence: str) -> None:
        """Writes a response without h11, whose state may not allow one, and closes the connection."""
        body = json.dumps({"error": sentence}).encode()
        head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        )
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def bounded_protocol(limits: Limits) -> type[BoundedProtocol]:
    """Returns the protocol with these limits, for the option `http` of uvicorn."""
    return type("BoundedProtocol", (BoundedProtocol,), {"limits": limits})
