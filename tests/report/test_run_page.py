from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from coalign.metric import Metric
from coalign.report.class_results import ClassResults
from coalign.report.page import GalleryCell
from coalign.report.run_page import Miss, Ranking, RunSummary, flatten, run_page, verdict


def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)


def unit(n: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).normal(size=(n, 8))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def full_run() -> RunSummary:
    words = [GalleryCell(None, f"caption {i}", i == 2, f"{0.9 - i / 10:.2f}") for i in range(5)]
    return RunSummary(
        title="clip on scenes",
        configuration={"recipe": "clip", "train": {"lr": 5e-4, "betas": (0.9, 0.98)}, "resume": None},
        history=[{"step": i, "loss": 5 - i / 20, "data_wait": 0.5} for i in range(50)],
        metrics=[
            Metric("r1", "Image → text R@1", "rate", 0.214, 0.198, 0.230, 0.002, 640),
            Metric("median_rank", "Image → text median rank", "rank", 8, 7, 9, 320, 640),
        ],
        image_queries=[Ranking(GalleryCell(image(), "an image query"), words)],
        text_queries=[
            Ranking(GalleryCell(None, "a text query"), [GalleryCell(image(), f"image {i}") for i in range(5)])
        ],
        nearest_misses=[Miss(GalleryCell(image(), "the missed"), words[2], words[0])],
        similarities=np.eye(3),
        similarity_captions=["a", "b", "c"],
        similarity_images=[image()] * 3,
        image_embeds=unit(30, 0),
        text_embeds=unit(30, 1),
        matching=np.linspace(0, 1, 30),
        others=np.linspace(-1, 0, 30),
        classes=ClassResults({"x": 1.0, "y": 1.0, "z": 1.0}, np.eye(3, dtype=int)),
        cost={"training time": "4 min"},
        parameters={"image": 1_000_000, "text": 500_000},
        bad_samples={"truncated image": 3, "empty caption": 7},
        bad_examples=[("a/b.png", "truncated image", "cut at byte 12")],
        samples_seen=10_000,
    )


def test_a_full_run_shows_everything(tmp_path):
    run_page(full_run()).write(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    for words in (
        "Image → text R@1 on held-out pairs is 21.4 % (95 % interval 19.8–23.0 %; chance 0.2 %): 107 times chance.",
        "train.betas",
        "0.9, 0.98",
        "an image query",
        "a text query",
        "the missed",
        "1,500,000",
        "50.0 % of the time was spent waiting for data",
        "10 of 10,000 samples read, 0.1 %, could not be used",
        "cut at byte 12",
        "7–9",
    ):
        assert words in html, words
    assert html.index("empty caption") < html.index("truncated image")  # most frequent reason first
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures == {"metrics", "curves", "similarity", "modality_gap", "cosines", "confusion"}


def test_run_without_data_still_has_a_page(tmp_path):
    run_page(RunSummary(title="empty")).write(tmp_path / "report.html")
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "No step was taken; nothing was evaluated." in html
    assert "every sample was readable" in html
    assert list(tmp_path.glob("*.png")) == []


@pytest.mark.parametrize(
    ("row", "start", "end"),
    [
        (
            Metric("r1", "R@1", "rate", 0.03, 0.001, 0.06, 0.02),
            "R@1 on",
            "chance 2.0 %), not significantly better than chance.",
        ),
        (
            Metric("a", "Accuracy", "rate", 0.6, 0.55, 0.65, 0.5),
            "Accuracy on",
            "(95 % interval 55.0–65.0 %; chance 50.0 %).",
        ),
        (Metric("r1", "R@1", "rate", 0.05, 0.04, 0.06, 0.02), "R@1 on held-out", "chance 2.0 %): 2.5 times chance."),
        (
            Metric("a", "Accuracy", "rate", 0.6, 0.5, 0.7),
            "Accuracy on held-out pairs is 60.0 %",
            "(95 % interval 50.0–70.0 %).",
        ),
        (
            Metric("rank", "Rank", "rank", 400, 290, 480, 320),
            "Rank on held-out pairs is 400",
            "not significantly better than chance.",
        ),
        (
            Metric("rank", "Rank", "rank", 8, 7, 9, 320),
            "Rank on held-out pairs is 8",
            "(95 % interval 7–9; chance 320).",
        ),
    ],
)
def test_verdict_claims_no_more_than_the_interval_supports(row, start, end):
    sentence = verdict(RunSummary("t", metrics=[row]))
    assert sentence.startswith(start)
    assert sentence.endswith(end)


def test_the_verdict_of_an_interrupted_run():
    run = RunSummary("t", history=[{"step": 0, "loss": 2.0}, {"step": 1, "loss": None}], ended="interrupted")
    assert verdict(run) == (
        "The final training loss is 2; nothing was evaluated. The run was interrupted and can be resumed."
    )


def test_flatten():
    assert flatten({"a": {"b": {"c": 1}, "d": [2, 3]}, "e": None}) == [("a.b.c", 1), ("a.d", "2, 3"), ("e", None)]


def test_the_report_imports_no_torch():
    code = "import sys, coalign.report.run_page; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
