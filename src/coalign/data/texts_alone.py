"""A source some of whose images are kept back, so that these samples are texts alone."""

from __future__ import annotations

import numpy as np

from coalign.errors import NoImage
from coalign.types import Record, Source


class TextsAlone:
    """`source` without the images of the samples `indices`."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.name = source, source.name
        self._texts = np.zeros(len(source), bool)
        self._texts[indices] = True

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        return self.source.record(index)

    def image(self, index: int) -> bytes | np.ndarray:
        if self._texts[index % len(self)]:  # a mixture counts on beyond its length
            raise NoImage("image kept back", self.record(index).key)
        return self.source.image(index)
