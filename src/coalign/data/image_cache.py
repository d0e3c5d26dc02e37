"""Decoded images, kept for the next epoch: a file for each process that decodes, and an index of them that all share.

Pixels are those that decoding would give again, so that a run does not depend on its cache. The files lie in a folder of this machine; what
of them is used often, the system keeps in memory.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np

from coalign.data import images
from coalign.data.images import REDUCTIONS, OpenedImage, open_image, reduction

MAX_FILES = 1024  # processes that ever wrote into one cache: workers, restarted ones too
_ENTRY = np.dtype(
    [("file", np.uint16), ("height", np.uint32), ("width", np.uint32), ("start", np.uint64), ("ready", np.bool_)], align=True
)  # fmt: skip
_SAMPLE = np.dtype(
    [("width", np.uint32), ("height", np.uint32), ("reducible", np.bool_), ("pixels", _ENTRY, (len(REDUCTIONS),))], align=True
)  # fmt: skip


class ImageCache:
    """Of the images of a source with `samples` samples, up to `max_bytes` of pixels in all.

    Several processes may use one folder at once, and one that is made again goes on with what is there. It opens its files when it is first
    asked, so that a copy of it in another process has its own.
    """

    def __init__(self, folder: Path, samples: int, max_bytes: float) -> None:
        self.folder, self.samples, self.max_bytes = folder, samples, max_bytes
        self._index: np.ndarray | None = None
        self._process = 0

    def __getstate__(self) -> dict[str, object]:
        return {
            "folder": self.folder,
            "samples": self.samples,
            "max_bytes": self.max_bytes,
            "_index": None,
            "_process": 0,
        }

    def open(self, index: int, read: Callable[[], bytes | np.ndarray]) -> CachedImage:
        """The image of a sample, which `read` gets where it is needed. Raises what `read` and decoding raise."""
        self._open()
        return CachedImage(self, index, read)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _open(self) -> None:
        if self._index is not None and self._process == os.getpid():
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path, size = self.folder / "index", 8 * MAX_FILES + self.samples * _SAMPLE.itemsize
        with open(path, "ab") as file:
            file.truncate(size)  # to zeros; the same for whoever comes first
        self._used = np.memmap(path, np.uint64, "r+", 0, (MAX_FILES,))  # bytes of each file
        self._index = np.memmap(path, _SAMPLE, "r+", 8 * MAX_FILES, (self.samples,))
        self._process = os.getpid()
        self._files: dict[int, np.ndarray] = {}
        self._own: tuple[int, int] | None = None  # number and descriptor of the file that this process writes
        self._full = False

    def sample(self, index: int) -> np.void:
        assert self._index is not None
        return self._index[index]

    def pixels(self, entry: np.void) -> np.ndarray:
        """uint8 [height, width, 3], read from the file as it is used."""
        number, start, shape = int(entry["file"]), int(entry["start"]), (int(entry["height"]), int(entry["width"]), 3)
        stop = start + shape[0] * shape[1] * 3
        if len(self._files.get(number, ())) < stop:  # not opened yet, or it has grown
            self._files[number] = np.asarray(np.memmap(self.folder / str(number), np.uint8, "r"))
        return self._files[number][start:stop].reshape(shape)

    def put(self, index: int, level: int, opened: OpenedImage, pixels: np.ndarray) -> None:
        """Keeps the pixels, if there is room; a disk that is full is as a cache that is."""
        assert self._index is not None
        if self._full or float(self._used.sum()) + pixels.nbytes > self.max_bytes:
            return
        try:
            number, file = self._own = self._own or self._new_file()
            start = os.lseek(file, 0, os.SEEK_END)
            view = np.ascontiguousarray(pixels).data.cast("B")
            while view:
                view = view[os.write(file, view) :]
        except OSError:
            self._full = True
            return
        self._used[number] = start + pixels.nbytes
        sample = self._index[index]
        sample["width"], sample["height"] = opened.size
        sample["reducible"] = opened.reducible
        entry = sample["pixels"][level]
        entry["file"], entry["start"], entry["height"], entry["width"] = number, start, *pixels.shape[:2]
        entry["ready"] = True  # last: whoever sees it sees the rest

    def _new_file(self) -> tuple[int, int]:
        for number in range(MAX_FILES):
            try:
                return number, os.open(self.folder / str(number), os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND)
            except FileExistsError:
                continue
        raise OSError(f"{self.folder} has {MAX_FILES} files already")


class CachedImage:
    """As `OpenedImage`: a size, and pixels on demand."""

    def __init__(self, cache: ImageCache, index: int, read: Callable[[], bytes | np.ndarray]) -> None:
        self._cache, self._index, self._read = cache, index, read
        self._sample = cache.sample(index)
        self._opened: OpenedImage | None = None
        if self._sample["pixels"]["ready"].any():
            self.size = (int(self._sample["width"]), int(self._sample["height"]))
        else:
            self._opened = open_image(read())
            self.size = self._opened.size

    def decode(self, min_scale: float = 1.0) -> np.ndarray:
        reducible = self._opened.reducible if self._opened else bool(self._sample["reducible"])
        reduced = reduction(min_scale) if reducible else 1
        level = REDUCTIONS.index(reduced)
        entry = self._sample["pixels"][level]
        if entry["ready"]:
            return self._cache.pixels(entry)
        opened = self._opened or open_image(self._read())
        pixels = opened.decode(min_scale)
        if (
            self.size[0] * self.size[1] <= (images.TILE * reduced) ** 2
        ):  # what is larger is reduced by what the scale asks for
            self._cache.put(self._index, level, opened, pixels)
        return pixels
