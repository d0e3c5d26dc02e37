"""Cache of decoded images for later epochs, in memory or on disk, shared by the processes of a machine.

Cached pixels equal decoded ones, so a run does not depend on its cache. If the cache cannot be read or written, as on
Windows, images are decoded instead.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from coalign.data.images import decode as images
from coalign.data.images.decode import REDUCTIONS, OpenedImage, jpeg_reduction, open_image
from coalign.files import write_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

# The file starts with the numbers below, uint64: the end of the used part, the number of samples, and a row per sample: its size, then the
# location of its pixels for each JPEG reduction. Each entry is one 64-bit number, so that concurrent readers see either nothing or a
# complete entry. Bits of the size: 1 (valid) | 1 (reducible) | 31 (width) | 31 (height). A location is a position in the file; 0: none.
# There are the height and the width, uint32, and then the pixels.
_VALID, _REDUCIBLE, _SIDE_BITS = 1 << 63, 1 << 62, 31
_HEADER_BYTES = 8


class ImageCache:
    """Caches the decoded images of a source with `samples` samples, in at most `max_bytes` including the index.

    path: a file, which several processes may share and a new cache reuses. None: in memory, or in a temporary file on systems without
    files in memory, until the process ends.

    Attributes:
        shared_path: A path by which other processes can open this cache.
    """

    def __init__(self, samples: int, max_bytes: float, path: Path | None = None) -> None:
        self.samples, self.max_bytes, self.shared_path = samples, int(max_bytes), path
        self._process = 0  # id of the process that has opened the file
        if path is None:
            self._create()

    def __getstate__(self) -> dict[str, object]:
        return {"samples": self.samples, "max_bytes": self.max_bytes, "shared_path": self.shared_path, "_process": 0}

    def open(self, index: int, read: Callable[[], bytes | np.ndarray]) -> OpenedImage | CachedImage:
        """Opens a sample's image. `read` is called only if it is not cached. Raises whatever `read` and `open_image` raise."""
        if self._process != os.getpid():
            self._open()
        return open_image(read()) if self._rows is None else CachedImage(self, self._rows[index % self.samples], read)

    # ------------------------------------------------------------ storage

    def _create(self) -> None:
        """Creates a file that is removed with this cache."""
        with suppress(OSError):
            if hasattr(os, "memfd_create"):
                file = os.memfd_create("coalign-images")
                self.shared_path = Path(f"/proc/{os.getpid()}/fd/{file}")
            else:
                file, name = tempfile.mkstemp(prefix="coalign-images-")
                self.shared_path = Path(name)
                weakref.finalize(self, _remove, self.shared_path, os.getpid())
            weakref.finalize(self, os.close, file)

    def _open(self) -> None:
        """Opens or creates the file, and maps it into memory. If that fails, nothing is cached."""
        self._process = os.getpid()
        self._rows: np.ndarray | None = None
        index_bytes = 8 * (2 + self.samples * (1 + len(REDUCTIONS)))
        if fcntl is None or self.shared_path is None or index_bytes > self.max_bytes:
            return
        with suppress(OSError, ValueError):
            self.shared_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._file = os.open(self.shared_path, os.O_CREAT | os.O_RDWR, 0o600)
            weakref.finalize(self, os.close, self._file)
            with self._locked():
                size = os.fstat(self._file).st_size
                used, samples = np.frombuffer(os.pread(self._file, 16, 0).ljust(16, b"\0"), np.uint64).tolist()
                if samples != self.samples or not index_bytes <= used <= size:  # new, or damaged
                    os.ftruncate(self._file, 0)
                    # Written, not only mapped: writing to a mapped page without space would kill the process.
                    write_at(self._file, np.array([index_bytes, self.samples], np.uint64).data.cast("B"), 0)
                    write_at(self._file, memoryview(bytes(index_bytes - 16)), 16)
                os.ftruncate(self._file, max(size, self.max_bytes))  # takes no space until it is written
            self._map = mmap.mmap(self._file, max(size, self.max_bytes))
            numbers = np.frombuffer(self._map, np.uint64, index_bytes // 8)
            self._used, self._rows = numbers[:1], numbers[2:].reshape(self.samples, -1)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        fcntl.lockf(self._file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.lockf(self._file, fcntl.LOCK_UN)

    def pixels(self, location: int) -> np.ndarray:
        """The cached pixels at a location, uint8 [height, width, 3]. Not a copy."""
        height, width = np.frombuffer(self._map, np.uint32, 2, location).tolist()
        return np.frombuffer(self._map, np.uint8, 3 * height * width, location + _HEADER_BYTES).reshape(
            height, width, 3
        )

    def put(self, row: np.ndarray, level: int, opened: OpenedImage, pixels: np.ndarray) -> None:
        """Caches the pixels if the cache and the disk or the memory have room."""
        size = -(-(_HEADER_BYTES + pixels.nbytes) // 8) * 8
        with suppress(OSError):
            with self._locked():
                start = int(self._used[0])
                if int(row[1 + level]) or start + size > self.max_bytes:
                    return
                self._used[0] = start + size
            write_at(self._file, np.array(pixels.shape[:2], np.uint32).data.cast("B"), start)
            write_at(self._file, np.ascontiguousarray(pixels).data.cast("B"), start + _HEADER_BYTES)
            width, height = opened.size
            row[0] = _VALID | (_REDUCIBLE if opened.reducible else 0) | width << _SIDE_BITS | height
            row[1 + level] = start  # last, since readers check it first


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not in a forked one
        path.unlink(missing_ok=True)


class CachedImage:
    """Drop-in for `OpenedImage` that decodes through the cache."""

    def __init__(self, cache: ImageCache, row: np.ndarray, read: Callable[[], bytes | np.ndarray]) -> None:
        self._cache, self._row, self._read = cache, row, read
        entry = int(row[0])
        self._opened = None if entry else open_image(read())
        if self._opened is None:
            self.reducible = bool(entry & _REDUCIBLE)
            self.size = (entry >> _SIDE_BITS & ((1 << _SIDE_BITS) - 1), entry & ((1 << _SIDE_BITS) - 1))
        else:
            self.reducible, self.size = self._opened.reducible, self._opened.size

    @property
    def num_bytes(self) -> int:
        return self._opened.num_bytes if self._opened else 0

    def decode(self, min_scale: float = 1.0) -> np.ndarray:
        reduction = jpeg_reduction(min_scale) if self.reducible else 1
        level = REDUCTIONS.index(reduction)
        if location := int(self._row[1 + level]):
            return self._cache.pixels(location)
        opened = self._opened or open_image(self._read())
        pixels = opened.decode(min_scale)
        # Larger images may be reduced by any factor, not only by those of the index.
        if self.size[0] * self.size[1] <= (images.TILE * reduction) ** 2:
            self._cache.put(self._row, level, opened, pixels)
        return pixels
