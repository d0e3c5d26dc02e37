"""Nearest vectors: exact against sorting all products, and faiss' inverted lists against exact search."""

import faiss
import numpy as np
import pytest

from coalign.workflows.collection import nearest
from coalign.workflows.collection.index_files import write_faiss
from coalign.workflows.collection.nearest import ApproximateVectors, ExactVectors, build, sample_of


def synthetic(count, dim=16, clusters=40, seed=0):
    """Normalized vectors around some centers, as embeddings of images are."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(clusters, dim))[rng.integers(clusters, size=count)] + 0.5 * rng.normal(size=(count, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def sorted_rows(vectors, query, count, rows=None):
    rows = np.arange(len(vectors)) if rows is None else rows
    return rows[np.argsort(-(vectors[rows] @ query), kind="stable")][:count].tolist()


@pytest.fixture(scope="module")
def vectors():
    return synthetic(4000)


@pytest.fixture
def approximate(vectors, monkeypatch):
    monkeypatch.setattr(nearest, "EXACT_BELOW", 1000)
    queries = np.concatenate([vectors[::50], synthetic(80, seed=1)])
    return queries, build(vectors, queries)


def test_exact_search_sorts_all_products(vectors):
    exact = ExactVectors(vectors)
    for query in synthetic(5, seed=2):
        scores, rows = exact.nearest(query, 7)
        assert rows.tolist() == sorted_rows(vectors, query, 7)
        np.testing.assert_allclose(scores, vectors[rows] @ query, rtol=1e-6)
        some = np.arange(3, 4000, 11)
        assert exact.nearest(query, 7, some)[1].tolist() == sorted_rows(vectors, query, 7, some)
    assert len(exact.nearest(vectors[0], 10_000)[1]) == 4000
    assert len(exact.nearest(vectors[0], 5, np.empty(0, np.int64))[1]) == 0


def test_few_vectors_are_searched_exactly(vectors):
    built = build(vectors, vectors[:0])
    assert (built.kind, built.recall) == ("exact", None)
    np.testing.assert_array_equal(nearest.stored_vectors(built.index), vectors)


def test_many_vectors_are_in_lists_whose_recall_is_measured(vectors, approximate):
    queries, built = approximate
    assert built.kind == "ivf"
    assert built.index.nprobe < built.index.nlist  # it does not visit all lists
    _, found = built.index.search(queries, 10)
    shares = [
        len(set(rows.tolist()) & set(sorted_rows(vectors, query, 10))) / 10 for query, rows in zip(queries, found)
    ]
    assert built.recall == pytest.approx(np.mean(shares), abs=1e-9)
    assert built.recall >= nearest.MIN_RECALL


def test_recall_of_fewer_lists_is_lower(vectors, approximate):
    queries, built = approximate
    exact = nearest._exact_rows(vectors, queries)
    built.index.nprobe = 1
    assert nearest.recall_of(built.index.search(queries, 10)[1], exact) < built.recall
    built.index.nprobe = built.index.nlist
    assert nearest.recall_of(built.index.search(queries, 10)[1], exact) == 1


@pytest.mark.parametrize("chunk", [7, 1000, 4000])
def test_exact_rows_do_not_depend_on_blocks(vectors, monkeypatch, chunk):
    monkeypatch.setattr(nearest, "_CHUNK", chunk)
    queries = synthetic(3, seed=3)
    expected = [sorted_rows(vectors, query, 10) for query in queries]
    assert nearest._exact_rows(vectors, queries).tolist() == expected


def test_lists_survive_the_disk_and_search_filtered_rows_exactly(vectors, approximate, tmp_path):
    queries, built = approximate
    write_faiss(built.index, tmp_path / "index.faiss")
    stored = faiss.read_index(str(tmp_path / "index.faiss"))
    assert stored.nprobe == built.index.nprobe
    index = ApproximateVectors(stored, lambda: vectors)
    assert (index.size, index.dim) == vectors.shape
    np.testing.assert_array_equal(index.at(np.array([5, 3999, 0])), vectors[[5, 3999, 0]])
    np.testing.assert_array_equal(sample_of(index), vectors)
    some = np.arange(1, 4000, 97)
    for query in queries[:20]:
        assert index.nearest(query, 12, some)[1].tolist() == sorted_rows(vectors, query, 12, some)
        scores, rows = index.nearest(query, 12)
        np.testing.assert_allclose(scores, vectors[rows] @ query, rtol=1e-5)
    assert index.nearest(queries[0], 12, some[:5])[1].tolist() == sorted_rows(vectors, queries[0], 5, some[:5])
    assert len(index.nearest(queries[0], 12, some[:0])[1]) == 0
