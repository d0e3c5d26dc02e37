"""The sample order of an epoch: a permutation that is computed on the fly, not stored."""

from __future__ import annotations

import math

import numpy as np

from coalign.randomness import mix, stable_hash

_ROUNDS = 4
_U = np.uint64


class Permutation:
    """A pseudo-random permutation of 0 … n-1 in constant memory: `permutation[positions]`, vectorized.

    A generalized Feistel network on Z_a × Z_b with a·b just above n: each round adds to each half a keyed hash of the
    other, which is a bijection. Values ≥ n are mapped again until they are below n (cycle walking; Black and Rogaway, 2002).
    """

    def __init__(self, n: int, *key: object) -> None:
        self.n = n
        rows = math.isqrt(n - 1) + 1
        self._rows, self._columns = _U(rows), _U(-(-n // rows))
        self._keys = [(_U(stable_hash(*key, 2 * i)), _U(stable_hash(*key, 2 * i + 1))) for i in range(_ROUNDS)]

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, positions: np.ndarray) -> np.ndarray:
        """int64 values at integer positions of any shape. Raises IndexError for positions outside 0 … n-1."""
        positions = np.asarray(positions)
        if ((positions < 0) | (positions >= self.n)).any():
            raise IndexError(f"positions must be in 0 … {self.n - 1}")
        values = self._feistel(positions.astype(_U).ravel())
        while (outside := values >= self.n).any():
            values[outside] = self._feistel(values[outside])
        return values.astype(np.int64).reshape(positions.shape)

    def _feistel(self, values: np.ndarray) -> np.ndarray:
        row, column = np.divmod(values, self._columns)
        for row_key, column_key in self._keys:
            row = (row + mix(column + row_key) % self._rows) % self._rows
            column = (column + mix(row + column_key) % self._columns) % self._columns
        return row * self._columns + column


def order(n: int, seed: int, epoch: int) -> Permutation:
    """The sample order of one epoch: `order(n, seed, epoch)[positions]` returns the sample indices at `positions`."""
    return Permutation(n, "order", seed, epoch)
