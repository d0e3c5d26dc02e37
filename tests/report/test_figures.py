from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from coalign.metric import Metric
from coalign.report import figures


def drawn(figure: Figure) -> np.ndarray:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=50)
    return np.array(Image.open(buffer).convert("L"))


def titles(figure: Figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def history(steps: int = 100) -> list[dict[str, float | None]]:
    rows: list[dict[str, float | None]] = []
    for step in range(steps):
        rows.append(
            {"step": step, "loss": 5 - step / 50, "lr": 1e-4, "grad_norm": 1.0, "logit_scale": 14.0, "data_wait": 0.1}
        )
        if step % 10 == 9:
            rows.append({"step": step, "val/loss": 4.0, "val/image_to_text_r1": step / 200})
    return rows


def test_every_logged_key_is_drawn():
    rows = history()
    rows[3]["scale/image_text"] = 12.0  # a method's own scalar, of which figures.py knows nothing
    rows[4]["loss/masked"] = 2.0
    figure = figures.training_curves(rows)
    assert figure is not None
    assert titles(figure) == [
        "Loss",
        "Recall and accuracy",
        "Learning rate",
        "Gradient norm",
        "Term: masked",
        "Logit scale",
        "Scale image text",
        "Time waiting for data",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert set(lines) == {"training loss", "held-out loss"}
    widths = [axes.get_subplotspec().colspan for axes in figure.axes]
    assert [len(width) for width in widths] == [3] * 4 + [2] * 4  # terms and scalars in small panels
    np.testing.assert_array_equal(lines["held-out loss"].get_xdata(), range(9, 100, 10))
    assert drawn(figure).min() < 100


def test_a_family_of_scalars_is_one_panel_with_room_for_its_legend():
    rows = [{"step": step, "offset_a": -step / 10, "offset_b": 0.0, "offset_c": step / 10} for step in range(9)]
    figure = figures.training_curves(rows)
    assert figure is not None
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["a", "b", "c"]
    assert axes.get_ylim()[0] < -0.8
    assert axes.get_ylim()[1] > 1.6
    drawn(figure)


def test_the_running_mean_of_a_straight_line_is_the_line():
    figure = figures.training_curves([{"step": step, "loss": 3.0 * step} for step in range(200)])
    assert figure is not None
    smooth = figure.axes[0].lines[1]
    np.testing.assert_allclose(smooth.get_ydata()[5:-5], smooth.get_xdata()[5:-5] * 3.0)
    assert len(smooth.get_xdata()) == 200


def test_absent_and_non_finite_values_are_gaps():
    rows = [{"step": 0, "loss": None}, {"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}, {"step": 3}]
    figure = figures.training_curves(rows)
    assert figure is not None
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_xdata(), [2])
    drawn(figure)
    assert figures.training_curves(rows[:2]) is None
    assert figures.training_curves([]) is None


def test_metric_bars_show_value_interval_and_chance():
    rows = [Metric("r1", "R@1 $x$", "rate", 0.2, 0.15, 0.26, 0.01, 100), Metric("a", "accuracy", "rate", 0.5, 0.5, 0.5)]
    figure = figures.metric_bars(rows)
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [0.2, 0.5]
    (segments, *_) = [c.get_segments() for c in axes.collections]
    np.testing.assert_allclose(segments[0][:, 0], [0.15, 0.26])
    assert any(list(line.get_xdata()) == [0.01, 0.01] for line in axes.lines)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["R@1 $x$", "accuracy"]
    drawn(figure)


@pytest.mark.parametrize("n", [1, 3, 14, 24, 60])
def test_similarity_matrix_of_any_size(n):
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 255, (8, 6, 3), dtype=np.uint8)] * n
    figure = figures.similarity_matrix(generator.random((n, n)), ["a caption of $money$" * 9] * n, images)
    picture = drawn(figure)
    assert picture[:, 0].min() == 255  # no label runs out of the picture
    assert figures.similarity_matrix(generator.random((n, n))).axes[0].get_ylabel() == "captions"


def test_modality_gap_is_the_distance_of_the_centroids_and_its_plane_shows_it():
    generator = np.random.default_rng(0)
    points = generator.normal(size=(2, 80, 16)) * 0.1
    points[0, :, 3] += 1
    points[1, :, 7] += 1
    images, texts = points / np.linalg.norm(points, axis=2, keepdims=True)
    figure, distance = figures.modality_gap(images, texts)
    assert distance == pytest.approx(np.linalg.norm(images.mean(0) - texts.mean(0)))
    assert distance == pytest.approx(2**0.5, rel=0.15)
    clouds = [c.get_offsets() for c in figure.axes[0].collections if len(c.get_offsets()) == 80]
    # Principal axes: the gap is the main direction here, so that the plane keeps its length.
    assert np.linalg.norm(clouds[0].mean(0) - clouds[1].mean(0)) == pytest.approx(distance, rel=0.01)
    drawn(figure)


def test_modality_gap_of_few_points_or_one_dimension():
    assert figures.modality_gap(np.ones((1, 4)) / 2, np.ones((1, 4)) / 2)[1] == 0
    figure, distance = figures.modality_gap(np.ones((3, 1)), -np.ones((3, 1)))
    assert distance == 2
    drawn(figure)


def test_histogram_scales_each_distribution_to_its_own_total():
    figure = figures.histogram({"few": np.array([0.1, np.nan]), "many": np.random.default_rng(0).random(500)}, "cosine")
    filled = [patch.get_path().vertices[:, 1].max() for patch in figure.axes[0].patches]
    assert filled[0] == 1.0
    assert filled[2] < 0.2
    drawn(figure)
    drawn(figures.histogram({"none": np.array([])}, "cosine"))


@pytest.mark.parametrize("n", [1, 2, 16, 40, 120])
def test_confusion_matrix_of_any_size(n):
    confusion = np.diag(np.arange(n))  # class 0 has no items at all
    figure = figures.confusion_matrix(confusion, [f"class {i}" for i in range(n)])
    shares = figure.axes[0].images[0].get_array()
    np.testing.assert_array_equal(np.diag(shares), np.arange(n) > 0)
    drawn(figure)
