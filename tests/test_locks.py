"""Locks between processes, and what replaces functions that Windows does not have."""

import os
import subprocess
import sys

import numpy as np
import pytest
from helpers.data_files import write_tar

from coalign.data.images.memory import available_memory
from coalign.data.sources.open import open_source
from coalign.files import write_at
from coalign.locks import lock

HOLD = """
import sys
from coalign.locks import lock
file = open(sys.argv[1], "w")
lock(file, wait=True)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_lock_is_held_until_its_process_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "held\n"
        with open(tmp_path / "lock", "w") as file, pytest.raises(BlockingIOError):
            lock(file, wait=False)
    finally:
        process.kill()
        process.communicate()
    with open(tmp_path / "lock", "w") as file:
        lock(file, wait=True)


@pytest.mark.parametrize("has_pwrite", [True, False])
def test_write_at(monkeypatch, tmp_path, has_pwrite):
    if not has_pwrite:
        monkeypatch.delattr(os, "pwrite")
    (tmp_path / "file").write_bytes(b"0123456789")
    descriptor = os.open(tmp_path / "file", os.O_RDWR)
    write_at(descriptor, memoryview(b"abc"), 4)
    write_at(descriptor, memoryview(b"xy"), 1)
    os.close(descriptor)
    assert (tmp_path / "file").read_bytes() == b"0xy3abc789"


def test_shards_and_memory_without_the_functions_of_posix(monkeypatch, tmp_path):
    write_tar(tmp_path / "0.tar", [("a.png", b"first"), ("a.txt", b"one"), ("b.png", b"second"), ("b.txt", b"two")])
    source = open_source(str(tmp_path / "0.tar"))
    monkeypatch.delattr(os, "pread")
    assert [bytes(source.image(index)) for index in range(2)] == [b"first", b"second"]
    assert [source.record(index).captions for index in range(2)] == [("one",), ("two",)]
    monkeypatch.delattr(os, "sysconf")
    assert available_memory(tmp_path) == 0
    assert np.isfinite(available_memory())
