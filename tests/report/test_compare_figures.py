from __future__ import annotations

import io

import numpy as np
from PIL import Image

from coalign.report import compare_figures

VALUES = {"one": [(0.2, 0.1, 0.3), (0.5, 0.4, 0.6)], "other $x$": [(0.3, 0.25, 0.4), (0.5, 0.5, 0.5)]}


def drawn(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return np.array(Image.open(buffer).convert("L"))


def test_points_show_value_interval_and_chance():
    figure = compare_figures.points(["R@1", "R@5"], VALUES, [0.01, None])
    axes = figure.axes[0]
    points = [container.lines[0].get_xdata().tolist() for container in axes.containers]
    assert points == [[0.2, 0.5], [0.3, 0.5]]
    spans = [
        segment[:, 0].tolist() for container in axes.containers for segment in container.lines[2][0].get_segments()
    ]
    np.testing.assert_allclose(spans, [[0.1, 0.3], [0.4, 0.6], [0.25, 0.4], [0.5, 0.5]])
    first, second = (container.lines[0].get_ydata() for container in axes.containers)
    assert (first > second).all()  # in the order of the list, from above
    assert (np.abs(first - [1, 0]) < 0.5).all()
    assert [list(line.get_xdata()) for line in axes.lines].count([0.01, 0.01]) == 1
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["chance", "one", "other $x$"]
    assert drawn(figure).min() < 128


def test_differences_have_a_zero_line_and_groups_keep_their_colors():
    figure = compare_figures.points(["R@1", "R@5"], {"other $x$": VALUES["other $x$"]}, difference_to="one")
    axes = figure.axes[0]
    assert "difference from one" in axes.get_xlabel()
    assert any(list(line.get_xdata()) == [0, 0] for line in axes.lines)
    both = compare_figures.points(["R@1", "R@5"], VALUES).axes[0].containers[1]
    assert axes.containers[0].lines[0].get_color() == both.lines[0].get_color()


def run(steps, scale=1.0, **more):
    return [
        {"step": s, "samples": 10 * s, "seconds": scale * s, "val/loss": 4 - s / 10, "val/mean_recall": s / 50, **more}
        for s in steps
    ]


def test_learning_curves_by_pairs_and_by_time():
    figure = compare_figures.learning_curves(
        {"one": [run((5, 10, 15)), run((5, 10, 15), 3.0)], "other": [run((20,), 50.0)]}
    )
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["Held-out loss"] * 2 + ["Mean of all held-out R@K"] * 2
    mean = next(line for line in figure.axes[1].lines if line.get_label() == "one")
    np.testing.assert_allclose(mean.get_xdata() * 60, [10, 20, 30])  # minutes, since the longest takes 1,000 seconds
    np.testing.assert_allclose(mean.get_ydata(), [3.5, 3.0, 2.5])
    assert len(figure.axes[0].lines) == 3 + 1  # a mean and two seeds, and a single run
    assert [axes.get_xlabel() for axes in figure.axes] == ["samples seen", "minutes"] * 2
    drawn(figure)


def test_runs_that_were_validated_unequally_often_have_no_mean():
    figure = compare_figures.learning_curves({"one": [run((5, 10)), run((5,))]})
    line = next(line for line in figure.axes[0].lines if line.get_label() == "one")
    assert len(line.get_xdata()) == 0
    assert sorted(len(line.get_xdata()) for line in figure.axes[0].lines) == [0, 1, 2]


def test_zero_shot_is_drawn_if_tracked_and_nothing_without_validations():
    figure = compare_figures.learning_curves(
        {"one": [run((5, 10), **{"val/zero_shot_acc1": 0.5})], "other": [run((5,))]}
    )
    assert [axes.get_title(loc="left") for axes in figure.axes][-1] == "Zero-shot top-1"
    drawn(figure)
    assert compare_figures.learning_curves({"one": [[]]}) is None
