"""Few-shot probes, SGD probes and nearest neighbors, on scikit-learn's digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.metrics import by_name, values
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from coalign.errors import UserError
from coalign.evaluation.probes.few_shot import few_shot
from coalign.evaluation.probes.knn import knn
from coalign.evaluation.probes.sgd import PROTOCOLS, sgd_probe


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    return [(features[rows], labels[rows]) for rows in (slice(0, 900), slice(900, 1200), slice(1200, None))]


@pytest.mark.parametrize("k", [1, 20])
def test_knn_matches_scikit_learn(digits, k):
    train, _, test = digits
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    predicted = theirs.fit(*train).predict(test[0])
    expected = predicted == test[1]
    top1, per_class = metrics = knn(train, test, 10, k)
    assert (top1.outcome.values == expected).mean() > 0.998  # ties of cosines
    assert top1.value == pytest.approx(expected.mean(), abs=0.002)
    assert per_class.value == pytest.approx(balanced_accuracy_score(test[1], predicted), abs=0.002)
    np.testing.assert_array_equal(per_class.outcome.groups, test[1])
    assert [(m.name, m.title, m.kind, m.chance, m.count) for m in metrics] == [
        ("acc1", "k-NN top-1", "rate", 0.1, len(test[1])),
        ("mean_per_class_recall", "k-NN mean per class", "rate", 0.1, len(test[1])),
    ]


def test_knn_with_fewer_images_than_neighbors(digits):
    train, _, test = digits
    few = train[0][:5], train[1][:5]
    assert values(knn(few, test, 10))["acc1"] > 0.3


@pytest.mark.parametrize("name", PROTOCOLS)
def test_sgd_follows_the_protocols(digits, name):
    """Against a direct implementation of the papers' protocols, with different views in every epoch."""
    train, _, test = digits
    views = [
        train[0] + np.random.default_rng(epoch).normal(0, 0.2, train[0].shape).astype(np.float32) for epoch in range(90)
    ]
    y = torch.from_numpy(train[1])
    lr, size, epochs = {"mct": (30, 256, 60), "slip": (1.6, 4096, 90)}[name]
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr * 90 / size, momentum=0.9, weight_decay=0)
    if name == "mct":
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [300, 400, 500], 0.2)  # epochs of ten batches
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 900)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        x = torch.from_numpy(views[epoch])
        for rows in torch.randperm(900, generator=generator).split(90):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimizer.step()
            schedule.step()
    expected = layer(torch.from_numpy(test[0])).argmax(1).numpy() == test[1]
    top1, per_class = sgd_probe(name, lambda epoch: (views[epoch], train[1]), test, 10)
    assert (top1.outcome.values == expected).mean() > 0.995
    assert top1.value > 0.88
    title = f"Linear probe ({name.upper()})"
    assert (top1.title, per_class.title) == (f"{title} top-1", f"{title} mean per class")
    assert (top1.chance, per_class.chance, top1.count) == (0.1, 0.1, len(test[1]))


def test_few_shot(digits):
    train, val, test = digits
    result = few_shot(train, val, test, 10)
    found = [metric.value for metric in result.metrics]
    assert [(m.name, m.title, m.kind, m.chance, m.count) for m in result.metrics] == [
        (f"{shots}-shot", f"{shots}-shot linear probe top-1", "rate", 0.1, len(test[1])) for shots in (1, 2, 4, 8, 16)
    ]
    assert found == sorted(found)
    assert 0.3 < found[0] < 0.75 < found[-1]
    assert list(result.over_draws) == list(by_name(result.metrics))
    assert result.over_draws["1-shot"] > result.over_draws["16-shot"] >= 0
    one_shot = result.metrics[0].outcome.values  # means over five draws
    assert set(np.round(5 * one_shot, 6)) == {0, 1, 2, 3, 4, 5}


def test_few_shot_with_all_images_matches_a_single_fit(digits):
    """With two images per class, every draw of two is the whole split."""
    train, val, test = digits
    rows = np.concatenate([np.flatnonzero(train[1] == label)[:2] for label in range(10)])
    few = train[0][rows], train[1][rows]
    result = few_shot(few, val, test, 10)
    found = values(result.metrics)
    assert list(found) == ["1-shot", "2-shot"]
    assert result.over_draws["2-shot"] == 0
    accuracies = [LogisticRegression(C=10.0**-p, max_iter=1000).fit(*few).score(*test) for p in range(-6, 7)]
    assert min(accuracies) - 0.01 <= found["2-shot"] <= max(accuracies) + 0.01


def test_invalid_splits_raise(digits):
    train, val, test = digits
    empty, single = (train[0][:0], train[1][:0]), (train[0][:1], train[1][:1])
    for probe in (
        lambda a, b: knn(a, b, 10),
        lambda a, b: sgd_probe("mct", lambda epoch: a, b, 10),
        lambda a, b: few_shot(a, val, b, 10),
    ):
        with pytest.raises(UserError, match="the train split has no labeled image"):
            probe(empty, test)
        with pytest.raises(UserError, match="the test split has no labeled image"):
            probe(train, empty)
        with pytest.raises(UserError, match="at least two classes"):
            probe(single, test)
