"""Embeds the samples of a part, and makes its table."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from coalign.data.loading.eval import image_batches
from coalign.data.loading.samples import BadEntry
from coalign.data.sources.base import Source
from coalign.data.text.captions import printable
from coalign.data.text.context import CutTexts, cut_texts
from coalign.evaluation.embed import embed_images, embed_texts
from coalign.types import DualEncoder
from coalign.workflows.collection.embedding_plan import UNREAD, SampleReader, Task

if TYPE_CHECKING:
    import pyarrow

_BATCH = 256  # images that are encoded at once

Vectors = Sequence[np.ndarray | BadEntry | None]  # of samples; None: there is none, BadEntry: the image is unreadable


def image_vectors(
    encoder: DualEncoder, source: Source, indices: np.ndarray, workers: int, on_progress: Callable[[int], None]
) -> Generator[np.ndarray | BadEntry, None, None]:
    """Yields the normalized embedding of each image, in order, or why it cannot be read. Closing it terminates the workers."""
    batches = image_batches(source, indices, encoder.image_size, _BATCH, workers, encoder.preprocess)
    done = 0
    with closing(batches):
        for good, pixels, bad in batches:
            batch = indices[done : done + len(good) + len(bad)].tolist()
            done += len(batch)
            embeds = iter(embed_images(encoder, [(good, pixels, bad)]).embeds.numpy() if good else ())
            is_good, failures = set(good), iter(bad)
            for index in batch:
                yield next(embeds) if index in is_good else next(failures)
            on_progress(done)


@dataclass
class ChunkEncoder:
    """Makes the tables of parts.

    root: the folder that the paths of images are relative to.
    """

    encoder: DualEncoder
    reader: SampleReader
    columns: pyarrow.Schema
    dim: int
    root: Path | None

    def __post_init__(self) -> None:
        self.cut = CutTexts(0, 0, 0, self.encoder.context_length or 0)

    @property
    def has_texts(self) -> bool:
        return "text" in self.columns.names

    def table(self, task: Task, images: Vectors, old: pyarrow.Table | None) -> pyarrow.Table:
        """Returns the rows of a part: those of its old table that are kept, and those of samples with these embeddings of images."""
        import pyarrow

        is_new = task.kept < 0
        new = self._rows(task.embedded, task.stamps[is_new], images)
        if old is None:
            return new
        position = np.where(is_new, len(old) + np.cumsum(is_new) - 1, task.kept)
        old = old.select(self.columns.names).replace_schema_metadata(None).cast(self.columns)
        return pyarrow.concat_tables([old, new]).take(pyarrow.array(position))

    def _rows(self, indices: np.ndarray, stamps: np.ndarray, images: Vectors) -> pyarrow.Table:
        import pyarrow

        values: dict[str, list[Any]] = {name: [] for name in ("key", "captions", "tags", "path", "stamp", "problem")}
        for index, stamp, image in zip(indices.tolist(), stamps.tolist(), images):
            record, bad = self.reader.record(index)
            problem = image.reason if isinstance(image, BadEntry) else bad and bad.reason
            path = self.reader.path(index)
            stamp = self.reader.stamp(index, record) if stamp == UNREAD else stamp
            row = (record.key, record.captions, record.tags, self._relative(path), f"{stamp:016x}", problem)
            for column, value in zip(values.values(), row):
                column.append(value)
        arrays = [pyarrow.array(column, self.columns.field(name).type) for name, column in values.items()]
        if "image" in self.columns.names:
            arrays.append(self._vectors([None if isinstance(each, BadEntry) else each for each in images]))
        if self.has_texts:
            arrays.append(self._vectors(self._text_vectors(values["captions"])))
        return pyarrow.table(arrays, schema=self.columns)

    def _text_vectors(self, captions: Sequence[Sequence[str]]) -> list[np.ndarray | None]:
        """Returns the mean of each sample's normalized caption embeddings, normalized; None without captions."""
        texts = [text for each in captions for text in each]
        if not texts:
            return [None] * len(captions)
        self._count_cut(texts)
        embeds = embed_texts(self.encoder, texts)
        owners = torch.repeat_interleave(torch.arange(len(captions)), torch.tensor(list(map(len, captions))))
        sums: Tensor = torch.zeros(len(captions), self.dim).index_add_(0, owners, embeds)
        return [vector if own else None for vector, own in zip(F.normalize(sums).numpy(), captions)]

    def _count_cut(self, texts: Sequence[str]) -> None:
        encoder = self.encoder
        if encoder.num_tokens is not None and encoder.context_length is not None:
            self.cut = join_cut([self.cut, cut_texts(set(texts), encoder.num_tokens, encoder.context_length)])

    def _vectors(self, vectors: Sequence[np.ndarray | None]) -> pyarrow.Array:
        import pyarrow

        numbers = self.columns.field(self.columns.names[-1]).type.value_type
        values = np.zeros((len(vectors), self.dim), numbers.to_pandas_dtype())
        for row, vector in enumerate(vectors):
            if vector is not None:
                values[row] = vector
        absent = pyarrow.array([vector is None for vector in vectors], pyarrow.bool_())
        return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values.reshape(-1), numbers), self.dim, mask=absent)

    def _relative(self, path: str | None) -> str | None:
        if path is None:
            return None
        if self.root is not None:
            relative = os.path.relpath(path, self.root)
            path = path if relative.startswith(os.pardir) else relative
        return printable(path)


def join_cut(parts: Sequence[CutTexts]) -> CutTexts:
    """Returns the counts over all parts."""
    cut, texts = (sum(getattr(part, name) for part in parts) for name in ("cut", "texts"))
    return CutTexts(cut, texts, max(part.longest for part in parts), parts[0].context_length)
