"""Views of locked towers: their features, computed once, take the place of pixels and token ids in a batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coalign.data.images.decode import open_image
from coalign.data.loading.feature_file import BAD, FeatureFile
from coalign.data.loading.samples import Samples, naming
from coalign.data.sources.base import Source
from coalign.errors import BadSample
from coalign.randomness import Draws


@dataclass(frozen=True)
class CachedImages:
    """The image views of a plan. A row of the file is a sample.

    variants: of each view, the numbers of its variants in the file, of which each epoch draws one.
    indices: int64 [row], ascending, the sample of each row. Repeated samples of a mixture share a row.
    """

    file: FeatureFile
    variants: Mapping[str, tuple[int, ...]]
    source: Source
    indices: np.ndarray

    def draw(self, draws: Draws) -> tuple[np.ndarray, np.ndarray, dict[int, BadSample]]:
        """Returns features, uint16 [view, sample, width], parameters, float32 [view, sample, 11], and the unusable samples by position."""
        rows = np.searchsorted(self.indices, draws.indices % len(self.source))
        chosen = _choose(self.variants, draws, "")
        bad = np.flatnonzero(self.file.state[rows] == BAD).tolist()
        failures = {position: self._reason(int(draws.indices[position])) for position in bad}
        features = np.stack([self.file.features(rows, each) for each in chosen])
        return features, np.stack([self.file.params(rows, each) for each in chosen]), failures

    def _reason(self, index: int) -> BadSample:
        """Reads a bad image again, of which the file keeps no reason."""
        try:
            with naming(self.source, index):
                open_image(self.source.image(index)).decode()
        except BadSample as bad:
            return bad.copy()
        return BadSample("unreadable image", "when its features were computed")


@dataclass(frozen=True)
class CachedTexts:
    """The text views of a plan. A row of the file is a caption, in the order of `samples`."""

    file: FeatureFile
    variants: Mapping[str, tuple[int, ...]]
    samples: Samples

    def draw(self, captions: np.ndarray, draws: Draws) -> np.ndarray:
        """Returns the features of captions, uint16 [view, sample, width]."""
        return np.stack([self.file.features(captions, each) for each in _choose(self.variants, draws, "text/")])


def _choose(variants: Mapping[str, tuple[int, ...]], draws: Draws, prefix: str) -> list[np.ndarray]:
    """Draws one of the variants of each view, int64 [sample] per view."""
    chosen = []
    for name, numbers in variants.items():
        uniform = draws.uniform(f"{prefix}{name}/features", 1)[:, 0]
        chosen.append(np.array(numbers)[(uniform * len(numbers)).astype(np.int64)])
    return chosen


@dataclass(frozen=True)
class CachedViews:
    """The views of a plan whose features are cached. None: the loader makes them."""

    images: CachedImages | None = None
    texts: CachedTexts | None = None

    def empty(self, samples: int) -> tuple[np.ndarray, np.ndarray]:
        """Returns arrays for the features of image and of text views, uint16 [view, sample, width]."""
        shapes = [
            (len(kind.variants), samples, kind.file.width) if kind else (0, samples, 0)
            for kind in (self.images, self.texts)
        ]
        images, texts = (np.zeros(shape, np.uint16) for shape in shapes)
        return images, texts


NOTHING_CACHED = CachedViews()


def to_float(bits: np.ndarray) -> Tensor:
    """Converts the bits of bfloat16 numbers to float32."""
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float()


def to_bits(features: Tensor) -> np.ndarray:
    """Converts features to the bits of bfloat16 numbers, uint16."""
    return features.to("cpu", torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
