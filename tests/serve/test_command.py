"""`coalign serve` in a real process: its address, its errors, and the stop by Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading

import httpx
import pytest
from helpers.collections import color_collection

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.serve.server import listen, serve

SERVE = """
import sys
from types import SimpleNamespace
from helpers.collections import color_collection
from coalign.workflows.collection import index_files, query
index_files.read_info = lambda folder: SimpleNamespace(model="a model")
query.open_collection = lambda folder, device=None: color_collection(name=str(folder))
from coalign.cli.main import main
sys.exit(main(["serve", *sys.argv[1:]]))
"""


@pytest.fixture
def start():
    processes = []
    path = os.pathsep.join([os.path.dirname(os.path.dirname(__file__)), os.environ.get("PYTHONPATH", "")])

    def run(*args):
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *args],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        processes.append(process)
        return process

    yield run
    for process in processes:
        process.kill()
        process.communicate()


def address(process):
    """The address that a server prints after its device and its indexes."""
    device, line = process.stdout.readline(), process.stdout.readline().strip()
    assert device.startswith("Device: "), device
    assert line.startswith("Opening "), line
    while line.startswith("Opening "):
        line = process.stdout.readline().strip()
    assert re.fullmatch(r"http://\S+", line), line + process.stderr.read()
    return line


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_two_indexes_are_served_until_a_signal_stops_it(start, stop):
    process = start("before", "after", "--port", "0")
    url = address(process)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url)
    found = httpx.get(f"{url}api/collections").json()["collections"]
    assert [each["name"] for each in found] == ["before", "after"]
    host, port = url[7:-1].split(":")
    with socket.create_connection((host, int(port))) as held:
        held.sendall(b"GET /api")  # a held connection does not delay the stop
        process.send_signal(stop)
        output, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -stop)
    assert "Traceback" not in output + errors
    assert errors == ""


def test_the_token_is_part_of_the_address(start):
    process = start("shelf", "--port", "0", "--token", "auto", "--host", "0.0.0.0")
    url = address(process)
    token = re.search(r"\?token=([\w-]{32,})$", url)[1]
    port = re.search(r":(\d+)/", url)[1]
    api = f"http://127.0.0.1:{port}/api/health"
    assert httpx.get(api).status_code == 401
    assert httpx.get(api, headers={"Authorization": f"Bearer {token}"}).status_code == 200
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert token not in output + errors  # requests are not logged


def test_a_request_under_way_is_finished(monkeypatch):
    """The server stops after the response, not during it."""
    from helpers.servers import exchange, running

    collection, go, started = color_collection(), threading.Event(), threading.Event()
    answer = collection.answer

    def wait(query, top):
        started.set()
        assert go.wait(30)
        return answer(query, top)

    collection.answer = wait
    results = []
    body = b'{"text": "red"}'
    request = (
        b"POST /api/search HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 15\r\n\r\n"
        + body
    )
    with running([collection]) as port:
        client = threading.Thread(target=lambda: results.append(exchange(port, request, 60)))
        client.start()
        assert started.wait(30)
        threading.Timer(1.0, go.set).start()  # while it is being stopped
    client.join()
    assert results[0][0] == 200


def opened():
    raise AssertionError("the collections were opened before the address and the token were checked")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "0.0.0.0"}, "needs a token"),
        ({"host": "::"}, "needs a token"),
        ({"token": "short"}, "at least 12 characters"),
        ({"host": "no-such-host.invalid"}, "cannot listen on no-such-host.invalid"),
        ({"port": 70000}, "0 to 65535"),
        ({"port": -1}, "0 to 65535"),
    ],
)
def test_errors_come_first_and_are_sentences(options, message):
    with pytest.raises(UserError, match=message) as error:
        serve(opened, **{"port": 0, **options})
    assert "\n" not in str(error.value)


def test_a_port_in_use_is_named():
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}.*in use.*--port"):
            serve(opened, port=port)


def test_the_command_needs_an_index(capsys, tmp_path):
    assert cli.main(["serve"]) == 2
    assert "coalign" in capsys.readouterr().err
    assert cli.main(["serve", str(tmp_path / "none"), "--port", "0"]) == 2
    assert str(tmp_path / "none") in capsys.readouterr().err
