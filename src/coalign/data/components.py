"""Connected components of samples that share values."""

from __future__ import annotations

import numpy as np


def connected_components(count: int, samples: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The smallest index in each sample's connected component: int64 [count].

    Sample `samples[i]` has the value `values[i]`; samples with equal values are connected.
    """
    labels = np.arange(count)
    lowest = np.empty(int(values.max(initial=-1)) + 1, dtype=labels.dtype)
    while True:
        lowest.fill(count)
        np.minimum.at(lowest, values, labels[samples])
        merged = labels.copy()
        np.minimum.at(merged, samples, lowest[values])
        # The current root follows, so that whole components merge at once.
        np.minimum.at(merged, labels, merged.copy())
        merged = merged[merged]
        if np.array_equal(merged, labels):
            return labels
        labels = merged
