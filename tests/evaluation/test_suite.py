import numpy as np
import pytest

from coalign.evaluation.metrics import estimate, measure
from coalign.evaluation.suite import suite_metrics
from coalign.metric import Outcome


def test_the_average_of_independent_datasets_is_narrower():
    """Against a bootstrap of each dataset on its own, from the normal approximation."""
    generator = np.random.default_rng(0)
    outcomes = {
        name: Outcome((generator.random(count) < rate).astype(float))
        for name, count, rate in (("cars", 400, 0.3), ("pets", 900, 0.8), ("dtd", 200, 0.5))
    }
    main = {name: measure("acc1", "Zero-shot top-1", outcome) for name, outcome in outcomes.items()}
    *row, average = suite_metrics(main)
    assert [(metric.name, metric.title) for metric in row] == [
        (name, f"{name}: Zero-shot top-1") for name in ("cars", "pets", "dtd")
    ]
    for metric in row:
        found = estimate([outcomes[metric.name]])
        assert (metric.value, metric.low, metric.high) == (found.value, found.low, found.high)
    assert (average.name, average.title, average.kind, average.count) == ("average", "Average", "rate", 3)
    assert average.value == pytest.approx(np.mean([outcome.values.mean() for outcome in outcomes.values()]))
    error = sum(outcome.values.var() / len(outcome.values) for outcome in outcomes.values()) ** 0.5 / 3
    assert average.high - average.low == pytest.approx(2 * 1.96 * error, rel=0.1)
