"""Connections that are held open, on raw sockets: half-sent headers, slow bodies, clients that do not read, and too many of them."""

import json
import socket
import threading
import time

import httpx
import pytest
from helpers.collections import color_collection
from helpers.servers import exchange, read_response, running

from coalign.serve.limits import Limits

LIMITS = Limits(connections=12, request_seconds=2.0, body_seconds=1.5, write_seconds=1.0)
GET = b"GET /api/health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture(scope="module")
def port():
    with running([color_collection()], limits=LIMITS) as port:
        yield port


def connect(port):
    return socket.create_connection(("127.0.0.1", port), timeout=20)


def is_served(port):
    return httpx.get(f"http://localhost:{port}/api/health", timeout=20).status_code == 200


def closes(connection):
    """Whether the server closes the connection without a response."""
    try:
        return connection.recv(1000) == b""
    except ConnectionResetError:
        return True


def drip(connection, data, pause=0.1):
    """Sends a byte at a time until the connection breaks. Returns whether it did."""
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
        except OSError:
            return True
        time.sleep(pause)
    return False


@pytest.mark.parametrize("start", [b"", b"GET", GET, GET + b"X-Long: "], ids=["nothing", "method", "headers", "name"])
def test_half_a_header_is_closed_and_others_are_served(port, start):
    with connect(port) as connection:
        connection.sendall(start)
        assert is_served(port)
        assert closes(connection)
        assert is_served(port)


def test_dripping_headers_does_not_extend_the_limit(port):
    with connect(port) as connection:
        connection.sendall(GET + b"X-Long: ")
        assert drip(connection, b"x" * 200)  # 20 s
        assert is_served(port)


def test_the_limit_applies_to_each_request_of_a_connection(port):
    with connect(port) as connection:
        for _ in range(3):
            time.sleep(0.8)
            connection.sendall(GET + b"\r\n")
            assert read_response(connection) == (200, {"status": "ok"})
        connection.sendall(GET)
        assert closes(connection)


def post(length, kind="application/json"):
    return f"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n\r\n".encode()


PART = b'--x\r\nContent-Disposition: form-data; name="text"\r\n\r\n'


@pytest.mark.parametrize(
    ("kind", "start"), [("application/json", b"{"), ("multipart/form-data; boundary=x", PART)], ids=["json", "form"]
)
def test_a_dripping_body_is_refused_and_others_are_served(port, kind, start):
    with connect(port) as connection:
        connection.sendall(post(5000, kind) + start)
        dripping = threading.Thread(target=drip, args=(connection, b" " * 100))
        dripping.start()
        assert is_served(port)
        status, body = read_response(connection)
        assert status == 408
        assert "1.5 seconds" in body["error"]
        assert closes(connection)
        dripping.join()


def test_a_body_that_never_comes_is_refused(port):
    with connect(port) as connection:
        connection.sendall(post(5000))
        assert read_response(connection)[0] == 408
        assert closes(connection)


def test_a_body_that_goes_on_after_the_response_is_closed(port):
    with connect(port) as connection:
        connection.sendall(post(500_000))
        assert read_response(connection)[0] == 413
        assert drip(connection, b"x" * 200)


def test_a_chunked_body_that_breaks_its_encoding_is_closed(port):
    with connect(port) as connection:
        head = b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
        connection.sendall(head + b"1\r\n{\r\n")
        time.sleep(0.2)
        connection.sendall(b"zzz\r\n")
        assert closes(connection)
    assert is_served(port)


@pytest.mark.parametrize(
    "request_", [b"\r\n\r\n\x00", b"GET / HTTP/9.9\r\n\r\n", b"NOT HTTP\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00"]
)
def test_what_is_not_http(port, request_):
    with connect(port) as connection:
        connection.sendall(request_ + b"\r\n\r\n")
        response = read_response(connection)
        assert response is None or (response[0] in (400, 403) and list(response[1]) == ["error"])
    assert is_served(port)


def test_headers_that_are_too_long(port):
    response = exchange(port, GET + b"X-Long: " + b"x" * 200_000 + b"\r\n\r\n")
    assert response is None or response[0] == 400


def test_two_lengths_are_refused(port):
    head = post(5).replace(b"\r\n\r\n", b"\r\nContent-Length: 6\r\n\r\n")
    assert exchange(port, head + b"12345")[0] == 400


def test_a_client_that_does_not_read_is_dropped():
    collection = color_collection()
    long_key = "k" * 3000
    collection.records.key = lambda row: long_key  # the response is 24 times as long, and there are many
    with running([collection], limits=LIMITS) as port, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.settimeout(30)
        connection.connect(("127.0.0.1", port))
        body = json.dumps({"text": "red"}).encode()
        request = post(len(body)) + body
        end = time.monotonic() + 60
        dropped = False
        while not dropped and time.monotonic() < end:
            try:
                connection.sendall(request)
                time.sleep(0.01)
            except TimeoutError:
                pass  # the server reads no more requests before the responses are read
            except OSError:
                dropped = True
        assert dropped
        assert is_served(port)


def test_idle_connections_make_room_for_others(port):
    waiting = [connect(port) for _ in range(3 * LIMITS.connections)]
    for connection in waiting:
        connection.sendall(GET)
    assert is_served(port)
    assert sum(map(closes, waiting)) == len(waiting)
    for connection in waiting:
        connection.close()


def test_more_connections_than_can_be_served_are_refused():
    """Connections whose requests are being processed are not closed in favor of others."""
    collection, go = color_collection(), threading.Event()
    answer = collection.answer
    collection.answer = lambda *given: (go.wait(30), answer(*given))[1]
    body = json.dumps({"text": "red"}).encode()
    with running([collection], limits=LIMITS) as port:
        busy = [connect(port) for _ in range(LIMITS.connections)]
        for connection in busy:
            connection.sendall(post(len(body)) + body)
        time.sleep(0.5)
        with connect(port) as connection:
            status, refused = read_response(connection)
            assert status == 503
            assert "too many open connections" in refused["error"]
        go.set()
        assert [read_response(connection)[0] for connection in busy] == [200] * len(busy)
        for connection in busy:
            connection.close()
        assert is_served(port)


def test_requests_that_wait_for_the_model_are_limited_and_leave_with_their_client():
    collection, go, searches = color_collection(), threading.Event(), []
    answer = collection.answer

    def wait(query, top):
        searches.append(query.text)
        assert go.wait(30)
        return answer(query, top)

    collection.answer = wait
    limits = Limits(waiting=3)
    with running([collection], limits=limits) as port:

        def send(text):
            connection = connect(port)
            body = json.dumps({"text": text}).encode()
            connection.sendall(post(len(body)) + body)
            return connection

        first = send("first")
        while not searches:
            time.sleep(0.01)
        left, last = send("left"), send("last")
        time.sleep(0.3)
        status, body = read_response(send("too many"))
        assert status == 503
        assert "Too many requests are waiting" in body["error"]
        assert is_served(port)
        left.close()
        time.sleep(0.3)
        go.set()
        assert read_response(first)[0] == read_response(last)[0] == 200
    assert searches == ["first", "last"]
