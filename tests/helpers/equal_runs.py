"""When two runs are the same: weights, optimizer, progress and metrics."""

import torch
from helpers import tiny

from coalign.training import checkpoint
from coalign.training.log import TIMINGS


def assert_equal_weights(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if tolerance:
            torch.testing.assert_close(value, other[name], msg=name, **tolerance)
        else:
            assert torch.equal(value, other[name]), name


def assert_equal_runs(one, other):
    """Weights, optimizer, progress and metrics, apart from times."""
    a, b = checkpoint.load(one / "last"), checkpoint.load(other / "last")
    assert_equal_weights(a.model, b.model)
    assert a.optimizer.keys() == b.optimizer.keys()
    for name, values in a.optimizer.items():
        assert_equal_weights(values, b.optimizer[name])
    times = {"seconds": 0, "cpu_seconds": 0}
    assert {**a.trainer, **times} == {**b.trainer, **times}
    assert untimed(one) == untimed(other)


def untimed(folder):
    return [{k: v for k, v in row.items() if k not in TIMINGS} for row in tiny.rows(folder / "metrics.jsonl")]
