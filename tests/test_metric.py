import json

import numpy as np
import pytest

from coalign.metric import Metric, Outcome, difference_text, metrics_from_json


@pytest.mark.parametrize(
    ("metric", "texts"),
    [
        (Metric("r1", "R@1", "rate", 0.381, 0.352, 0.4105, 0.002, 640), ("38.1 %", "35.2–41.0 %", "0.2 %")),
        (Metric("rank", "Rank", "rank", 8.5, 7.0, 1234.0, 320.0), ("8.5", "7–1,234", "320")),
        (Metric("gap", "Gap", "distance", 0.337), ("0.34", "", "")),
        (Metric("more", "More", "difference", -0.031, -0.05, 0.012), ("−3.1", "−5.0 to +1.2", "")),
    ],
)
def test_a_metric_prints_itself_and_survives_json(metric, texts):
    assert (metric.text(), metric.interval_text(), metric.chance_text()) == texts
    assert metrics_from_json(json.loads(json.dumps({metric.name: metric.to_json()}))) == [metric]


@pytest.mark.parametrize(
    ("kind", "low", "high", "chance", "beats"),
    [
        ("rate", 0.3, 0.5, 0.2, True),
        ("rate", 0.1, 0.5, 0.2, False),
        ("rank", 3, 9, 10, True),  # lower is better
        ("rank", 3, 11, 10, False),
        ("rate", 0.3, 0.5, None, None),
        ("distance", None, None, 0.1, None),
    ],
)
def test_only_a_whole_interval_beats_chance(kind, low, high, chance, beats):
    assert Metric("m", "M", kind, 0.4, low, high, chance).beats_chance() is beats


def test_outcomes_are_neither_stored_nor_compared():
    metric = Metric("r1", "Image → text R@1", "rate", 0.5, 0.4, 0.6, outcome=Outcome(np.array([0.0, 1.0])))
    assert "outcome" not in metric.to_json()
    assert metric == Metric("r1", "Image → text R@1", "rate", 0.5, 0.4, 0.6)
    assert metric.prefixed("Shifted").title == "Shifted: image → text R@1"
    assert metric.prefixed("Shifted").outcome is metric.outcome


def test_differences_are_in_percentage_points_or_the_metrics_unit():
    assert [difference_text(kind, -0.0314) for kind in ("rate", "rank", "distance")] == ["−3.1", "−0.0", "−0.03"]
