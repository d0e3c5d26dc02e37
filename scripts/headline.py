"""Renders docs/evidence/headline.png from results/headline-emoji-concepts.json alone: recall on unseen emoji.

Run: python scripts/headline.py
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from evidence.text import Values, factor_text, shared_settings
from evidence.titles import ARMS, HEADLINE
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from coalign.methods.table import fraction_name
from coalign.report.figures import PALETTE, SOFT, WIDTH, new_figure, percent_axis, style

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / f"results/{HEADLINE}.json"
FIGURE = ROOT / "docs/evidence/headline.png"
TASK = "retrieval_test"  # on unseen emoji
RECALLS = ("r1", "r10")  # means of both directions
COOLDOWN = 0.2  # of every length of a search, at its end; the run that precedes it is shared by all lengths


@dataclass(frozen=True)
class Point:
    """One arm on one fraction of the pairs, means over seeds.

    recalls: r1 and r10 -> value, low, high. The interval is the mean of the two directions' 95 % t-intervals over seeds, which is never
    narrower than the interval of their mean.
    """

    pairs: int
    recalls: Mapping[str, tuple[float, float, float]]
    core_minutes: float  # of the final training, by processor time
    search_core_minutes: float  # of the search on all pairs, at this training's cost per sample


def points(values: Values) -> dict[str, list[Point]]:
    """Returns arm -> its points by ascending number of pairs, in the order of the arms."""
    found: dict[str, list[Point]] = {}
    for group in values["groups"]:
        fraction = values["arms"][group["name"]]["train_fraction"]
        whole = next(arm for arm in values["arms"] if fraction_name(arm, fraction) == group["name"])
        settings = {**shared_settings(values), **group["settings"]}
        recalls = {recall: both_directions(group["metrics"], recall) for recall in RECALLS}
        minutes = group["cpu_seconds"] / 60
        search_minutes = minutes / group["samples_seen"] * search_samples(values, whole)
        found.setdefault(whole, []).append(Point(settings["num_train"], recalls, minutes, search_minutes))
    return {arm: sorted(of_arm, key=lambda point: point.pairs) for arm, of_arm in found.items()}


def both_directions(metrics: Mapping[str, Values], recall: str, task: str = TASK) -> tuple[float, float, float]:
    """Returns the mean of both directions with its interval over seeds, (value, value, value) for a single seed."""
    sides = [metrics[f"{task}.{direction}.{recall}"] for direction in ("image_to_text", "text_to_image")]
    triples = [(side["value"], *(side["over_seeds"] or [side["value"]] * 2)) for side in sides]
    value, low, high = np.mean(triples, axis=0).tolist()
    return value, low, high


def search_samples(values: Values, arm: str) -> float:
    """Returns the samples of the search of an arm: of each trial, its longest length, and the cool-downs of the shorter ones."""
    total = 0.0
    for trial in values["search"]["arms"][arm]["trials"]:
        *shorter, longest = sorted(length["samples_seen"] for length in trial["lengths"].values()) or [0]
        total += longest + COOLDOWN * sum(shorter)
    return total


def figure(values: Values) -> Figure:
    """Returns the figure of the arms that the table has on fractions of the pairs: R@1 above, R@10 below; against the pairs on the left,
    against core-minutes on all pairs on the right."""
    by_arm = {arm: of_arm for arm, of_arm in points(values).items() if fraction_name(arm, 0.5) in values["arms"]}
    colors = {arm: PALETTE[number % len(PALETTE)] for number, arm in enumerate(by_arm)}
    found = new_figure(WIDTH, 6.0)
    for row, recall in enumerate(RECALLS):
        title = f"R@{recall[1:]} on unseen emoji, mean of both directions"
        left = found.add_subplot(2, 2, 2 * row + 1)
        right = found.add_subplot(2, 2, 2 * row + 2, sharey=left)
        sides = [
            values["groups"][0]["metrics"][f"{TASK}.{side}.{recall}"] for side in ("image_to_text", "text_to_image")
        ]
        for axes in (left, right):
            style(axes, title if axes is left else "")
            axes.axhline(float(np.mean([side["chance"] for side in sides])), color=SOFT, linewidth=1.6, linestyle=":")
            axes.set_xscale("log")
            axes.yaxis.set_major_formatter(percent_axis())
        for arm, of_arm in by_arm.items():
            _by_pairs(left, of_arm, recall, colors[arm], _label(values, arm))
            _by_minutes(right, of_arm[-1], recall, colors[arm])
        left.set_ylim(bottom=0)
        pairs = sorted({point.pairs for of_arm in by_arm.values() for point in of_arm})
        left.set_xticks(pairs, [f"{number:,}" for number in pairs])
        left.xaxis.set_minor_locator(NullLocator())
        right.xaxis.set_major_formatter("{x:g}")
        if row == 1:
            left.set_xlabel("pairs trained on", fontsize=9, color=SOFT)
            right.set_xlabel("core-minutes on all pairs (open: with the search)", fontsize=9, color=SOFT)
    _legend(found, found.axes[0])
    return found


def _by_pairs(axes: Axes, of_arm: Sequence[Point], recall: str, color: str, label: str) -> None:
    pairs = [point.pairs for point in of_arm]
    value, low, high = np.array([point.recalls[recall] for point in of_arm]).T
    if len(of_arm) > 1:
        axes.fill_between(pairs, low, high, color=color, alpha=0.16, linewidth=0)
    else:
        axes.vlines(pairs, low, high, color=color, linewidth=1.6)
    axes.plot(pairs, value, color=color, linewidth=1.7, marker="o", markersize=4, label=label)


def _by_minutes(axes: Axes, point: Point, recall: str, color: str) -> None:
    """The final run with its interval, and a dotted line to the minutes with the search."""
    value, low, high = point.recalls[recall]
    minutes = [point.core_minutes, point.core_minutes + point.search_core_minutes]
    axes.plot(minutes, [value] * 2, color=color, linewidth=1.2, linestyle=":")
    axes.errorbar(
        minutes[:1], [value], yerr=[[value - low], [high - value]], fmt="o", color=color, markersize=5, elinewidth=1.6, capsize=2.5
    )  # fmt: skip
    axes.plot(minutes[1:], [value], "o", color=color, markersize=5, markerfacecolor="white")


def _label(values: Values, arm: str) -> str:
    factor = factor_text(values["efficiency"].get(TASK, {}).get(arm))
    return f"{ARMS.get(arm, arm)}: {factor} ×" if factor else ARMS.get(arm, arm)


def _legend(found: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = found.legend(
        handles, labels, frameon=False, fontsize=8.5, labelcolor=SOFT, loc="outside upper center", ncols=2,
        title="× fewer pairs than CLIP for CLIP's R@10 (95 % interval); bands: 95 % CI over seeds; dotted: chance",
        title_fontsize=8.5,
    )  # fmt: skip
    legend.get_title().set_color(SOFT)


def main() -> None:
    values = json.loads(RESULTS.read_text())
    figure(values).savefig(FIGURE, dpi=110)
    print(f"{FIGURE.relative_to(ROOT)} is written.")


if __name__ == "__main__":
    main()
