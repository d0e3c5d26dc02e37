"""A source some of whose images are kept back, so that these samples are texts alone."""

from __future__ import annotations

import numpy as np

from coalign.errors import NoImage
from coalign.types import Record, Source


class TextsAlone:
    """`source`, where of the samples `train` only those of the `share` have their images."""

    def __init__(self, source: Source, train: np.ndarray, share: np.ndarray) -> None:
        self.source, self.name = source, source.name
        self.is_text = np.zeros(len(source), bool)  # [sample]
        self.is_text[train] = True
        self.is_text[share] = False

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        return self.source.record(index)

    def image(self, index: int) -> bytes | np.ndarray:
        if self.is_text[index % len(self)]:  # a mixture counts on beyond its length
            raise NoImage("image kept back")
        return self.source.image(index)
