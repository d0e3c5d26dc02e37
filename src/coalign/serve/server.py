"""serve(): the search page of one or more indexes, until Ctrl-C."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress

import uvicorn
from starlette.types import ASGIApp

from coalign.errors import UserError
from coalign.serve.app import create_app
from coalign.serve.connections import bounded_protocol
from coalign.serve.guard import Access, digest, resolve_token
from coalign.serve.limits import DEFAULT_LIMITS, Limits
from coalign.workflows.collection.query import Collection

_GRACE = 5  # seconds that requests have to finish after Ctrl-C


def serve(
    collections: Callable[[], Sequence[Collection]], host: str = "127.0.0.1", port: int = 7860, token: str | None = None
) -> None:
    """Serves collections until Ctrl-C or SIGTERM. Prints the address once it accepts connections.

    collections: opens them, after the address and the token have been checked. token: "auto" generates one. Raises UserError if the
    address cannot be used, or if other machines can reach it and there is no token.
    """
    listener = listen(host, port)
    with listener:
        address = listener.getsockname()[0]
        number = listener.getsockname()[1]
        local = ipaddress.ip_address(address).is_loopback
        secret = resolve_token(token, local, host)
        name = f"[{address}]" if ":" in address else address
        access = Access(
            Access.hosts | {name, host.lower()}, None if secret is None else digest(secret), f"coalign-{number}"
        )
        app = create_app(collections(), access)
        shown = socket.gethostname() if ipaddress.ip_address(address).is_unspecified else name
        print(f"http://{shown}:{number}/" + (f"?token={secret}" if secret else ""), flush=True)
        print("Press Ctrl-C to stop.", flush=True)
        with suppress(KeyboardInterrupt):  # raised again after the graceful stop
            make_server(app).run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address; port 0 takes a free one. Raises UserError if the address cannot be used."""
    if not 0 <= port <= 65535:
        raise UserError(f"--port is {port}, but must be 0 to 65535.")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=512)
    except OSError as error:
        raise UserError(
            f"The server cannot listen on {host}, port {port} ({error.strerror}); choose another --port or --host."
        ) from error


def make_server(app: ASGIApp, limits: Limits = DEFAULT_LIMITS) -> uvicorn.Server:
    """Returns a server whose method `run` takes the sockets to listen on."""
    config = uvicorn.Config(
        app,
        http=bounded_protocol(limits),
        ws="none",
        lifespan="on",
        log_level="error",
        access_log=False,  # it would show tokens
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_GRACE,
    )
    return uvicorn.Server(config)
