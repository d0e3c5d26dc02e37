"""The linear probe's search for the penalty, compared with an exhaustive sweep.

Ours is a parametric binary search over λ (DeCLIP, App. D); the sweep fits scikit-learn's logistic regression at all 97 values from 1e-6 to
1e6. Both use the same features, scikit-learn's digits, and fit once more with the best λ. RATIO is the sweep's CPU time over ours; both
accuracies are printed.

Run: python benchmarks/linear_probe.py
"""

from __future__ import annotations

import time

import numpy as np
from lines import line
from sklearn.datasets import load_digits

from coalign.evaluation.probes.accuracy import FeatureSplit
from coalign.evaluation.probes.linear import STEPS, best_penalty, fit, linear_probe, penalty_at, validation_score

TARGET = 5.0


def exhaustive(train: FeatureSplit, val: FeatureSplit, test: FeatureSplit) -> float:
    """Returns the accuracy on `test` with the best of all λ."""
    scores = {}
    for step in range(STEPS + 1):
        penalty = penalty_at(step)
        scores[penalty] = validation_score(fit(*train, penalty), val)
    both = np.concatenate([train[0], val[0]]), np.concatenate([train[1], val[1]])
    return float((fit(*both, best_penalty(scores)).predict(test[0]) == test[1]).mean())


def main() -> None:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features, labels = (images / 16)[order], labels[order]
    train, val, test = ((features[a:b], labels[a:b]) for a, b in ((0, 600), (600, 900), (900, 1797)))
    start = time.process_time()
    ours = linear_probe(train, val, test, 10)
    middle = time.process_time()
    theirs = exhaustive(train, val, test)
    end = time.process_time()
    print(
        f"accuracy: search {ours.top1.value:.4f} with {len(ours.scores)} penalties | sweep {theirs:.4f} with {STEPS + 1}"
    )
    line("linear probe, time of the sweep over our search", [(end - middle) / (middle - start)], at_least=TARGET)


if __name__ == "__main__":
    main()
