"""A source that withholds some of its images, so that these samples provide unpaired captions."""

from __future__ import annotations

import numpy as np

from coalign.data.sources.base import Source
from coalign.errors import NoImage
from coalign.types import Record


class UnpairedCaptions(Source):
    """`source` with the images of `train` withheld, except those of the samples in `paired`."""

    def __init__(self, source: Source, train: np.ndarray, paired: np.ndarray) -> None:
        self.source, self.name = source, source.name
        self.left_out, self.unread, self.classes = source.left_out, source.unread, source.classes
        self.is_text_only = np.zeros(len(source), bool)  # [sample]
        self.is_text_only[train] = True
        self.is_text_only[paired] = False

    def __len__(self) -> int:
        return len(self.source)

    def record(self, index: int) -> Record:
        return self.source.record(index)

    def image(self, index: int) -> bytes | np.ndarray:
        if self.is_text_only[index % len(self)]:  # a mixture's repeated samples have indices beyond its length
            raise NoImage("image withheld")
        return self.source.image(index)
