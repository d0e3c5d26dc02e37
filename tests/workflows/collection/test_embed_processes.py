"""coalign embed in real processes: killed, and several of them."""

import os
import signal
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers import tiny

from coalign.workflows.collection.embedding_files import MANIFEST, EmbeddingFiles

DATA = "scenes:512,size=32"  # 8,512 samples
CHUNK = 256


def args(model, out, *more):
    return [
        "embed",
        str(model),
        DATA,
        "--out",
        str(out),
        "--chunk",
        str(CHUNK),
        "--device",
        "cpu",
        "--workers",
        "0",
        *more,
    ]


def parts(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("part-*.parquet")}


def assert_equal(one, other):
    """The same samples in the same files, and the same vectors up to rounding."""
    one, other = (EmbeddingFiles.open(path) for path in (one, other))
    assert [path.name for path in one.files] == [path.name for path in other.files]
    columns = ["key", "captions", "tags", "stamp", "problem"]
    assert one.table(columns).equals(other.table(columns))
    assert one.manifest == other.manifest
    for name in ("images", "texts"):
        (vectors, rows), (expected, expected_rows) = getattr(one, name)(), getattr(other, name)()
        assert np.array_equal(rows, expected_rows)
        np.testing.assert_allclose(vectors, expected, atol=1e-3)


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """The embeddings of one process that was not interrupted."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = tiny.start(args(trained, out))
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert printed.startswith("Device: cpu (1 thread)\n")
    return out


@pytest.mark.slow
def test_a_killed_process_loses_at_most_a_chunk(trained, whole, tmp_path):
    out = tmp_path / "out"
    for kill in range(2):
        before = parts(out)
        process = tiny.start(args(trained, out))
        while len(parts(out)) < len(before) + 3 + kill:
            assert process.poll() is None, process.communicate()
            time.sleep(0.002)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        after = parts(out)
        assert {name: after[name] for name in before} == before
        assert all(pq.read_metadata(out / name).num_rows == CHUNK for name in after)
        assert sorted(after) == [f"part-{number:06d}.parquet" for number in range(len(after))]
    before = parts(out)
    process = tiny.start(args(trained, out))
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert {name: parts(out)[name] for name in before} == before  # everything complete is kept
    assert f"kept: {CHUNK * len(before):,}" in printed
    assert_equal(out, whole)
    assert {path.name for path in out.iterdir()} == {MANIFEST, ".lock", *parts(out)}  # no leftovers


@pytest.mark.slow
def test_two_processes_share_the_work(trained, whole, tmp_path):
    out = tmp_path / "out"
    process = tiny.start(args(trained, out), processes=2)
    while len(parts(out)) < 4:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)  # torchrun ends both
    process.communicate(timeout=100)
    before = parts(out)
    process = tiny.start(args(trained, out), processes=2)
    printed, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert printed.count("8,512 samples, of which") == 1
    assert {name: parts(out)[name] for name in before} == before
    assert_equal(out, whole)


@pytest.mark.slow
def test_two_processes_write_one_file(trained, whole, tmp_path):
    out = tmp_path / "out.parquet"
    process = tiny.start(args(trained, out), processes=2)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    assert EmbeddingFiles.open(out).keys() == EmbeddingFiles.open(whole).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["out.parquet"]


@pytest.mark.slow
def test_all_processes_refuse_a_folder_of_another_model(trained, oner, whole):
    process = tiny.start(args(oner, whole, "--similarity", "projector"), processes=2)
    _, errors = process.communicate(timeout=500)
    assert process.returncode != 0
    assert errors.count("holds embeddings of another model") == 2
