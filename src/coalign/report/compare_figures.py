"""Figures of several runs side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coalign.report.figures import INK, LINE, PALETTE, SOFT, WIDTH, new_figure, percent_axis, style

Validations = Sequence[Sequence[Mapping[str, float]]]  # per run: its validations in order
_TRACKED = (
    ("val/loss", "Held-out loss"),
    ("val/mean_recall", "Mean of all held-out R@K"),
    ("val/zero_shot_acc1", "Zero-shot top-1"),
)


def points(
    names: Sequence[str],
    values: Mapping[str, Sequence[tuple[float, float, float]]],
    chance: Sequence[float | None] = (),
    difference_to: str | None = None,
) -> Figure:
    """A row per metric name, with one point and interval (value, low, high) per group; a dotted tick marks the chance level.

    With `difference_to`, the values are differences from that group, and a line marks zero.
    """
    step = 0.8 / max(1, len(values))
    figure = new_figure(WIDTH, (0.2 + 0.2 * len(values)) * len(names) + 1.0)
    axes = figure.add_subplot()
    style(axes)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    places = np.arange(len(names))[::-1]
    for place in places[:-1]:
        axes.axhline(place - 0.5, color=LINE, linewidth=0.8)
    colors = _colors(values, skip=difference_to is not None)
    for row, (name, triples) in enumerate(values.items()):
        marker = "os^"[row // len(PALETTE) % 3]  # colors repeat
        value, low, high = np.array(triples).T
        spread = np.stack([value - low, high - value]).clip(min=0)
        own = places + 0.4 - step * (row + 0.5)
        axes.errorbar(
            value,
            own,
            xerr=spread,
            fmt=marker,
            markersize=5,
            color=colors[name],
            elinewidth=1.6,
            capsize=2.5,
            label=name,
        )
    for place, level in zip(places, chance):
        if level is not None:
            axes.plot([level] * 2, [place - 0.42, place + 0.42], color=SOFT, linewidth=1.6, linestyle=":")
    if any(level is not None for level in chance):
        axes.plot([], [], color=SOFT, linewidth=1.6, linestyle=":", label="chance")
    if difference_to is not None:
        axes.axvline(0, color=INK, linewidth=1.0)
        axes.set_xlabel(f"difference from {difference_to}, percentage points", fontsize=9, color=SOFT)
    else:
        axes.set_xlim(left=0)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.set_yticks(places, list(names), fontsize=9, parse_math=False)
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.xaxis.set_major_formatter(percent_axis("" if difference_to is not None else " %"))
    _legend(figure, axes)
    return figure


def learning_curves(runs: Mapping[str, Validations]) -> Figure | None:
    """Every validation of the groups of runs, against samples seen (left) and time (right). None if there was no validation."""
    kept = [
        (key, title)
        for key, title in _TRACKED
        if any(key in row for group in runs.values() for run in group for row in run)
    ]
    if not kept:
        return None
    longest = max(row["seconds"] for group in runs.values() for run in group for row in run if "seconds" in row)
    unit, seconds = ("hours", 3600) if longest > 7200 else ("minutes", 60) if longest > 180 else ("seconds", 1)
    figure = new_figure(WIDTH, 2.6 * len(kept) + 0.4)
    colors = _colors(runs)
    for row, (key, title) in enumerate(kept):
        for column, (against, label, scale) in enumerate((("samples", "samples seen", 1), ("seconds", unit, seconds))):
            axes = figure.add_subplot(len(kept), 2, 2 * row + column + 1)
            style(axes, title)
            for name, group in runs.items():
                _lines(axes, [_series(run, against, key, scale) for run in group], colors[name], name)
            axes.set_xlim(left=0)
            axes.ticklabel_format(axis="x", scilimits=(-3, 6), useMathText=True)
            if key != "val/loss":
                axes.set_ylim(bottom=0)
                axes.yaxis.set_major_formatter(percent_axis())
            axes.set_xlabel(label, fontsize=9, color=SOFT)
    _legend(figure, figure.axes[0])
    return figure


def by_fraction(
    scores: Mapping[str, Mapping[float, Mapping[int, float]]], base: str = "clip", title: str = ""
) -> Figure:
    """Metrics of methods trained on fractions of the pairs, by seed; the dotted line is the base method's mean on all pairs."""
    figure = new_figure(WIDTH, 3.6)
    axes = figure.add_subplot()
    style(axes, title)
    if base in scores:
        level = np.mean(list(scores[base][max(scores[base])].values()))
        axes.axhline(float(level), color=SOFT, linewidth=1.6, linestyle=":")
    colors = _colors(scores)
    for name, of_fraction in scores.items():
        fractions = sorted(of_fraction)
        means = [np.mean(list(of_fraction[fraction].values())) for fraction in fractions]
        axes.plot(fractions, means, color=colors[name], linewidth=1.7, label=name)
        for fraction in fractions:
            values = list(of_fraction[fraction].values())
            axes.plot([fraction] * len(values), values, "o", color=colors[name], markersize=3.2, alpha=0.6)
    axes.set_xscale("log", base=2)
    every = sorted({fraction for of_fraction in scores.values() for fraction in of_fraction})
    axes.set_xticks(every, [f"{100 * fraction:g} %" for fraction in every])
    axes.set_xlabel("pairs trained on", fontsize=9, color=SOFT)
    axes.yaxis.set_major_formatter(percent_axis())
    _legend(figure, axes)
    return figure


def _lines(axes: Axes, series: Sequence[tuple[np.ndarray, np.ndarray]], color: str, name: str) -> None:
    """One run as a line; several as pale lines, with their mean if all have the same number of validations."""
    series = [one for one in series if len(one[0])]
    if len({len(x) for x, _ in series}) == 1:
        x, y = np.mean([x for x, _ in series], axis=0), np.mean([y for _, y in series], axis=0)
        axes.plot(x, y, color=color, linewidth=1.7, marker="o", markersize=3.2, label=name)
        if len(series) == 1:
            return
    else:
        axes.plot([], [], color=color, linewidth=1.7, label=name)
    for x, y in series:
        axes.plot(x, y, color=color, linewidth=0.8, alpha=0.4)


def _series(run: Sequence[Mapping[str, float]], against: str, key: str, scale: float) -> tuple[np.ndarray, np.ndarray]:
    found = [(row[against] / scale, row[key]) for row in run if against in row and key in row]
    x, y = zip(*found) if found else ((), ())
    return np.array(x, dtype=float), np.array(y, dtype=float)


def _colors(names: Mapping[str, object], skip: bool = False) -> dict[str, str]:
    """A group has the same color in every figure. `skip`: the first group is left out of `names`."""
    return {name: PALETTE[(number + skip) % len(PALETTE)] for number, name in enumerate(names)}


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles,
        labels,
        frameon=False,
        fontsize=8.5,
        labelcolor=SOFT,
        loc="outside upper center",
        # a column is as wide as its longest name
        ncols=max(1, min(6, len(labels), 110 // (max(map(len, labels)) + 8))),
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
