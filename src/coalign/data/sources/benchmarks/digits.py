"""Handwritten digits that scikit-learn contains: 1,797 images of 8 × 8 pixels (Alpaydin and Kaynak 1998)."""

from __future__ import annotations

import numpy as np

from coalign.data.sources.base import Source
from coalign.types import Record

DIGITS = "digits"
_MAX = 16  # the darkest value of a pixel
_NUM_TRAIN = 898


class Digits(Source):
    """The digits in dark ink on white, without captions; their classes are "0" to "9".

    The splits are those of scikit-learn's example: the first half is train, the second is test.
    """

    name = DIGITS
    prompts = ('a photo of the number: "{}".',)  # CLIP's for MNIST

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        digits = load_digits()
        ink = digits.images / _MAX  # [sample, height, width]
        self._images = np.repeat(np.rint(255 * (1 - ink)).astype(np.uint8)[..., None], 3, axis=3)
        self._labels = digits.target
        self.splits = {"train": np.arange(_NUM_TRAIN), "test": np.arange(_NUM_TRAIN, len(self._labels))}

    def __len__(self) -> int:
        return len(self._labels)

    def record(self, index: int) -> Record:
        return Record(f"{DIGITS}[{index}]", (), facts={"label": str(self._labels[index])})

    def image(self, index: int) -> np.ndarray:
        return self._images[index]
