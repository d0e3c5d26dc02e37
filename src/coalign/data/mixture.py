"""Several sources as one, each seen as often as its weight says."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from coalign.data.common import Fingerprints, Splits
from coalign.data.splits import fingerprints, nested_share
from coalign.errors import NoCaption, UserError
from coalign.types import Record, Source

MARK = " + "  # between the sources of a mixture
_WEIGHTED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*\*\s*(.+)")


class Mixture:
    """The samples of all sources in order. An index beyond the last is a sample again, with views of its own: index modulo length."""

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources, self.weights = list(sources), list(weights)
        self.name = MARK.join(source.name for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])
        owns = [dict(getattr(source, "splits", None) or {}) for source in sources]
        self.splits: Splits | None = _joined(owns, self._ends) if any(owns) else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> Record:
        number, place = self._locate(index)
        try:
            record = self.sources[number].record(place)
        except NoCaption as bad:
            bad.record = self._named(number, bad.record)
            raise
        return self._named(number, record)

    def image(self, index: int) -> bytes | np.ndarray:
        number, place = self._locate(index)
        return self.sources[number].image(place)

    def fingerprints(self) -> Fingerprints:
        """Of all sources, so that no caption and no image is on both sides of a split, wherever it comes from."""
        found = [fingerprints(source) for source in self.sources]
        return Fingerprints(
            keys=np.concatenate([each.keys + np.uint64(number) for number, each in enumerate(found)]),
            images=np.concatenate([each.images for each in found]),
            captions=np.concatenate([each.captions for each in found]),
            caption_counts=np.concatenate([each.caption_counts for each in found]),
        )

    def weighted(self, indices: np.ndarray) -> np.ndarray:
        """An epoch's samples among `indices`: a source of weight 2.5 gives each of its own twice, and half of them once more."""
        indices = np.asarray(indices, np.int64)
        parts, first = [], 0
        for weight, end in zip(self.weights, self._ends.tolist()):
            own = indices[(indices >= first) & (indices < end)]
            parts += [own + copy * len(self) for copy in range(int(weight))]
            if (rest := math.modf(weight)[0]) and len(own):
                parts.append(nested_share(own, rest) + int(weight) * len(self))
            first = end
        return np.concatenate(parts)

    def _locate(self, index: int) -> tuple[int, int]:
        index %= len(self)
        number = int(np.searchsorted(self._ends, index, side="right"))
        return number, index - (int(self._ends[number - 1]) if number else 0)

    def _named(self, number: int, record: Record) -> Record:
        """Keys of two sources may be the same."""
        return replace(record, key=f"{number + 1}:{record.key}")


def _joined(owns: Sequence[Splits], ends: np.ndarray) -> Splits:
    """Each split of every source; one without splits is all for training."""
    joined: dict[str, list[np.ndarray]] = {}
    first = 0
    for own, end in zip(owns, ends.tolist()):
        for name, indices in (own or {"train": np.arange(end - first)}).items():
            joined.setdefault(name, []).append(np.asarray(indices, np.int64) + first)
        first = end
    return {name: np.concatenate(parts) for name, parts in joined.items()}


def open_mixture(spec: str, open_one: Callable[[str], Source]) -> Mixture:
    """`photos.csv + 0.5*web/{00..10}.tar`: sources with weights, 1 where none is given. UserError for a weight that is none."""
    sources, weights = [], []
    for part in spec.split(MARK):
        found = _WEIGHTED.fullmatch(part)
        weight, name = (float(found[1]), found[2]) if found else (1.0, part)
        if not name.strip():
            raise UserError(
                f"{spec!r} has nothing on one side of a +; write it as photos.csv + 0.5*web/{{00..10}}.tar."
            )
        if weight <= 0:
            raise UserError(f"The weight of {name.strip()} is {weight:g}, but must be more than 0; or leave it out.")
        sources.append(open_one(name.strip()))
        weights.append(weight)
    return Mixture(sources, weights)
