"""Remote shards, from a local web server and fsspec's memory file system: downloaded once, then read like local ones."""

from __future__ import annotations

import http.server
import threading
from functools import partial

import fsspec
import pytest
from helpers.data_files import samples, write_tar

from coalign.data.sources.open import open_source
from coalign.data.sources.tar import remote
from coalign.data.sources.tar.shards import open_shards
from coalign.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def shards(tmp_path):
    folder = tmp_path / "shards"
    for part, count in (("train/00", 5), ("train/01", 4), ("val/00", 3)):
        path = folder / f"{part}.tar"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, samples(count))
    return folder


@pytest.fixture
def server(shards):
    """URL of a web server for the shards, and the list of requested paths."""
    requested: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            if self.command == "GET":
                requested.append(self.path)

    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(shards)))
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}", requested
    httpd.shutdown()
    thread.join()


@pytest.fixture
def memory(shards):
    filesystem = fsspec.filesystem("memory")
    for path in shards.rglob("*.tar"):
        filesystem.pipe_file(f"memory://set/{path.relative_to(shards)}", path.read_bytes())
    yield "memory://set"
    filesystem.rm("/set", recursive=True)


def contents(source):
    return [(source.record(i).key, source.record(i).captions, source.image(i)) for i in range(len(source))]


def test_remote_shards_equal_local_ones(shards, server):
    url, requested = server
    expected = open_shards(f"{shards}/{{train,val}}/00.tar")
    source = open_source(f"{url}/{{train,val}}/00.tar")
    assert contents(source) == contents(expected)
    assert source.splits is not None
    assert {name: rows.tolist() for name, rows in source.splits.items()} == {
        name: rows.tolist() for name, rows in expected.splits.items()
    }
    assert sorted(path for path in requested if path.endswith(".tar")) == ["/train/00.tar", "/val/00.tar"]
    open_source(f"{url}/{{train,val}}/00.tar")  # downloads nothing
    assert len([path for path in requested if path.endswith(".tar")]) == 2


def test_a_changed_shard_is_downloaded_again(memory, shards, tmp_path):
    assert len(open_source(f"{memory}/train/*.tar")) == 9
    newer = write_tar(tmp_path / "newer.tar", samples(7))
    fsspec.filesystem("memory").pipe_file(f"{memory}/train/00.tar", newer.read_bytes())
    assert len(open_source(f"{memory}/train/*.tar")) == 11


def test_an_incomplete_download_is_discarded(memory, monkeypatch, tmp_path):
    """A file shorter than its reported size is an error. Complete downloads are kept."""
    real = remote._matching

    class Short:
        def __init__(self, filesystem):
            self.filesystem = filesystem

        def __getattr__(self, name):
            return getattr(self.filesystem, name)

        def open(self, url, mode):
            file = self.filesystem.open(url, mode)
            if url.endswith("01.tar"):
                file.seek(100)
            return file

    def matching(spec, expand):
        filesystem, urls = real(spec, expand)
        return Short(filesystem), urls

    monkeypatch.setattr(remote, "_matching", matching)
    with pytest.raises(UserError, match=r"Cannot read .*01\.tar: received .* bytes"):
        open_source(f"{memory}/train/*.tar")
    copies = sorted(path.name for path in (tmp_path / "cache").rglob("*.tar"))
    assert "01.tar" not in copies
    assert not list((tmp_path / "cache").rglob("*.part"))
    monkeypatch.setattr(remote, "_matching", real)
    assert len(open_source(f"{memory}/train/*.tar")) == 9


def test_invalid_urls_are_rejected(memory, server, monkeypatch):
    url, _ = server
    for spec, message in (
        (f"{memory}/train/{{00..03}}.tar", r"2 of 4 shards of .* are missing, starting with .*02\.tar"),
        (f"{url}/train/{{00..03}}.tar", r"2 of 4 shards of .* are missing, starting with .*02\.tar"),
        (f"{memory}/nothing/*.tar", "No shards match"),
        (f"{memory}/train", "does not end with .tar"),
        ("nowhere://set/00.tar", "Cannot read nowhere://set/00.tar: Protocol not known: nowhere"),
        ("http://127.0.0.1:9/00.tar", "Cannot read http://127.0.0.1:9/00.tar"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_source(spec)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(remote, "_SPARE", 1 << 60)
    with pytest.raises(UserError, match=r"take 0\.0 GB, but .* has room for 0\.0 GB; set XDG_CACHE_HOME"):
        open_source(f"{memory}/train/*.tar")


def test_cache_paths_are_unique_per_url():
    path = remote._cache_path("https://host:80/a/b/00.tar?key=secret")
    assert path.parts[-5:] == ("https", "host:80", "a", "b", "00.tar")
    assert remote._cache_path("s3://bucket/a/b/00.tar") != remote._cache_path("gs://bucket/a/b/00.tar")
    with pytest.raises(UserError, match=r"contains '\.\.'"):
        remote._cache_path("https://host/../00.tar")
