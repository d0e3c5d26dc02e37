"""What the server accepts at most. The defaults fit a person's search page; tests use smaller ones."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Sizes in bytes, times in seconds."""

    connections: int = 128  # open at once; above, the one that has been idle longest is closed
    request_seconds: float = (
        10.0  # from the start of a connection, or the previous response, to the end of the request's headers
    )
    body_seconds: float = 60.0  # from the headers to the end of the body
    write_seconds: float = 60.0  # that a client may keep the server from writing
    upload_bytes: int = 10 << 20  # of a multipart body
    json_bytes: int = 256 << 10
    image_pixels: int = 64_000_000  # of an uploaded image
    waiting: int = 64  # requests that wait for the model


DEFAULT_LIMITS = Limits()
