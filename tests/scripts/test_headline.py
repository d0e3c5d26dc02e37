"""The headline's figure and page, from invented results."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest

from coalign.experiments.tables.data_efficiency import Efficiency

ROOT = Path(__file__).parents[2]
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
# arm -> R@10 on all pairs, hours of the final training
ARMS = {
    "clip": (0.24, 0.1),
    "clip-strong": (0.31, 0.27),
    "uniclip": (0.33, 0.25),
    "mcd": (0.34, 0.2),
    "locked": (0.5, 0.02),
}
ON_ALL_PAIRS = {"slip": (0.26, 0.2)}  # in the table, not in the figure


@pytest.fixture(scope="module")
def modules():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "scripts"))
        import headline
        from evidence import headline_page, plan, titles

        yield headline, headline_page, plan, titles


def group(arm, fraction):
    name = arm if fraction == 1 else f"{arm}, {100 * fraction:g} %"
    r10, hours = (ARMS | ON_ALL_PAIRS)[arm]
    metrics = {}
    for direction, more in (("image_to_text", 0.0), ("text_to_image", 0.02)):
        for recall, scale, chance in (("r1", 0.3, 1 / 451), ("r10", 1.0, 10 / 451)):
            value = scale * (r10 * (1 + 0.25 * np.log2(fraction) / 3 * 2) + more)
            metrics[f"retrieval_test.{direction}.{recall}"] = {
                "title": "Test",
                "kind": "rate",
                "value": value,
                "over_seeds": [value - 0.02 * scale, value + 0.03 * scale],
                "over_items": None,
                "chance": chance,
            }
    settings = {"num_train": round(2640 * fraction)} if fraction < 1 else {}
    cost = {"cpu_seconds": 3600 * hours, "samples_seen": 100_000.0}
    return {"name": name, "seeds": [0, 1, 2, 3, 4], "settings": settings, **cost, "metrics": metrics}


@pytest.fixture
def values():
    groups = [*(group(arm, fraction) for fraction in FRACTIONS for arm in ARMS), group("slip", 1.0)]
    trials = [
        {"trial": n + 1, "lengths": {f"{epochs}": {"samples_seen": 2000 * epochs} for epochs in (15, 30, 60)}}
        for n in range(11)
    ]
    search = {
        "chosen": {"epochs": 60},
        "best_of": [0.2 + 0.01 * k for k in range(12)],
        "trials": [*trials, {"lengths": {}}],
    }
    efficiency = {
        arm: asdict(Efficiency(factor, (factor - 0.4, factor + 0.5), False))
        for arm, factor in (("clip-strong", 1.8), ("uniclip", 2.1), ("mcd", 2.2))
    }
    efficiency["locked"] = asdict(Efficiency(8.0, (8.0, 8.0), True))
    return {
        "table": "headline-emoji-concepts",
        "settings": {"num_train": 2640},
        "arms": {
            **{
                each["name"]: {"train_fraction": fraction}
                for fraction in FRACTIONS
                for each in [group(arm, fraction) for arm in ARMS]
            },
            "slip": {"train_fraction": 1.0},
        },
        "groups": groups,
        "efficiency": {"retrieval_test": efficiency},
        "claims": [],
        "search": {"arms": {each["name"]: search for each in groups}},
    }


def test_points(modules, values):
    headline = modules[0]
    found = headline.points(values)
    assert list(found) == [*ARMS, *ON_ALL_PAIRS]
    assert [point.pairs for point in found["mcd"]] == [330, 660, 1320, 2640]
    on_all = found["clip"][-1]
    assert on_all.recalls["r10"] == pytest.approx((0.25, 0.23, 0.28))
    assert on_all.recalls["r1"] == pytest.approx((0.075, 0.069, 0.084))
    assert on_all.core_minutes == pytest.approx(6)
    # of 11 trials, the longest length and the cool-downs of two shorter ones; one trial diverged at once
    assert on_all.search_core_minutes == pytest.approx(6 * 11 * (120_000 + 0.2 * 90_000) / 100_000)


def test_a_single_seed_has_no_band(modules, values):
    metrics = values["groups"][0]["metrics"]
    for metric in metrics.values():
        metric["over_seeds"] = None
    assert modules[0].both_directions(metrics, "r10") == pytest.approx((0.25, 0.25, 0.25))


def test_figure(modules, values):
    """Each panel has what its axes say: a line per arm over all fractions with its band, and a point per arm with its minutes."""
    headline, titles = modules[0], modules[3]
    figure = headline.figure(values)
    assert len(figure.axes) == 4
    for axes, recall in zip(figure.axes[::2], headline.RECALLS):
        lines = {line.get_label(): line for line in axes.lines if line.get_marker() == "o"}
        assert [label.partition(":")[0] for label in lines] == [titles.ARMS[arm] for arm in ARMS]
        for line, points in zip(lines.values(), headline.points(values).values()):
            np.testing.assert_array_equal(line.get_xdata(), [point.pairs for point in points])
            np.testing.assert_allclose(line.get_ydata(), [point.recalls[recall][0] for point in points])
        assert len(axes.collections) == len(ARMS)
        assert axes.get_xscale() == "log"
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts[0] == "CLIP"
    assert texts[2] == "UniCLIP: 2.10 (1.70 to 2.60) ×"
    assert texts[4] == "Locked pretrained encoders: ≥ 8 ×"
    figure.canvas.draw()


def test_page(modules, values):
    _, headline_page, plan, titles = modules
    claims = [
        each
        for each in plan.verdicts(plan.read_plan(ROOT / "results/plan.json"), {})
        if each.claim.table == titles.HEADLINE
    ]
    text = headline_page.headline_page(values, claims)
    assert "| CLIP | 7.5 ± 0.8 | 25.0 ± 2.5 | 6.0 | 91 |" in text
    assert "| SLIP | 8.1 ± 0.8 | 27.0 ± 2.5 | 12.0 | 182 |" in text
    assert "| UniCLIP | 2.10 (1.70 to 2.60) |" in text
    assert "| MCD | 60 | 20.0 | 22.0 | 25.0 | 31.0 |" in text
    assert text.count("**open**") == len(claims) > 0
    assert "2,640 drawings to train on; 5 seeds per point." in text


def test_nothing_is_shown_without_results(modules):
    headline = modules[0]
    assert headline.RESULTS.exists() == headline.FIGURE.exists() == (ROOT / "docs/evidence/headline.md").exists()
