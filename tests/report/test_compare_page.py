from __future__ import annotations

import subprocess
import sys

import pytest

from coalign.report.compare_page import (
    ComparedMetric,
    Comparison,
    Group,
    compare_page,
    differing,
    interval_text,
    verdict,
)

R1, RANK = "retrieval.image_to_text.r1", "retrieval.image_to_text.median_rank"


def group(
    name: str, *, seeds: list[int], difference: float | None = None, over: tuple[float, float] | None = None
) -> Group:
    several = len(seeds) > 1
    near = None if over is None else (over[0] / 2, over[1] / 2)
    return Group(
        name=name,
        runs=[f"{name}-{seed}" for seed in seeds],
        seeds=seeds,
        method=name,
        settings={"lr": 0.1, "steps.warm": None} if name == "clip" else {"lr": 0.2, "own": [1, 2]},
        parameters=1_234_567,
        steps=60,
        samples_seen=15_360,
        seconds=754.0,
        cpu_seconds=700.0,
        metrics={
            R1: ComparedMetric(
                "Image → text R@1",
                "rate",
                0.21,
                (0.18, 0.24),
                (0.15, 0.27) if several else None,
                600,
                0.002,
                difference,
                near if several else over,
                over if several else None,
            ),
            RANK: ComparedMetric(
                "Image → text median rank",
                "rank",
                8.5,
                (7.0, 10.0),
                None,
                600,
                320.0,
                -1.5 if difference else None,
                (-3.0, 0.0) if over else None,
            ),
        },
        validations=[
            [
                {"step": s, "samples": 256 * s, "seconds": 12.0 * s, "val/loss": 5 - s / 20, "val/mean_recall": s / 100}
                for s in (20, 40, 60)
            ]
            for _ in seeds
        ],
    )


def comparison(*, over: tuple[float, float] = (0.01, 0.05), seeds: list[int] | None = None) -> Comparison:
    own = seeds or [0]
    return Comparison(
        [group("clip", seeds=own), group("other", seeds=own, difference=0.03, over=over)],
        {"epochs": 30},
        {"images": 600},
    )


def test_the_page_shows_everything(tmp_path):
    compare_page(comparison(seeds=[0, 1, 2])).write(tmp_path / "page.html")
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    for words in (
        "Image → text R@1 of clip is 21.0 % (95 % interval 15.0–27.0 %; chance 0.2 %)",
        "other +3.0 (+1.0 to +5.0)",
        "1,234,567",
        "0, 1, 2",
        "12 min 34 s",
        "600 images",
        "18.0–24.0 %",
        "+0.5 to +2.5",
        "−1.5",
        "epochs",
        '<td dir="auto">none</td>',  # a setting that is None; the other method lacks it
        "1, 2",
    ):
        assert words in html, words
    assert "<th>seeds</th>" in html
    assert "<th>seed</th>" in compare_page(comparison()).html()  # "0" of one run is not a number of seeds
    assert html.count("data:image/png;base64,") == 3
    assert list(tmp_path.iterdir()) == [tmp_path / "page.html"]


def test_what_only_one_run_has_is_method_specific_only_in_a_method():
    groups = [group("clip", seeds=[0]), group("other", seeds=[0])]
    for each, settings in zip(
        groups, ({"epochs": 1}, {"epochs": 2, "weights": "0.5 × a + 0.5 × b", "method_config.k": 3})
    ):
        each.settings = settings
    assert differing(groups) == (["epochs", "weights"], ["method_config.k"])


def test_a_single_group_has_no_differences(tmp_path):
    alone = Comparison([group("clip", seeds=[0, 1])], {}, {"images": 600})
    page = compare_page(alone).html()
    assert "<th>difference</th>" not in page
    assert "<th>difference</th>" in compare_page(comparison()).html()
    assert page.count("data:image/png;base64,") == 2
    assert verdict(alone) == "Image → text R@1 of clip is 21.0 % (95 % interval 15.0–27.0 %; chance 0.2 %)."


@pytest.mark.parametrize(
    ("over", "significant"),
    [((0.01, 0.05), True), ((-0.05, -0.01), True), ((-0.01, 0.07), False), ((0.0, 0.06), False)],
)
def test_the_verdict_marks_differences_that_are_not_significant(over, significant):
    assert ("not significant" not in verdict(comparison(over=over))) == significant


def test_the_verdict_prefers_the_interval_over_seeds():
    # the interval over items is half as wide
    several = comparison(over=(-0.01, 0.07), seeds=[0, 1])
    assert "other +3.0 (−1.0 to +7.0, not significant)" in verdict(several)


def test_small_texts():
    assert interval_text("rank", (4.0, 1234.5)) == "4–1,234.5"
    assert interval_text("rank", None) is None
    assert interval_text("rate", (-0.02, 0.2)) == "0.0–20.0 %"  # a t-interval may reach below zero


def test_the_page_imports_no_torch():
    code = "import sys, coalign.report.compare_page; sys.exit('torch' in sys.modules or 'matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
