"""Nearest vectors: exact by one matrix product, or approximate by faiss' inverted lists, whose recall is measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from coalign.errors import UserError
from coalign.progress import progress

EXACT_BELOW = 200_000  # vectors; an exact search of fewer takes a few hundredths of a second
RECALL_AT = 10  # of the approximate kind, against exact search
MIN_RECALL = 0.95  # inverted lists are added to the search until it is reached
NUM_QUERIES = 1000  # on which the recall is measured
SAMPLE = 10_000  # vectors that the statistics of a query are computed on

_ITERATIONS = 10  # of k-means
_TRAIN_PER_LIST = 64  # vectors that k-means learns from, per list
_CHUNK = 50_000  # vectors added at a time

Ranked = tuple[np.ndarray, np.ndarray]  # scores float32 and rows int64, best first


class Vectors(Protocol):
    """The vectors of a collection, float32 [row, dim]."""

    kind: str
    size: int
    dim: int

    def nearest(self, query: np.ndarray, count: int, rows: np.ndarray | None = None) -> Ranked:
        """Returns the rows whose vectors have the largest products with `query` [dim], of all rows or of `rows`."""
        ...

    def at(self, rows: np.ndarray) -> np.ndarray:
        """Returns the vectors at `rows`, [row, dim]."""
        ...

    def all(self) -> np.ndarray:
        """Returns all vectors, [size, dim]."""
        ...


class ExactVectors:
    """Vectors that are all compared with the query."""

    kind = "exact"

    def __init__(self, vectors: np.ndarray) -> None:
        self._vectors = vectors
        self.size, self.dim = vectors.shape

    def nearest(self, query: np.ndarray, count: int, rows: np.ndarray | None = None) -> Ranked:
        scores = (self._vectors if rows is None else self._vectors[rows]) @ query.astype(np.float32)
        count = min(count, len(scores))
        top = np.argpartition(-scores, count - 1)[:count] if count else np.empty(0, np.int64)
        top = top[np.lexsort((top, -scores[top]))]
        return scores[top], top if rows is None else rows[top]

    def at(self, rows: np.ndarray) -> np.ndarray:
        return self._vectors[rows]

    def all(self) -> np.ndarray:
        return self._vectors


class ApproximateVectors:
    """Vectors in faiss' inverted lists, of which a query visits the nearest. A filtered search visits all lists, so it is exact.

    load: reads all vectors, which happens on the first call of `all`.
    """

    kind = "ivf"

    def __init__(self, index: Any, load: Callable[[], np.ndarray]) -> None:
        self._index, self._load = index, load
        self._all: np.ndarray | None = None
        self.size, self.dim = index.ntotal, index.d
        index.make_direct_map()  # for `at`

    def nearest(self, query: np.ndarray, count: int, rows: np.ndarray | None = None) -> Ranked:
        import faiss

        queries, count = np.ascontiguousarray(query[None], np.float32), min(count, self.size)
        if rows is not None and not len(rows):  # faiss refuses to search for nothing
            return np.empty(0, np.float32), np.empty(0, np.int64)
        if rows is None:
            scores, found = self._index.search(queries, count)
        else:
            selector: Any = faiss.IDSelectorBatch(rows)
            selected = faiss.SearchParametersIVF(sel=selector, nprobe=self._index.nlist)  # type: ignore[call-arg]
            scores, found = self._index.search(queries, min(count, len(rows)), params=selected)
        kept = found[0] >= 0  # the lists that are visited may have fewer
        return scores[0][kept], found[0][kept]

    def at(self, rows: np.ndarray) -> np.ndarray:
        return self._index.reconstruct_batch(np.ascontiguousarray(rows, np.int64))

    def all(self) -> np.ndarray:
        if self._all is None:
            self._all = self._load()
        return self._all


def sample_of(vectors: Vectors) -> np.ndarray:
    """Returns the vectors of at most `SAMPLE` rows, the same at every call."""
    rows = np.arange(vectors.size)
    if vectors.size > SAMPLE:
        rows = np.sort(np.random.default_rng(0).choice(vectors.size, SAMPLE, replace=False))
    return vectors.at(rows)


@dataclass(frozen=True)
class Built:
    index: Any  # of faiss
    kind: str  # exact or ivf
    recall: float | None  # recall@10 against exact search; None: it is exact


def require_faiss() -> Any:
    """Returns the module. Raises UserError if it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError('An index needs the extra "index": pip install "coalign[index]".') from None
    return faiss


def build(vectors: np.ndarray, queries: np.ndarray) -> Built:
    """Builds a faiss index of vectors [row, dim] for inner products: exact below `EXACT_BELOW` vectors, else inverted lists.

    The lists that a search visits are doubled until its recall@10 on `queries` [query, dim] is at least `MIN_RECALL`.
    """
    faiss = require_faiss()
    vectors = np.ascontiguousarray(vectors, np.float32)
    if len(vectors) < EXACT_BELOW:
        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return Built(index, "exact", None)
    index = inverted_lists(vectors)
    exact = _exact_rows(vectors, queries)
    index.nprobe, recall = 1, 0.0
    while True:
        recall = recall_of(index.search(np.ascontiguousarray(queries, np.float32), RECALL_AT)[1], exact)
        if recall >= MIN_RECALL or index.nprobe == index.nlist:
            return Built(index, "ivf", recall)
        index.nprobe = min(2 * index.nprobe, index.nlist)


def stored_vectors(index: Any) -> np.ndarray:
    """Returns a copy of the vectors of an exact faiss index, float32 [row, dim]; a view of its memory would outlive it."""
    return index.reconstruct_n(0, index.ntotal)


def inverted_lists(vectors: np.ndarray) -> Any:
    """Returns a faiss index of vectors [row, dim] in 2·√n lists around centroids from k-means."""
    faiss = require_faiss()
    count, dim = vectors.shape
    num_lists = max(1, round(2 * math.sqrt(count)))
    size = min(count, _TRAIN_PER_LIST * num_lists)
    sample = vectors[np.sort(np.random.default_rng(0).choice(count, size, replace=False))]
    options = {"niter": 1, "spherical": True, "seed": 0, "min_points_per_centroid": 1}
    centroids = None
    with progress("Clustering", _ITERATIONS) as task:
        for iteration in range(_ITERATIONS):  # one at a time, to show the progress
            kmeans = faiss.Kmeans(dim, num_lists, **options)
            kmeans.train(sample, init_centroids=centroids)
            centroids = kmeans.centroids
            task.update(iteration + 1)
    quantizer = faiss.IndexFlatIP(dim)
    quantizer.add(centroids)
    index = faiss.IndexIVFFlat(quantizer, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    with progress("Indexing", count) as task:
        for start in range(0, count, _CHUNK):
            index.add(vectors[start : start + _CHUNK])
            task.update(min(start + _CHUNK, count))
    return index


def recall_of(found: np.ndarray, exact: np.ndarray) -> float:
    """Returns the fraction of the exact rows [query, k] that are among those found."""
    return (
        float(np.mean([len(set(one) & set(other)) for one, other in zip(found.tolist(), exact.tolist())]))
        / (exact.shape[1])
    )


def _exact_rows(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """Returns the nearest `RECALL_AT` rows of each query, [query, k], one block of vectors at a time."""
    scores = np.empty((len(queries), 0), np.float32)
    rows = np.empty((len(queries), 0), np.int64)
    with progress("Measuring recall", len(vectors)) as task:
        for start in range(0, len(vectors), _CHUNK):
            block = queries.astype(np.float32) @ vectors[start : start + _CHUNK].T
            count = min(RECALL_AT, block.shape[1])
            top = np.argpartition(-block, count - 1, axis=1)[:, :count]
            scores = np.concatenate([scores, np.take_along_axis(block, top, 1)], axis=1)
            rows = np.concatenate([rows, top + start], axis=1)
            best = np.argsort(-scores, axis=1, kind="stable")[:, :RECALL_AT]
            scores, rows = np.take_along_axis(scores, best, 1), np.take_along_axis(rows, best, 1)
            task.update(min(start + _CHUNK, len(vectors)))
    return rows
