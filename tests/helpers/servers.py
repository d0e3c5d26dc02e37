"""A real server on a free port, in a thread."""

from __future__ import annotations

import json
import socket
import threading
import time
from contextlib import contextmanager

from coalign.serve.app import create_app
from coalign.serve.limits import DEFAULT_LIMITS
from coalign.serve.server import listen, make_server


@contextmanager
def running(collections, access=None, limits=DEFAULT_LIMITS):
    """Yields the port of a server of collections."""
    with listen("127.0.0.1", 0) as listener:
        server = make_server(create_app(collections, access, limits), limits)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def exchange(port, request, seconds=10.0):
    """Sends raw bytes, and returns the status and the body of the response; the connection is closed afterwards."""
    with socket.create_connection(("127.0.0.1", port), timeout=seconds) as connection:
        connection.sendall(request)
        return read_response(connection)


def read_response(connection):
    """Reads one response from a socket: its status, and its body as JSON. None, if the connection closes without one."""
    received = b""
    while b"\r\n\r\n" not in received:
        if not (part := connection.recv(65536)):
            return None
        received += part
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(int(line[15:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    while len(body) < length:
        body += connection.recv(65536)
    return int(head.split()[1]), json.loads(body[:length])
