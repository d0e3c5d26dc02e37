"""Decoded images, kept for the next epochs: a file for each process that decodes, and an index of them that all share.

Pixels are those that decoding would give again, so that a run does not depend on its cache, and a cache that cannot be read or written is
none. What of the files is used often, the system keeps in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coalign.data import images
from coalign.data.images import REDUCTIONS, OpenedImage, open_image, reduction

# A sample's row of the index: its size, and for each of a JPEG's reductions where its pixels are. Each is one number, so that a process
# that reads while another writes sees all of it or nothing. In bits: 1 (it is there) | 1 (reducible) | 31 (width) | 31 (height), and
# 1 (it is there) | 10 (file) | 53 (first byte).
_THERE, _REDUCIBLE, _SIDE, _START = 1 << 63, 1 << 62, 31, 53
MAX_FILES = 1 << 10  # processes that ever wrote into one cache: workers, restarted ones too
_HEAD = 8  # bytes before the pixels: their height and width


class ImageCache:
    """Of the images of a source with `samples` samples, in `max_bytes` with the index.

    Several processes may use one folder at once, and one that is made again goes on with what is there. Files are opened when an image is
    first asked for, so that a copy in another process has its own.
    """

    def __init__(self, folder: Path, samples: int, max_bytes: float) -> None:
        self.folder, self.samples, self.max_bytes = folder, samples, max_bytes
        self._process = 0  # that has opened the files

    def __getstate__(self) -> dict[str, object]:
        return {"folder": self.folder, "samples": self.samples, "max_bytes": self.max_bytes, "_process": 0}

    def open(self, index: int, read: Callable[[], bytes | np.ndarray]) -> OpenedImage | CachedImage:
        """The image of a sample, which `read` gets where it is needed. Raises what `read` and `open_image` raise."""
        if self._process != os.getpid():
            self._process = os.getpid()
            self._files: dict[int, np.ndarray] = {}
            self._own: tuple[int, int] | None = None  # number and descriptor of the file that this process writes
            self._rows = self._open()
        return open_image(read()) if self._rows is None else CachedImage(self, self._rows[index % self.samples], read)

    def _open(self) -> np.ndarray | None:
        """The index: uint64 [sample, 1 + reduction]. None where there is no place for one."""
        size = 8 * (MAX_FILES + self.samples * (1 + len(REDUCTIONS)))
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            file = os.open(self.folder / "index", os.O_CREAT | os.O_RDWR, 0o600)
            try:
                # zeros, the same for whoever comes first; with a place on the disk, without which a write to them would end the process
                os.posix_fallocate(file, 0, size)
            finally:
                os.close(file)
            numbers = np.asarray(np.memmap(self.folder / "index", np.uint64, "r+", 0, (size // 8,)))
        except OSError:
            return None
        self._used = numbers[:MAX_FILES]  # bytes of each file
        self._full = size > self.max_bytes
        return numbers[MAX_FILES:].reshape(self.samples, -1)

    def pixels(self, place: int) -> np.ndarray | None:
        """uint8 [height, width, 3], read from the file as it is used; None if it is not there any more."""
        number, start = place >> _START & (MAX_FILES - 1), place & ((1 << _START) - 1)
        try:
            for _ in range(2):
                file = self._files.get(number)
                if file is not None and len(file) >= start + _HEAD:
                    height, width = np.frombuffer(file[start : start + _HEAD], np.uint32).tolist()
                    found = file[start + _HEAD : start + _HEAD + 3 * height * width]
                    if height and len(found) == 3 * height * width:
                        return found.reshape(height, width, 3)
                self._files[number] = np.asarray(np.memmap(self.folder / str(number), np.uint8, "r"))  # it has grown
        except (OSError, ValueError):
            pass
        return None

    def put(self, row: np.ndarray, level: int, opened: OpenedImage, pixels: np.ndarray) -> None:
        """Keeps the pixels, if there is room; a disk that is full is as a cache that is."""
        size = _HEAD + pixels.nbytes
        if self._full or int(row[1 + level]) or float(self._used.sum()) + self._rows_bytes() + size > self.max_bytes:
            return
        try:
            number, file = self._own = self._own or self._new_file()
            start = os.lseek(file, 0, os.SEEK_END)
            head = np.array(pixels.shape[:2], np.uint32).tobytes()
            for view in (memoryview(head), np.ascontiguousarray(pixels).data.cast("B")):
                while view:
                    view = view[os.write(file, view) :]
        except OSError:
            self._full = True
            return
        self._used[number] = start + size
        width, height = opened.size
        row[0] = _THERE | (_REDUCIBLE if opened.reducible else 0) | width << _SIDE | height
        row[1 + level] = _THERE | number << _START | start  # last: whoever sees it sees the rest

    def _rows_bytes(self) -> int:
        return 0 if self._rows is None else self._rows.nbytes + self._used.nbytes

    def _new_file(self) -> tuple[int, int]:
        for number in range(MAX_FILES):
            try:
                flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND
                return number, os.open(self.folder / str(number), flags, 0o600)
            except FileExistsError:
                continue
        raise OSError(f"{self.folder} has {MAX_FILES} files already")


class CachedImage:
    """As `OpenedImage`: a size, and pixels on demand."""

    def __init__(self, cache: ImageCache, row: np.ndarray, read: Callable[[], bytes | np.ndarray]) -> None:
        self._cache, self._row, self._read = cache, row, read
        known = int(row[0])
        self._opened = None if known else open_image(read())
        if self._opened is None:
            self.reducible = bool(known & _REDUCIBLE)
            self.size = (known >> _SIDE & ((1 << _SIDE) - 1), known & ((1 << _SIDE) - 1))
        else:
            self.reducible, self.size = self._opened.reducible, self._opened.size

    def decode(self, min_scale: float = 1.0) -> np.ndarray:
        reduced = reduction(min_scale) if self.reducible else 1
        level = REDUCTIONS.index(reduced)
        place = int(self._row[1 + level])
        found = self._cache.pixels(place) if place else None
        if found is not None:
            return found
        opened = self._opened or open_image(self._read())
        pixels = opened.decode(min_scale)
        if (
            self.size[0] * self.size[1] <= (images.TILE * reduced) ** 2
        ):  # what is larger is reduced by what the scale asks for
            self._cache.put(self._row, level, opened, pixels)
        return pixels
