"""Tagging: tag embeddings, IoU, and learning from informative features."""

from collections import Counter

import numpy as np
import pytest
from helpers.metrics import values

from coalign.errors import UserError
from coalign.evaluation.probes.tagging import _iou, pmi_embeddings, tagging, vocabulary


def test_embedding_products_are_the_mutual_information():
    """If the matrix is positive definite, the products of U √S reproduce it."""
    rng = np.random.default_rng(0)
    ids = [sorted(set(rng.integers(0, 6, rng.integers(1, 4)).tolist())) for _ in range(200)]
    embeddings = pmi_embeddings(ids, 6).double().numpy()
    expected = np.zeros((6, 6))
    for i in range(6):
        for j in range(6):
            p_i, p_j = (np.mean([tag in own for own in ids]) for tag in (i, j))
            p_both = np.mean([i in own and j in own for own in ids])
            expected[i, j] = max(0, np.log(p_both / (p_i * p_j))) if p_both else 0
    assert np.linalg.eigvalsh(expected).min() > 0
    np.testing.assert_allclose(embeddings @ embeddings.T, expected, atol=1e-5)
    assert pmi_embeddings(ids, 6, dim=2).shape == (6, 2)


def test_iou():
    assert _iou([[1, 2, 3], [4, 5, 6], [1, 2, 3]], [[3], [7], [1, 2, 3]]).tolist() == [1 / 3, 0, 1]


def test_vocabulary():
    assert vocabulary([["a", "b"], ["b", "b"], ["c", "a", "b"], ["d"]]) == ["b", "a"]
    assert vocabulary([["a", "b"], ["b"], ["a", "b"]], max_size=1) == ["b"]


def groups(count, seed):
    """Images of eight kinds with three tags each; the features encode the kind, with noise."""
    rng = np.random.default_rng(seed)
    kinds = rng.integers(0, 8, count)
    features = np.eye(8, 20)[kinds] + rng.normal(0, 0.1, (count, 20))
    return features.astype(np.float32), [[f"{kind} {number}" for number in range(3)] for kind in kinds]


def test_tags_are_learned():
    train, test = groups(400, 0), groups(100, 1)
    result = tagging(train, test)
    assert result.num_tags == 24
    assert result.untagged == 0
    # three of the top five are correct, which is the maximum
    found = values(result.metrics)
    assert found["miou5"] == pytest.approx(3 / 5, abs=0.03)
    assert found["miou20"] == pytest.approx(3 / 20, abs=0.02)
    # chance: the most frequent training tags, the first of equally frequent ones by name
    counts = Counter(tag for tags in train[1] for tag in tags)
    frequent = sorted(counts, key=lambda tag: (-counts[tag], tag))
    for metric, k in zip(result.metrics, (5, 10, 15, 20), strict=True):
        labels = (f"miou{k}", f"mIOU@{k}", "rate", 100)
        assert (metric.name, metric.title, metric.kind, metric.count) == labels
        ious = [len({*frequent[:k]} & {*tags}) / len({*frequent[:k], *tags}) for tags in test[1]]
        assert metric.chance == pytest.approx(np.mean(ious))
    assert result.metrics[0].chance < 0.2
    noise = np.random.default_rng(2).normal(size=(400, 20)).astype(np.float32)
    assert values(tagging((noise, train[1]), test).metrics)["miou5"] < 0.3
    features, tags = test
    partly = tagging(train, (features, [["unknown"], *tags[1:]]))
    assert (partly.untagged, partly.metrics[0].count) == (1, 99)


def test_no_tags_raises():
    features, tags = groups(50, 0)
    for train, test, name in (
        ((features, [[]] * 50), (features, tags), "train"),
        ((features, tags), (features, [["x"]] * 50), "test"),
    ):
        with pytest.raises(UserError, match=f"no image of the {name} split"):
            tagging(train, test)
