"""The linear probe against an exhaustive sweep of its penalty, on scikit-learn's digits."""

import numpy as np
import pytest
from helpers.metrics import values
from sklearn.datasets import load_digits

from coalign.errors import UserError
from coalign.evaluation.probes.linear import (
    best_penalty,
    fit,
    linear_probe,
    penalty_at,
    search_penalty,
    validation_score,
)


@pytest.fixture(scope="module")
def digits():
    """Train, val and test splits, with few training images so that the penalty matters."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features = (images / 16).astype(np.float32)[order]
    return [(features[a:b], labels[order][a:b]) for a, b in ((0, 150), (150, 400), (400, 1797))]


@pytest.mark.parametrize("peak", [0, 7, 40, 50, 91, 96])
def test_search_finds_a_single_peak_in_few_steps(peak):
    tried = []

    def score(penalty):
        tried.append(penalty)
        return 0.5, -abs(np.log10(penalty) - np.log10(penalty_at(peak)))

    scores = search_penalty(score)
    assert best_penalty(scores) == pytest.approx(penalty_at(peak))
    assert len(tried) == len(set(tried)) <= 15
    assert {penalty_at(step) for step in range(0, 97, 16)} <= set(tried)


def test_likelihood_breaks_ties_of_accuracy(digits):
    assert best_penalty({1.0: (0.9, -5.0), 2.0: (0.9, -1.0), 3.0: (0.8, 0.0)}) == 2.0
    train, val, _ = digits
    accuracy, likelihood = validation_score(fit(*train, 1.0), val)
    probabilities = fit(*train, 1.0).predict_proba(val[0])
    assert accuracy == (probabilities.argmax(1) == val[1]).mean()
    assert likelihood == pytest.approx(np.log(probabilities[np.arange(len(val[1])), val[1]]).mean())


def test_grid_has_eight_steps_per_decade_from_1e_6_to_1e6():
    assert penalty_at(0) == pytest.approx(1e-6)
    assert penalty_at(96) == pytest.approx(1e6)
    assert penalty_at(48 + 8) == pytest.approx(10)


@pytest.mark.slow
def test_search_is_as_good_as_the_exhaustive_sweep(digits):
    train, val, test = digits
    result = linear_probe(train, val, test, 10)
    scores = {step: validation_score(fit(*train, penalty_at(step)), val) for step in range(97)}
    best = max(scores, key=lambda step: scores[step])
    both = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    exhaustive = (fit(*both, penalty_at(best)).predict(test[0]) == test[1]).mean()
    error = np.sqrt(exhaustive * (1 - exhaustive) / len(test[1]))
    top1 = values(result.metrics)["acc1"]
    assert abs(top1 - exhaustive) <= error
    assert top1 > 0.9
    assert result.scores[result.penalty] == max(result.scores.values())


def test_fit_minimizes_the_penalized_objective():
    """At the minimum the gradient of Σ cross-entropy + λ/2 ‖W‖² is zero."""
    generator = np.random.default_rng(0)
    features, labels = generator.normal(size=(60, 4)), generator.integers(3, size=60)
    for start in (None, fit(features, labels, 50.0)):
        model = fit(features, labels, 2.0, start)
        logits = features @ model.coef_.T + model.intercept_
        odds = np.exp(logits - logits.max(1, keepdims=True))
        gradient = (odds / odds.sum(1, keepdims=True) - np.eye(3)[labels]).T @ features + 2.0 * model.coef_
        assert np.abs(gradient).max() < 0.02


def test_two_classes_support_warm_starts(digits):
    (features, labels), val, test = ((x[y < 2], y[y < 2]) for x, y in digits)
    metrics = linear_probe((features, labels), val, test, 2).metrics
    assert [(m.name, m.title, m.kind, m.chance, m.count) for m in metrics] == [
        ("acc1", "Linear probe top-1", "rate", 1 / 2, len(test[1])),
        ("mean_per_class_recall", "Linear probe mean per class", "rate", 1 / 2, len(test[1])),
    ]
    assert min(metric.value for metric in metrics) > 0.95


def test_invalid_splits_raise(digits):
    train, val, test = digits
    empty = (train[0][:0], train[1][:0])
    with pytest.raises(UserError, match="the validation split has no labeled image"):
        linear_probe(train, empty, test, 10)
    with pytest.raises(UserError, match="at least two classes"):
        linear_probe((train[0][:3], np.zeros(3, int)), val, test, 10)
    with pytest.raises(UserError, match="test split's features are not finite"):
        linear_probe(train, val, (test[0] * np.nan, test[1]), 10)
