"""Random access to the images in Parquet files, whose row groups can only be read as a whole.

The row groups that were read last are kept in memory. A large one that is read again is unpacked to a temporary file, from which single
images are read. All processes of a user that read the same data share these files; the last one removes them. Those of a killed process
stay until another one that reads the same data ends.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
import weakref
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from coalign.errors import BadSample, UserError
from coalign.files import write_atomically

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_CACHED_BYTES = 64 << 20  # of row groups in memory
_LARGE_GROUP = 8 << 20  # bytes of images; smaller ones are read again each time
_MAX_GROUP_BYTES = 512 << 20  # larger ones are never held in memory
_BATCH = 64  # rows in memory while unpacking
_MAX_OPEN = 64  # files kept open per process


class RowGroups:
    """The column `column` of images in `files`. `stamp` identifies their content. Threads may share an instance."""

    def __init__(self, files: Sequence[Path], column: str, stamp: int) -> None:
        self.files, self.column = files, column
        user = os.getuid() if hasattr(os, "getuid") else 0  # Windows has a temporary folder per user
        self.folder = Path(tempfile.gettempdir(), f"coalign-parquet-{user}-{stamp:016x}")
        self.sizes = [_group_sizes(path, column) for path in files]
        self.unpacks = fcntl is not None and self.largest > _LARGE_GROUP and sum(map(sum, self.sizes)) > _CACHED_BYTES
        if self.largest > _MAX_GROUP_BYTES and not self.has_space:
            raise UserError(
                f"{files[0]} has row groups with up to {self.largest / 1e6:,.0f} MB of images, and there is no space to unpack them in "
                f"{self.folder.parent}; set TMPDIR to a larger folder, or write the file with row groups of about 100 rows."
            )
        if self.unpacks:
            _share(self, self.folder)
        self._reset()

    def _reset(self) -> None:
        """Forgets what was opened by another process."""
        self._lock = threading.Lock()
        self._process = os.getpid()
        self._open: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], Any] = OrderedDict()
        self._read: set[tuple[int, int]] = set()
        self._can_unpack = True

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_lock": None, "_process": 0, "_open": None, "_groups": None}

    @property
    def largest(self) -> int:
        return max((size for sizes in self.sizes for size in sizes), default=0)

    @property
    def has_space(self) -> bool:
        """Whether there is space to unpack all large row groups."""
        needed = sum(size for sizes in self.sizes for size in sizes if size > _LARGE_GROUP)
        return needed < shutil.disk_usage(self.folder.parent).free

    def image(self, file: int, group: int, row: int) -> bytes | str:
        """The encoded image in a row, or its path; b"" if there is none. Raises BadSample if the file cannot be read."""
        import pyarrow

        if self._process != os.getpid():
            self._reset()
        try:
            with self._lock:
                return self._image(file, group, row)
        except (pyarrow.ArrowException, OSError, UserError) as error:
            raise BadSample("Parquet file cannot be read", f"{self.files[file]}: {error}") from None

    def _image(self, file: int, group: int, row: int) -> bytes | str:
        key, size = (file, group), self.sizes[file][group]
        if key in self._groups:
            self._groups.move_to_end(key)
            return encoded(self._groups[key][row].as_py())
        is_read_again = self.unpacks and size > _LARGE_GROUP and key in self._read
        if self._can_unpack and (size > _MAX_GROUP_BYTES or is_read_again):
            try:
                return self._unpacked(file, group, row)
            except OSError:
                self._can_unpack = False  # no space: from now on, the row groups are read
        return encoded(self._load(file, group)[row].as_py())

    def _load(self, file: int, group: int) -> Any:
        column = self._file(file).read_row_group(group, columns=[self.column], use_threads=False).column(0)
        while self._groups and sum(each.nbytes for each in self._groups.values()) + column.nbytes > _CACHED_BYTES:
            self._groups.popitem(last=False)
        self._groups[file, group] = column
        self._read.add((file, group))
        return column

    def _file(self, file: int) -> Any:
        if file not in self._open:
            while len(self._open) >= _MAX_OPEN:
                self._open.popitem(last=False)[1].close()
            self._open[file] = open_parquet_file(self.files[file])
        self._open.move_to_end(file)
        return self._open[file]

    def _unpacked(self, file: int, group: int, row: int) -> bytes | str:
        """Reads an image from the file of a row group, which has the number of rows, their ends, which are paths, and the contents."""
        path = self.folder / f"{file}-{group}"
        if not path.exists():
            self._unpack(file, group, path)
        with open(path, "rb") as unpacked:
            (rows,) = np.fromfile(unpacked, np.int64, 1)
            unpacked.seek(8 * row, os.SEEK_CUR)
            start, end = np.fromfile(unpacked, np.int64, 2).tolist()
            unpacked.seek(8 * (rows + 2) + row)
            is_path = unpacked.read(1) == b"\1"
            unpacked.seek(8 * (rows + 2) + rows + start)
            content = unpacked.read(end - start)
        return content.decode() if is_path else content

    def _unpack(self, file: int, group: int, path: Path) -> None:
        ends, are_paths = [0], bytearray()
        rows = self._file(file).metadata.row_group(group).num_rows
        batches = self._file(file).iter_batches(_BATCH, row_groups=[group], columns=[self.column], use_threads=False)

        def write(temporary: Path) -> None:
            with open(temporary, "wb") as unpacked:
                unpacked.seek(8 * (rows + 2) + rows)
                for batch in batches:
                    for value in batch.column(0):
                        content = encoded(value.as_py())
                        are_paths.append(isinstance(content, str))
                        written = unpacked.write(content.encode() if isinstance(content, str) else content)
                        ends.append(ends[-1] + written)
                unpacked.seek(0)
                unpacked.write(np.array([rows, *ends], np.int64).tobytes() + are_paths)

        write_atomically(path, write)


def encoded(value: Any) -> bytes | str:
    """The encoded image in a cell, or its path; b"" if there is none. Raises BadSample if there are several."""
    if isinstance(value, dict):
        content = next((each for each in value.values() if isinstance(each, bytes)), None)
        value = value.get("path") if content is None else content
    if isinstance(value, list) and value and not isinstance(value[0], int):
        if len(value) > 1:
            raise BadSample("several images in a row")
        return encoded(value[0])
    if isinstance(value, list):
        value = bytes(each % 256 for each in value)
    return value or b""


def open_parquet_file(path: Path) -> Any:
    """Opens a Parquet file. Raises UserError if it is damaged, or if the `hf` extra is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f'Reading {path} requires the "hf" extra: pip install "coalign[hf]"') from None
    try:
        return parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable Parquet file: {error}") from None


def _group_sizes(path: Path, column: str) -> list[int]:
    """The bytes of a column in each row group, without compression."""
    file = open_parquet_file(path)
    numbers = range(file.metadata.num_columns)
    leaves = [number for number in numbers if file.schema.column(number).path.split(".")[0] == column]
    groups = map(file.metadata.row_group, range(file.metadata.num_row_groups))
    return [sum(group.column(leaf).total_uncompressed_size for leaf in leaves) for group in groups]


def _share(owner: object, folder: Path) -> None:
    """Makes a folder that is removed once every process that shares it has ended or has deleted its `owner`."""
    with suppress(OSError):
        while True:
            folder.mkdir(mode=0o700, exist_ok=True)
            try:
                lock = os.open(folder / "lock", os.O_CREAT | os.O_RDWR, 0o600)
            except FileNotFoundError:  # the last process has just removed the folder
                continue
            fcntl.flock(lock, fcntl.LOCK_SH)
            if os.fstat(lock).st_nlink:
                break
            os.close(lock)  # the last process has removed the folder meanwhile
        weakref.finalize(owner, _release, lock, folder, os.getpid())


def _release(lock: int, folder: Path, process: int) -> None:
    if process != os.getpid():  # a forked process
        return
    with suppress(OSError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails if another process shares the folder
        shutil.rmtree(folder, ignore_errors=True)
    os.close(lock)
