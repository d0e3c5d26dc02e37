"""Metrics of an evaluation in tests."""


def by_name(metrics):
    """Returns the metrics by their names, which are unique."""
    found = {metric.name: metric for metric in metrics}
    assert len(found) == len(metrics)
    return found


def values(metrics):
    """Returns each metric's value by its name."""
    return {name: metric.value for name, metric in by_name(metrics).items()}
