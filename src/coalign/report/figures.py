"""Figures of a run, as matplotlib `Figure` objects. No pyplot, so there is no global state and no display is needed."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from coalign.formatting import percent
from coalign.metric import Metric
from coalign.report import curves

INK, SOFT, LINE = "#1c2430", "#5b6675", "#dfe4ea"
# Told apart by the color-blind, and by lightness in a gray print.
PALETTE = ("#2b5c8a", "#d1782f", "#3a9c8d", "#8b5fa8", "#b8962e", "#b4442c", "#6f7c8a", "#86b3dc")
IMAGE_COLOR, TEXT_COLOR = PALETTE[0], PALETTE[1]
BLUES = LinearSegmentedColormap.from_list("paper_to_blue", ["#f7f9fb", "#a9c6e0", "#2b5c8a", "#122c47"])
WIDTH = 9.2  # inches; the page's column


def training_curves(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """The rows of metrics.jsonl as curves, one panel per group of keys. Keys may be absent, values None. None if there are no curves."""
    panels = [panel for panel in curves.panels(rows) if panel.series]
    if not panels:
        return None
    steps_seen = [steps for panel in panels for steps, _ in panel.series.values()]
    first, last = min(steps[0] for steps in steps_seen), max(steps[-1] for steps in steps_seen)
    margin = 0.02 * (last - first) or 1.0
    large = [panel for panel in panels if not panel.small]
    small = [panel for panel in panels if panel.small]
    heights = [2.5] * math.ceil(len(large) / 2) + [1.85] * math.ceil(len(small) / 3)
    figure = new_figure(WIDTH, sum(heights) + 0.2)
    grid = figure.add_gridspec(len(heights), 6, height_ratios=heights)  # two large panels or three small ones in a row
    places = [(row, slice(start, start + 3)) for row in range(math.ceil(len(large) / 2)) for start in (0, 3)]
    first_small = math.ceil(len(large) / 2)
    small_places = [(row, slice(start, start + 2)) for row in range(first_small, len(heights)) for start in (0, 2, 4)]
    for panel, place in [*zip(large, places), *zip(small, small_places)]:
        axes = figure.add_subplot(grid[place])
        _panel(axes, panel)
        axes.set_xlim(first - margin, last + margin)
        if place[0] == len(heights) - 1:
            axes.set_xlabel("step", fontsize=9, color=SOFT)
    return figure


def _panel(axes: Axes, panel: curves.Panel) -> None:
    series, size = panel.series, 7.5 if panel.small else 8
    style(axes, panel.title)
    for color, (name, (steps, values)) in zip(PALETTE * len(series), series.items()):
        _curve(axes, steps, values, name, color)
    if len(series) > 1 or next(iter(series)) != panel.title:
        many = len(series) > (2 if panel.small else 3)
        axes.legend(
            frameon=False,
            fontsize=size,
            labelcolor=SOFT,
            handlelength=1.4,
            ncols=2 if many else 1,
            loc="upper left" if many else "best",
        )
        if many:  # room for the legend above the curves
            low, high = (pick(pick(values) for _, values in series.values()) for pick in (min, max))
            low = 0.0 if panel.percent else low
            axes.set_ylim(top=high + 0.6 * (high - low) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(3 if panel.small else 5, integer=True))
    axes.ticklabel_format(axis="y", scilimits=(-3, 5), useMathText=True)
    axes.yaxis.get_offset_text().set(size=8, color=SOFT)
    if panel.small:
        axes.yaxis.set_major_locator(MaxNLocator(4))
        axes.tick_params(labelsize=7.5)
        axes.title.set_fontsize(9)
    if panel.percent:
        axes.set_ylim(bottom=0)
        top = axes.get_ylim()[1]
        ticks = axes.get_yticks()
        axes.set_yticks(ticks[ticks <= min(top, 1.0)])  # none in the room for the legend
        axes.set_ylim(0, top)
        axes.yaxis.set_major_formatter(percent_axis())


def metric_bars(metrics: Sequence[Metric]) -> Figure:
    """Rates with their intervals as horizontal bars; a tick marks the chance level."""
    rows = [(m, m.value if m.low is None else m.low, m.value if m.high is None else m.high) for m in metrics]
    figure = new_figure(WIDTH, 0.36 * len(rows) + 0.9)
    axes = figure.add_subplot()
    style(axes)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    places = np.arange(len(rows))[::-1]
    values = np.array([metric.value for metric in metrics])
    spread = np.array([[m.value - low for m, low, _ in rows], [high - m.value for m, _, high in rows]]).clip(min=0)
    axes.barh(places, values, height=0.56, color=PALETTE[0], alpha=0.85)
    axes.errorbar(values, places, xerr=spread, fmt="none", ecolor=INK, elinewidth=1.1, capsize=3)
    right = max((max(high, metric.chance or 0) for metric, _, high in rows), default=1.0) or 1.0
    for place, (metric, _, high) in zip(places, rows):
        if metric.chance is not None:
            axes.plot([metric.chance] * 2, [place - 0.4, place + 0.4], color=PALETTE[1], linewidth=2.2, zorder=4)
        axes.text(high + 0.012 * right, place, metric.text(), va="center", fontsize=9, color=INK)
    if any(metric.chance is not None for metric in metrics):
        axes.plot([], [], color=PALETTE[1], linewidth=2.2, label="chance")
    axes.errorbar([], [], xerr=[], fmt="none", ecolor=INK, elinewidth=1.1, capsize=3, label="95 % interval")
    axes.legend(frameon=False, fontsize=8.5, labelcolor=SOFT, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2)
    axes.set_yticks(places, [metric.title for metric in metrics], fontsize=9, parse_math=False)
    axes.tick_params(axis="y", length=0, colors=INK)
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, right * 1.12)
    axes.xaxis.set_major_formatter(percent_axis())
    return figure


def similarity_matrix(
    similarities: np.ndarray, captions: Sequence[str] = (), images: Sequence[np.ndarray] = (), name: str = "cosine"
) -> Figure:
    """Similarities [caption, image] of pairs in the same order: the diagonal should be darkest in its row and column.

    Captions stand on the left and images on top, where there are at most 24 pairs.
    """
    n = len(similarities)
    captions, images = (captions, images) if n <= 24 else ((), ())
    side = min(5.2, 0.5 * n)  # all in inches
    left, bottom, top = (3.1, 0.15, 0.15 + 1.1 * side / n) if len(captions) else (0.4, 0.4, 0.15)
    width, height = left + side + 0.95, bottom + side + top
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((left / width, bottom / height, side / width, side / height))
    drawn = axes.imshow(similarities, cmap=BLUES, interpolation="nearest")
    _bare(axes)
    axes.set_xticks([])
    axes.set_yticks(range(len(captions)), [_short(text, 38) for text in captions], fontsize=8, parse_math=False)
    axes.tick_params(length=0, colors=INK)
    if not len(captions):
        axes.set_ylabel("captions", fontsize=9, color=SOFT)
        axes.set_xlabel("images", fontsize=9, color=SOFT)
    for column, image in enumerate(images):
        inset = axes.inset_axes((column - 0.46, -1.5, 0.92, 0.92), transform=axes.transData)
        inset.imshow(image, cmap="gray")
        inset.axis("off")
    if n <= 14:
        middle = (float(np.max(similarities)) + float(np.min(similarities))) / 2
        for i, j in np.ndindex(n, n):
            color = "white" if similarities[i, j] > middle else INK
            weight = "bold" if i == j else "normal"
            text = f"{similarities[i, j]:.2f}".replace("0.", ".").replace("-", "−")
            axes.text(j, i, text, ha="center", va="center", fontsize=7.5, color=color, fontweight=weight)
    scale = figure.add_axes(((left + side + 0.12) / width, bottom / height, 0.13 / width, side / height))
    bar = figure.colorbar(drawn, cax=scale)
    bar.outline.set_visible(False)
    scale.tick_params(labelsize=8, colors=SOFT, length=0)
    scale.set_title(name, fontsize=8, color=SOFT, loc="left")
    return figure


def modality_gap(image_embeds: np.ndarray, text_embeds: np.ndarray) -> tuple[Figure, float]:
    """Paired normalized embeddings [pair, dim] on their first two principal components, and the distance of the two centroids.

    The distance is Euclidean in the whole space (Liang et al. 2022); 0 is no gap, 2 the most.
    """
    both = np.concatenate([image_embeds, text_embeds]).astype(np.float64)
    centered = both - both.mean(axis=0)
    _, strengths, directions = np.linalg.svd(centered, full_matrices=False)
    points = np.zeros((len(both), 2))
    points[:, : min(2, len(directions))] = centered @ directions[:2].T
    share = (strengths**2)[:2].sum() / max((strengths**2).sum(), 1e-30)
    distance = float(np.linalg.norm(image_embeds.mean(axis=0) - text_embeds.mean(axis=0)))

    figure = new_figure(WIDTH * 0.72, 4.6)
    axes = figure.add_subplot()
    style(axes)
    images, texts = points[: len(image_embeds)], points[len(image_embeds) :]
    for image, text in list(zip(images, texts))[:150]:
        axes.plot([image[0], text[0]], [image[1], text[1]], color=LINE, linewidth=0.6, zorder=1)
    for cloud, color, name, marker in ((images, IMAGE_COLOR, "images", "o"), (texts, TEXT_COLOR, "captions", "^")):
        axes.scatter(
            cloud[:, 0], cloud[:, 1], s=13, color=color, alpha=0.65, linewidths=0, label=name, marker=marker, zorder=2
        )
    ends = np.stack([images.mean(axis=0), texts.mean(axis=0)])
    axes.plot(*ends.T, color=INK, linewidth=1.4, zorder=3)
    axes.scatter(
        ends[:, 0], ends[:, 1], s=70, color=[IMAGE_COLOR, TEXT_COLOR], edgecolors="white", linewidths=1.6, zorder=4
    )
    axes.set_title(f"centroids {distance:.2f} apart", fontsize=10, color=INK, loc="left")
    axes.set_xlabel(
        f"the first two principal components explain {percent(share)} of the variance", fontsize=9, color=SOFT
    )
    axes.set_aspect("equal", adjustable="datalim")
    axes.grid(False)
    axes.tick_params(labelbottom=False, labelleft=False, length=0)
    axes.legend(frameon=False, fontsize=9, labelcolor=SOFT, loc="best")
    return figure, distance


def histogram(values: Mapping[str, np.ndarray], label: str) -> Figure:
    """Distributions over the same bins, each normalized to its total; non-finite values are dropped."""
    kept = {name: np.asarray(v, dtype=np.float64)[np.isfinite(v)] for name, v in values.items()}
    figure = new_figure(WIDTH * 0.72, 2.9)
    axes = figure.add_subplot()
    style(axes)
    everything = np.concatenate(list(kept.values()) or [np.zeros(0)])
    edges = np.histogram_bin_edges(everything, bins=min(60, max(10, int(len(everything) ** 0.5))))
    for color, (name, numbers) in zip(PALETTE * len(kept), kept.items()):
        if len(numbers):
            weights = np.full(len(numbers), 1 / len(numbers))
            axes.hist(
                numbers, edges.tolist(), weights=weights, color=color, alpha=0.45, histtype="stepfilled", label=name
            )
            axes.hist(numbers, edges.tolist(), weights=weights, color=color, linewidth=1.4, histtype="step")
    axes.yaxis.set_major_formatter(percent_axis())
    axes.set_xlabel(label, fontsize=9, color=SOFT)
    if len(kept) > 1:
        axes.legend(frameon=False, fontsize=9, labelcolor=SOFT)
    return figure


def confusion_matrix(confusion: np.ndarray, classnames: Sequence[str]) -> Figure:
    """Counts [true, predicted], colored by the fraction of the true class; names and counts are drawn if they fit."""
    n = len(classnames)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = float(np.clip(0.42 * n, 2.4, 7.0))
    figure = new_figure(side + 2.2, side + 1.2)
    axes = figure.add_subplot()
    axes.imshow(share, cmap=BLUES, vmin=0, vmax=1, interpolation="nearest")
    _bare(axes)
    names = [_short(name, 22) for name in classnames] if n <= 50 else []
    size = 8.5 if n <= 24 else 6
    axes.set_xticks(
        range(len(names)), names, rotation=45, ha="right", rotation_mode="anchor", fontsize=size, parse_math=False
    )
    axes.set_yticks(range(len(names)), names, fontsize=size, parse_math=False)
    axes.tick_params(length=0, colors=INK)
    axes.set_xlabel("predicted", fontsize=9, color=SOFT)
    axes.set_ylabel("true", fontsize=9, color=SOFT)
    if n <= 16:
        for i, j in np.argwhere(confusion > 0):
            color = "white" if share[i, j] > 0.45 else INK
            axes.text(j, i, f"{confusion[i, j]}", ha="center", va="center", fontsize=7.5, color=color)
    return figure


def _curve(axes: Axes, steps: np.ndarray, values: np.ndarray, name: str, color: str) -> None:
    """Few points as dots on a line; many as a pale line with its running mean on top."""
    if len(values) <= 40:
        axes.plot(steps, values, color=color, linewidth=1.6, marker="o", markersize=3.2, label=name)
        return
    window = max(3, len(values) // 40) | 1
    padded = np.pad(values, window // 2, mode="reflect")
    smooth = np.convolve(padded, np.full(window, 1 / window), mode="valid")
    axes.plot(steps, values, color=color, linewidth=0.7, alpha=0.3)
    axes.plot(steps, smooth, color=color, linewidth=1.7, label=name)


def new_figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes, title: str = "") -> None:
    axes.set_title(title, fontsize=10, color=INK, loc="left", parse_math=False)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for name, spine in axes.spines.items():
        spine.set_visible(name in ("left", "bottom"))
        spine.set_color(LINE)
    axes.tick_params(labelsize=8.5, colors=SOFT, length=0)


def _bare(axes: Axes) -> None:
    for spine in axes.spines.values():
        spine.set_visible(False)


def percent_axis(unit: str = " %") -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{100 * value:.3g}{unit}")


def _short(text: str, length: int) -> str:
    """The text cut to about `length` Latin letters; an East Asian character takes the room of two."""
    text = " ".join(text.split())
    ends = np.cumsum([2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text])
    return text if not text or ends[-1] <= length else text[: int((ends < length).sum())].rstrip() + "…"
