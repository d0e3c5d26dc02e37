"""A file of the features of a locked tower, in bfloat16, mapped into memory: a row per sample or caption, in one or more variants.

Layout: the key, as JSON | the state of each row, uint8 [row] | the parameters of image views, float32 [row, variant, 11] | the features,
bfloat16 [row, variant, width].
"""

from __future__ import annotations

import json
import mmap
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from coalign.errors import UserError
from coalign.files import write_at, write_atomically
from coalign.formatting import data_size

MISSING, DONE, BAD = 0, 1, 2  # states of a row
_KEY_BYTES = 1024
_ALIGNMENT = 64


class FeatureFile:
    """The features of `rows` samples or captions, each in `variants` variants of `width` numbers and `num_params` view parameters.

    Several processes may write different rows and read at the same time. A row is complete if its state is not MISSING: the state is
    written after the features have reached the disk.
    """

    def __init__(self, path: Path, rows: int, variants: int, width: int, num_params: int = 0) -> None:
        self.path, self.rows, self.variants, self.width, self.num_params = path, rows, variants, width, num_params
        self._state_start = _KEY_BYTES
        self._params_start = _aligned(self._state_start + rows)
        self._features_start = _aligned(self._params_start + 4 * rows * variants * num_params)
        self.num_bytes = self._features_start + 2 * rows * variants * width

    def __getstate__(self) -> dict[str, object]:  # for loader workers, which map the file themselves
        return {name: value for name, value in vars(self).items() if name != "_map"}

    # ------------------------------------------------------------ creation

    def prepare(self, key: Mapping[str, str]) -> str | None:
        """Creates the file, or keeps the one that exists if it has this key and the right size. Returns why another one was replaced."""
        problem = self._problem(key)
        if problem is None:
            return None
        existed = self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if (missing := self.num_bytes - shutil.disk_usage(self.path.parent).free) > 0:
                raise UserError(
                    f"The features in {self.path} take {data_size(self.num_bytes)}, {data_size(missing)} more than the disk has free; "
                    "free some space, or choose another folder with --feature-folder."
                )
            write_atomically(self.path, lambda temporary: self._create(temporary, key))
        except OSError as error:
            raise self._unwritable(error) from error
        return problem if existed else None

    def _create(self, path: Path, key: Mapping[str, str]) -> None:
        with open(path, "wb") as file:
            file.write(json.dumps(key).encode().ljust(_KEY_BYTES))
            file.write(bytes(self._params_start - _KEY_BYTES))
            file.truncate(self.num_bytes)

    def _problem(self, key: Mapping[str, str]) -> str | None:
        """Returns why the file cannot be used, None if it can."""
        try:
            with open(self.path, "rb") as file:
                stored = json.loads(file.read(_KEY_BYTES))
        except FileNotFoundError:
            return "there is none"
        except (OSError, ValueError):
            return "its first bytes are damaged"
        if differing := [name for name in key if not isinstance(stored, dict) or stored.get(name) != key[name]]:
            return f"it was made with other {' and '.join(differing)}"
        size = self.path.stat().st_size
        return None if size == self.num_bytes else f"it has {size:,} bytes instead of {self.num_bytes:,}"

    # ------------------------------------------------------------ reading

    @property
    def state(self) -> np.ndarray:
        """The state of each row, uint8 [row], as other processes write it."""
        return np.frombuffer(self._mapped(), np.uint8, self.rows, self._state_start)

    def num_complete(self) -> int:
        """The number of complete rows, over all processes."""
        return int(np.count_nonzero(self.state != MISSING))

    def features(self, rows: np.ndarray, variants: np.ndarray) -> np.ndarray:
        """Returns the bits of bfloat16 features, uint16 [sample, width]."""
        numbers = np.frombuffer(self._mapped(), np.uint16, self.rows * self.variants * self.width, self._features_start)
        return numbers.reshape(-1, self.width).take(rows * self.variants + variants, axis=0)

    def params(self, rows: np.ndarray, variants: np.ndarray) -> np.ndarray:
        """Returns the parameters of the views, float32 [sample, num_params]."""
        count = self.rows * self.variants * self.num_params
        numbers = np.frombuffer(self._mapped(), np.float32, count, self._params_start)
        return numbers.reshape(-1, self.num_params).take(rows * self.variants + variants, axis=0)

    def _mapped(self) -> mmap.mmap:
        if "_map" not in vars(self):
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), self.num_bytes, access=mmap.ACCESS_READ)
            with suppress(AttributeError):  # not on every system
                self._map.madvise(mmap.MADV_RANDOM)
        return self._map

    # ------------------------------------------------------------ writing

    def write(self, first: int, features: np.ndarray, params: np.ndarray | None, bad: np.ndarray) -> None:
        """Writes consecutive rows from `first` on: uint16 [row, variant, width], float32 [row, variant, num_params], and bool [row].

        Raises UserError if the disk is full.
        """
        state = np.where(bad, BAD, DONE).astype(np.uint8)
        try:
            file = os.open(self.path, os.O_WRONLY | getattr(os, "O_BINARY", 0))
            try:
                _write(file, features, self._features_start + 2 * first * self.variants * self.width)
                if params is not None:
                    _write(file, params, self._params_start + 4 * first * self.variants * self.num_params)
                os.fsync(file)
                _write(file, state, self._state_start + first)
            finally:
                os.close(file)
        except OSError as error:
            raise self._unwritable(error) from error

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(
            f"The features in {self.path} could not be written ({error.strerror}); free some disk space, then run it again with "
            "--resume auto."
        )


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _write(file: int, values: np.ndarray, start: int) -> None:
    write_at(file, np.ascontiguousarray(values).data.cast("B"), start)
