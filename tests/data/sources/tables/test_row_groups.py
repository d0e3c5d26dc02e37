from __future__ import annotations

import gc
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from coalign.data.sources.open import open_source
from coalign.data.sources.tables import row_groups
from coalign.data.sources.tables.parquet_table import ParquetSource
from coalign.data.sources.tables.table import open_table
from coalign.errors import UserError

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402

KINDS = ["bytes", "struct", "path"]


@pytest.fixture
def large(tmp_path: Path, monkeypatch) -> Path:
    """The temporary folder, in which row groups of a thousand bytes are unpacked."""
    for name, value in {"_CACHED_BYTES": 3000, "_LARGE_GROUP": 1000, "_MAX_GROUP_BYTES": 5000}.items():
        monkeypatch.setattr(row_groups, name, value)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(row_groups.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def write(folder: Path, kind: str, group: int, count: int = 60) -> tuple[Path, list[bytes]]:
    """A Parquet file, and its images."""
    generator = np.random.default_rng(0)
    contents = [generator.bytes(int(generator.integers(50, 300))) for _ in range(count)]
    cells: list = list(contents)
    if kind != "bytes":
        cells = [{"bytes": each, "path": "x.jpg"} for each in contents]
    if kind == "path":
        for number in range(0, count, 3):
            name = "é" * 30 + f"{number}.jpg"
            (folder / name).write_bytes(contents[number])
            cells[number] = {"bytes": None, "path": name}
    path = folder / "x.parquet"
    parquet.write_table(pyarrow.table({"image": cells, "text": ["a"] * count}), path, row_group_size=group)
    return path, contents


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("group", [7, 20, 60])  # 60: more than may be in memory
def test_images_of_large_row_groups(tmp_path: Path, large: Path, kind: str, group: int) -> None:
    path, contents = write(tmp_path, kind, group)
    source = open_table(path)
    order = np.random.default_rng(1).permutation(np.tile(np.arange(60), 4)).tolist()
    assert [source.image(i) for i in [*range(60), *order]] == [contents[i] for i in [*range(60), *order]]
    (note,) = source.left_out
    assert "MB) are unpacked to " in note.reason
    unpacked = [name.name for folder in large.iterdir() for name in folder.iterdir() if name.name != "lock"]
    assert 0 < len(unpacked) <= -(-60 // group)
    assert [pickle.loads(pickle.dumps(source)).image(i) for i in (4, 2)] == [contents[4], contents[2]]
    with get_context("fork").Pool(2) as pool:
        assert pool.map(source.image, order[:60]) == [contents[i] for i in order[:60]]
    assert list(large.iterdir()), "a forked process removed the files of its parent"
    del source
    gc.collect()
    assert not list(large.iterdir())


def test_reading_in_order_unpacks_nothing(tmp_path: Path, large: Path) -> None:
    path, contents = write(tmp_path, "bytes", 20)
    source = open_table(path)
    assert [source.image(i) for i in range(60)] == contents
    assert [name.name for folder in large.iterdir() for name in folder.iterdir()] == ["lock"]


def test_each_row_group_is_read_at_most_twice(tmp_path: Path, large: Path, monkeypatch) -> None:
    path, _ = write(tmp_path, "bytes", 10)
    source = open_table(path)
    reads: list[int] = []
    load, unpack = row_groups.RowGroups._load, row_groups.RowGroups._unpack
    monkeypatch.setattr(
        row_groups.RowGroups, "_load", lambda self, file, group: reads.append(group) or load(self, file, group)
    )
    monkeypatch.setattr(
        row_groups.RowGroups,
        "_unpack",
        lambda self, file, group, path: reads.append(group) or unpack(self, file, group, path),
    )
    for i in np.random.default_rng(0).integers(60, size=2000).tolist():
        source.image(i)
    assert max(np.bincount(reads)) <= 2


def test_processes_share_the_files_and_the_last_one_removes_them(tmp_path: Path, large: Path) -> None:
    path, contents = write(tmp_path, "bytes", 60)
    first, second = open_table(path), open_table(path)
    assert first.image(3) == second.image(3) == contents[3]
    (folder,) = large.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["0-0", "lock"]
    del first
    gc.collect()
    assert second.image(5) == contents[5]
    del second
    gc.collect()
    assert not list(large.iterdir())


def test_threads_share_a_source(tmp_path: Path, large: Path) -> None:
    path, contents = write(tmp_path, "bytes", 7)
    source = open_table(path)
    order = np.random.default_rng(0).integers(60, size=2000).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(source.image, order)) == [contents[i] for i in order]
    finally:
        sys.setswitchinterval(interval)


def test_many_files_are_not_all_kept_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(row_groups, "_MAX_OPEN", 3)
    path, contents = write(tmp_path, "bytes", 60)
    for number in range(9):
        (tmp_path / f"{number}.parquet").write_bytes(path.read_bytes())
    path.unlink()
    source = open_source(str(tmp_path))
    assert isinstance(source, ParquetSource)
    for _ in range(2):
        assert [source.image(60 * file) for file in range(9)] == 9 * contents[:1]
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    source._groups._reset()
    assert before - (len(os.listdir("/proc/self/fd")) if before else 0) <= 3


def test_a_process_that_starts_while_the_last_one_ends_has_its_own_files(
    tmp_path: Path, large: Path, monkeypatch
) -> None:
    path, contents = write(tmp_path, "bytes", 60)
    source = open_table(path)
    waiting, rmtree, opened = threading.Event(), row_groups.shutil.rmtree, []
    flock = row_groups.fcntl.flock

    def share(lock: int, operation: int) -> None:
        waiting.set()
        flock(lock, operation)

    def remove(*args, **options) -> None:
        monkeypatch.setattr(row_groups.fcntl, "flock", share)
        starting.start()
        assert waiting.wait(10)  # it has opened the lock that is removed now
        rmtree(*args, **options)

    starting = threading.Thread(target=lambda: opened.append(open_table(path)))
    monkeypatch.setattr(row_groups.shutil, "rmtree", remove)
    del source
    gc.collect()
    starting.join()
    monkeypatch.setattr(row_groups.shutil, "rmtree", rmtree)
    assert [opened[0].image(i) for i in range(60)] == contents
    (folder,) = large.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["0-0", "lock"]


def test_without_space_row_groups_are_read_and_too_large_ones_refused(tmp_path: Path, large: Path, monkeypatch) -> None:
    monkeypatch.setattr(row_groups.shutil, "disk_usage", lambda _: shutil_usage(0))
    path, contents = write(tmp_path, "bytes", 60)
    with pytest.raises(UserError, match=r"row groups with up to .* MB of images, .* set TMPDIR to a larger folder"):
        open_table(path)
    path, contents = write(tmp_path, "bytes", 20)
    large.rename(tmp_path / "gone")  # nothing can be written
    source = open_table(path)
    assert [source.image(i) for i in [*range(60), *range(60)]] == contents * 2


def shutil_usage(free: int):
    return type("usage", (), {"free": free})


def test_files_are_removed_when_the_process_ends(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (5, 15 << 20), dtype=np.uint8)
    columns = {"jpg": [row.tobytes() for row in noise], "text": ["x"] * 5}
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", row_group_size=5)
    code = (
        "import sys, os; from coalign.data.sources.tables.table import open_table; from pathlib import Path\n"
        "from coalign.data.sources.tables import row_groups; row_groups._MAX_GROUP_BYTES = 1\n"
        "source = open_table(Path(sys.argv[1])); source.image(3)\n"
        "print(sum(len(files) for _, _, files in os.walk(os.environ['TMPDIR'])))"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "tmp")}
    args = [sys.executable, "-c", code, str(tmp_path / "x.parquet")]
    result = subprocess.run(args, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == "2\n"
    assert not list((tmp_path / "tmp").iterdir())
