"""Mixtures of sources, each sampled in proportion to its weight."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from coalign.data.fingerprints import fingerprints
from coalign.data.sources.base import Classes, Fingerprints, Source, Splits
from coalign.data.splits import nested_subset
from coalign.errors import UserError
from coalign.types import Record

SEPARATOR = " + "  # between the sources of a mixture
_WEIGHTED = re.compile(r"\s*(\d+(?:\.\d+)?)\s*\*\s*(.+)")


class Mixture(Source):
    """The samples of all sources, concatenated.

    Indices wrap around at the length. A sample repeated within an epoch has a different index each time, and therefore different views.
    """

    def __init__(self, sources: Sequence[Source], weights: Sequence[float]) -> None:
        self.sources, self.weights = list(sources), list(weights)
        self.name = SEPARATOR.join(source.name for source in sources)
        self._ends = np.cumsum([len(source) for source in sources])
        self.left_out = [each for source in sources for each in source.left_out]
        self.unread = [each for source in sources for each in source.unread]
        own_splits = [source.splits or {} for source in sources]
        self.splits = _merge_splits(own_splits, self._ends) if any(own_splits) else None
        self.classes = _merge_classes(sources)
        self.has_columns = any(source.has_columns for source in sources)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def record(self, index: int) -> Record:
        source, local_index = self._locate(index)
        record = self.sources[source].record(local_index)
        return replace(record, key=f"{source + 1}:{record.key}")  # unique, although sources may share keys

    def image(self, index: int) -> bytes | np.ndarray:
        source, local_index = self._locate(index)
        return self.sources[source].image(local_index)

    def image_path(self, index: int) -> str | None:
        source, local_index = self._locate(index)
        return self.sources[source].image_path(local_index)

    def fingerprints(self) -> Fingerprints:
        """Fingerprints of all sources, concatenated, so that splits separate captions and images across sources."""
        hashes = [fingerprints(source) for source in self.sources]
        return Fingerprints(
            keys=np.concatenate([each.keys + np.uint64(number) for number, each in enumerate(hashes)]),
            images=np.concatenate([each.images for each in hashes]),
            captions=np.concatenate([each.captions for each in hashes]),
            caption_counts=np.concatenate([each.caption_counts for each in hashes]),
        )

    def epoch_indices(self, indices: np.ndarray) -> np.ndarray:
        """`indices` repeated by source weight: weight 2.5 repeats every sample of a source twice, and half of them a third time."""
        indices = np.asarray(indices, np.int64)
        parts, first = [], 0
        for weight, end in zip(self.weights, self._ends.tolist()):
            own = indices[(indices >= first) & (indices < end)]
            parts += [own + copy * len(self) for copy in range(int(weight))]
            if (fraction := math.modf(weight)[0]) and len(own):
                parts.append(nested_subset(own, fraction) + int(weight) * len(self))
            first = end
        return np.concatenate(parts)

    def _locate(self, index: int) -> tuple[int, int]:
        """Index of the source, and of the sample within it."""
        index %= len(self)
        source = int(np.searchsorted(self._ends, index, side="right"))
        return source, index - (int(self._ends[source - 1]) if source else 0)


def _merge_splits(own_splits: Sequence[Splits], ends: np.ndarray) -> Splits:
    """The sources' splits, merged by name. A source without splits belongs to train."""
    merged: dict[str, list[np.ndarray]] = {}
    first = 0
    for own, end in zip(own_splits, ends.tolist()):
        for name, indices in (own or {"train": np.arange(end - first)}).items():
            merged.setdefault(name, []).append(np.asarray(indices, np.int64) + first)
        first = end
    return {name: np.concatenate(parts) for name, parts in merged.items()}


def _merge_classes(sources: Sequence[Source]) -> Classes | None:
    """The sources' classes, merged by name; None unless all sources have classes."""
    own = [source.classes for source in sources if source.classes is not None]
    if len(own) < len(sources):
        return None
    names = list(dict.fromkeys(name for classes in own for name in classes.names))
    number = {name: i for i, name in enumerate(names)}
    # index -1, no class, takes the last entry
    of = [np.array([*map(number.__getitem__, classes.names), -1], np.int64)[classes.of] for classes in own]
    return Classes(names, np.concatenate(of), own[0].templates)


def open_mixture(spec: str, open_one: Callable[[str], Source]) -> Mixture:
    """Opens a mixture such as `photos.csv + 0.5*web/{00..10}.tar`; the default weight is 1.

    Raises UserError for an empty source or a weight that is not positive.
    """
    sources, weights = [], []
    for part in spec.split(SEPARATOR):
        match = _WEIGHTED.fullmatch(part)
        weight, name = (float(match[1]), match[2]) if match else (1.0, part)
        if not name.strip():
            raise UserError(f"Empty source in {spec!r}; write a mixture as photos.csv + 0.5*web/{{00..10}}.tar.")
        if weight <= 0:
            raise UserError(
                f"The weight of {name.strip()} is {weight:g}, but must be greater than 0; remove the source to exclude it."
            )
        sources.append(open_one(name.strip()))
        weights.append(weight)
    return Mixture(sources, weights)
