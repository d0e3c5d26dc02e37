"""Few-shot probes, probes by stochastic gradient descent, and nearest neighbours, on scikit-learn's digits."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from coalign.errors import UserError
from coalign.evaluation.few_shot import few_shot
from coalign.evaluation.knn import knn
from coalign.evaluation.sgd_probe import PROTOCOLS, sgd_probe


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    features = (features / 16).astype(np.float32)
    return [(features[rows], labels[rows]) for rows in (slice(0, 900), slice(900, 1200), slice(1200, None))]


@pytest.mark.parametrize("k", [1, 20])
def test_nearest_neighbours_are_scikit_learns(digits, k):
    train, _, test = digits
    theirs = KNeighborsClassifier(k, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.07))
    expected = theirs.fit(*train).predict(test[0]) == test[1]
    found = knn(train, test, 10, k)
    assert (found.correct == expected).mean() > 0.998  # ties of cosines
    assert found.top1.value == pytest.approx(expected.mean(), abs=0.002)
    assert found.to_json()["chance"] == 0.1


def test_more_neighbours_than_images(digits):
    train, _, test = digits
    few = train[0][:5], train[1][:5]
    assert knn(few, test, 10).top1.value > 0.3


@pytest.mark.parametrize("name", PROTOCOLS)
def test_descent_is_the_protocols(digits, name):
    """Against a loop that reads like the papers' sentences. Every epoch has views of its own."""
    train, _, test = digits
    views = [
        train[0] + np.random.default_rng(epoch).normal(0, 0.2, train[0].shape).astype(np.float32) for epoch in range(90)
    ]
    y = torch.from_numpy(train[1])
    lr, size, epochs = {"mct": (30, 256, 60), "slip": (1.6, 4096, 90)}[name]
    layer = torch.nn.Linear(64, 10)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimiser = torch.optim.SGD(layer.parameters(), lr=lr * 90 / size, momentum=0.9, weight_decay=0)
    if name == "mct":
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimiser, [300, 400, 500], 0.2)  # epochs of ten batches
    else:
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 900)
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        x = torch.from_numpy(views[epoch])
        for rows in torch.randperm(900, generator=generator).split(90):
            optimiser.zero_grad()
            F.cross_entropy(layer(x[rows]), y[rows]).backward()
            optimiser.step()
            schedule.step()
    expected = layer(torch.from_numpy(test[0])).argmax(1).numpy() == test[1]
    found = sgd_probe(name, lambda epoch: (views[epoch], train[1]), test, 10)
    assert (found.correct == expected).mean() > 0.995
    assert found.top1.value > 0.88


def test_few_shots(digits):
    train, val, test = digits
    found = few_shot(train, val, test, 10)
    values = [metric.value for metric in found.by_shots.values()]
    assert list(found.by_shots) == [1, 2, 4, 8, 16]
    assert values == sorted(values)
    assert 0.3 < values[0] < 0.75 < values[-1]
    assert found.over_draws[1] > found.over_draws[16] >= 0
    assert found.to_json()["intervals"]["4-shot"]["n"] == len(test[1])


def test_few_shots_of_all_there_is(digits):
    """Classes of two images: every draw of two is the whole, as one fit of scikit-learn's."""
    train, val, test = digits
    rows = np.concatenate([np.flatnonzero(train[1] == label)[:2] for label in range(10)])
    few = train[0][rows], train[1][rows]
    found = few_shot(few, val, test, 10)
    assert list(found.by_shots) == [1, 2]
    assert found.over_draws[2] == 0
    accuracies = [LogisticRegression(C=10.0**-p, max_iter=1000).fit(*few).score(*test) for p in range(-6, 7)]
    assert min(accuracies) - 0.01 <= found.by_shots[2].value <= max(accuracies) + 0.01


def test_what_cannot_be_probed(digits):
    train, val, test = digits
    none, one = (train[0][:0], train[1][:0]), (train[0][:1], train[1][:1])
    for probe in (
        lambda a, b: knn(a, b, 10),
        lambda a, b: sgd_probe("mct", lambda epoch: a, b, 10),
        lambda a, b: few_shot(a, val, b, 10),
    ):
        with pytest.raises(UserError, match="the train part has no labelled image"):
            probe(none, test)
        with pytest.raises(UserError, match="the test part has no labelled image"):
            probe(train, none)
        with pytest.raises(UserError, match="at least two classes"):
            probe(one, test)
