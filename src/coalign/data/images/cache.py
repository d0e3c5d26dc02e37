"""Disk cache of decoded images for later epochs: one pixel file per decoding process, and an index that all processes share.

Cached pixels equal decoded ones, so a run does not depend on its cache. If the cache cannot be read or written, images are decoded instead.
The operating system keeps frequently used parts of the files in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coalign.data.images import decode as images
from coalign.data.images.decode import REDUCTIONS, OpenedImage, jpeg_reduction, open_image

# A sample's row of the index: its size, then the location of its pixels for each JPEG reduction. Each entry is one 64-bit number, so that
# concurrent readers see either nothing or a complete entry. Bits of the size: 1 (valid) | 1 (reducible) | 31 (width) | 31 (height);
# of a location: 1 (valid) | 10 (file) | 53 (first byte).
_VALID, _REDUCIBLE, _SIDE_BITS, _OFFSET_BITS = 1 << 63, 1 << 62, 31, 53
MAX_FILES = 1 << 10  # processes that can ever write to one cache, including restarted workers
_HEADER_BYTES = 8  # height and width, before the pixels


class ImageCache:
    """Caches the decoded images of a source with `samples` samples in `folder`, in at most `max_bytes` including the index.

    Several processes may share a folder, and a new cache reuses existing entries. Files are opened on first use, so that every process
    opens its own.
    """

    def __init__(self, folder: Path, samples: int, max_bytes: float) -> None:
        self.folder, self.samples, self.max_bytes = folder, samples, max_bytes
        self._process = 0  # id of the process that has opened the files

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "samples": self.samples, "max_bytes": self.max_bytes, "_process": 0}

    def open(self, index: int, read: Callable[[], bytes | np.ndarray]) -> OpenedImage | CachedImage:
        """Opens a sample's image. `read` is called only if it is not cached. Raises whatever `read` and `open_image` raise."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._files: dict[int, np.ndarray] = {}
            self._own_file: tuple[int, int] | None = None  # number and descriptor of this process's file
            self._rows = self._open_index()
        return open_image(read()) if self._rows is None else CachedImage(self, self._rows[index % self.samples], read)

    def _open_index(self) -> np.ndarray | None:
        """The memory-mapped index, uint64 [sample, 1 + reduction]; None if it cannot be created."""
        size = 8 * (MAX_FILES + self.samples * (1 + len(REDUCTIONS)))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self.folder / "index", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                # Fills a new file with zeros. Allocates disk space: writing to a mapped page without space would kill the process.
                os.posix_fallocate(file, 0, size)
            finally:
                os.close(file)
            numbers = np.asarray(np.memmap(self.folder / "index", np.uint64, "r+", 0, (size // 8,)))
        except OSError:
            return None
        self._used = numbers[:MAX_FILES]  # bytes of each file
        self._full = size > self.max_bytes
        return numbers[MAX_FILES:].reshape(self.samples, -1)

    def pixels(self, location: int) -> np.ndarray | None:
        """Memory-mapped pixels, uint8 [height, width, 3]; None if the file is missing or damaged."""
        number, start = location >> _OFFSET_BITS & (MAX_FILES - 1), location & ((1 << _OFFSET_BITS) - 1)
        try:
            for _ in range(2):
                file = self._files.get(number)
                if file is not None and len(file) >= start + _HEADER_BYTES:
                    height, width = np.frombuffer(file[start : start + _HEADER_BYTES], np.uint32).tolist()
                    pixels = file[start + _HEADER_BYTES : start + _HEADER_BYTES + 3 * height * width]
                    if height and len(pixels) == 3 * height * width:
                        return pixels.reshape(height, width, 3)
                # Map the file, again if it has grown since.
                self._files[number] = np.asarray(np.memmap(self.folder / str(number), np.uint8, "r"))
        except (OSError, ValueError):
            pass
        return None

    def put(self, row: np.ndarray, level: int, opened: OpenedImage, pixels: np.ndarray) -> None:
        """Caches the pixels if the cache and the disk have room."""
        size = _HEADER_BYTES + pixels.nbytes
        if self._full or int(row[1 + level]) or float(self._used.sum()) + self._index_bytes() + size > self.max_bytes:
            return
        try:
            number, file = self._own_file = self._own_file or self._new_file()
            start = os.lseek(file, 0, os.SEEK_END)
            header = np.array(pixels.shape[:2], np.uint32).tobytes()
            for buffer in (memoryview(header), np.ascontiguousarray(pixels).data.cast("B")):
                while buffer:
                    buffer = buffer[os.write(file, buffer) :]
        except OSError:
            self._full = True
            return
        self._used[number] = start + size
        width, height = opened.size
        row[0] = _VALID | (_REDUCIBLE if opened.reducible else 0) | width << _SIDE_BITS | height
        row[1 + level] = _VALID | number << _OFFSET_BITS | start  # last, since readers check it first

    def _index_bytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes + self._used.nbytes

    def _new_file(self) -> tuple[int, int]:
        for number in range(MAX_FILES):
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
                return number, os.open(self.folder / str(number), flags, 0o600)
            except FileExistsError:
                continue
        raise OSError(f"{self.folder} already has {MAX_FILES} files")


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

    def decode(self, min_scale: float = 1.0) -> np.ndarray:
        reduction = jpeg_reduction(min_scale) if self.reducible else 1
        level = REDUCTIONS.index(reduction)
        location = int(self._row[1 + level])
        cached = self._cache.pixels(location) if location else None
        if cached is not None:
            return cached
        opened = self._opened or open_image(self._read())
        pixels = opened.decode(min_scale)
        # Larger images may be reduced by any factor, not only by those of the index.
        if self.size[0] * self.size[1] <= (images.TILE * reduction) ** 2:
            self._cache.put(self._row, level, opened, pixels)
        return pixels
