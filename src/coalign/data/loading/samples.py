"""What the loader needs of the samples' records, packed in arrays: captions as tokens, tags as ids, groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from coalign.data.sources.base import Source
from coalign.errors import BadSample, UserError
from coalign.randomness import stable_hash
from coalign.types import Record


@dataclass(frozen=True)
class BadEntry:
    """A sample that could not be used, and why."""

    key: str
    reason: str
    detail: str
    epoch: int


class Ragged:
    """Integer lists of different lengths."""

    def __init__(self, lists: Iterable[Iterable[int]]) -> None:
        kept = [np.fromiter(each, np.int32) for each in lists]
        self.lengths = np.array([len(each) for each in kept], np.int32)
        self._starts = np.cumsum(self.lengths, dtype=np.int64) - self.lengths
        self._values = np.concatenate([*kept, np.zeros(1, np.int32)])  # one more, so that empty lists have a position

    def __getitem__(self, rows: np.ndarray) -> list[np.ndarray]:
        """The lists at `rows`."""
        ends = self._starts[rows] + self.lengths[rows]
        return [self._values[start:end] for start, end in zip(self._starts[rows].tolist(), ends.tolist())]

    def padded(self, rows: np.ndarray, width: int, padding: int) -> np.ndarray:
        """The lists at `rows`, at most `width` long, as int32 [row, width]."""
        positions = np.arange(width)
        values = self._values.take(self._starts[rows, None] + positions, mode="clip")
        return np.where(positions < self.lengths[rows, None], values, np.int32(padding))


@dataclass
class Samples:
    """The samples at `indices`, ascending. Unusable ones have no captions and tags, and the reason in `bad`.

    The captions of all samples follow each other; the last one is the empty caption, for samples without any.
    """

    indices: np.ndarray  # int64 [sample]
    bad: dict[int, BadSample]  # by row
    tags: Ragged  # ids, of samples
    group_ids: np.ndarray  # int64 [sample], hashes of groups; the index of a sample without one
    paraphrases: dict[int, object]  # by row, as stored in the facts
    num_captions: np.ndarray  # int64 [sample]
    first_caption: np.ndarray  # int64 [sample], number of its first caption
    captions: list[str]
    caption_ids: np.ndarray  # int64 [caption], hashes
    tokens: Ragged  # of captions

    def rows(self, indices: np.ndarray) -> np.ndarray:
        """The rows of samples."""
        return np.searchsorted(self.indices, indices)

    def choose_captions(self, rows: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """The number of one caption of each sample, drawn uniformly. draws: in [0, 1), [row]."""
        counts = self.num_captions[rows]
        return np.where(counts, self.first_caption[rows] + (draws * counts).astype(np.int64), len(self.caption_ids) - 1)


def read_samples(
    source: Source,
    indices: np.ndarray,
    encode: Callable[[str], list[int]],
    check: Callable[[Record], object],
    vocabulary: Mapping[str, int],
    group_column: str | None,
) -> Samples:
    """Reads the records of samples. `check` raises BadSample for a record that cannot be used."""
    indices = np.unique(indices)
    bad: dict[int, BadSample] = {}
    tags: list[list[int]] = []
    groups: list[int] = []
    paraphrases: dict[int, object] = {}
    counts: list[int] = []
    captions: list[str] = []
    for row, index in enumerate(indices.tolist()):
        try:
            with naming(source, index):
                record = source.record(index)
            check(record)
        except BadSample as error:
            bad[row], record = error.copy(), Record("", ())
        tags.append(sorted({vocabulary[tag] for tag in record.tags if tag in vocabulary}))
        group = record.fact(group_column) if group_column else ""
        groups.append(stable_hash("group", group) if group else index)
        if "paraphrases" in record.facts:
            paraphrases[row] = record.facts["paraphrases"]
        counts.append(len(record.captions))
        captions += record.captions
    return Samples(
        indices=indices,
        bad=bad,
        tags=Ragged(tags),
        group_ids=np.array(groups, np.int64),
        paraphrases=paraphrases,
        num_captions=np.array(counts, np.int64),
        first_caption=np.cumsum(counts, dtype=np.int64) - counts,
        captions=[*captions, ""],
        caption_ids=np.array([stable_hash(caption) for caption in [*captions, ""]], np.int64),
        tokens=Ragged(map(encode, [*captions, ""])),
    )


@contextmanager
def naming(source: Source, index: int) -> Iterator[None]:
    """Adds the source and the index to an error that is a bug."""
    try:
        yield
    except (BadSample, UserError):
        raise
    except Exception as error:
        error.add_note(f"while loading {source.name}[{index}]")
        raise


def sample_key(source: Source, index: int) -> str:
    """The key of a sample; for an unusable sample, the source's name and the index."""
    try:
        return source.record(index).key
    except BadSample:
        return f"{source.name}[{index}]"
