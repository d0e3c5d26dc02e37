"""Scatter plots of image and text embeddings."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from coalign.report.figures import INK, LINE, PALETTE, SOFT, WIDTH, new_figure, style

_MARKS = {"images": ("o", PALETTE[0]), "captions": ("^", PALETTE[1]), "joint": ("s", PALETTE[2])}


def space_panels(panels: Mapping[str, Mapping[str, np.ndarray]]) -> Figure:
    """One panel per title, with the points [pair, 2] of each kind of input; pale lines connect images with their captions."""
    figure = new_figure(WIDTH, WIDTH / max(2, len(panels)) + 0.4)
    for number, (title, kinds) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), number)
        style(axes)
        axes.grid(False)
        for image, text in zip(kinds["images"], kinds["captions"]):
            axes.plot([image[0], text[0]], [image[1], text[1]], color=LINE, linewidth=0.5, zorder=1)
        for kind, points in kinds.items():
            mark, color = _MARKS[kind]
            axes.scatter(
                points[:, 0],
                points[:, 1],
                s=11,
                marker=mark,
                color=color,
                alpha=0.7,
                linewidths=0,
                label=kind,
                zorder=2,
            )
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.tick_params(labelbottom=False, labelleft=False, length=0)
        axes.set_aspect("equal", adjustable="datalim")
        if number == 1:
            axes.legend(frameon=False, fontsize=9, labelcolor=SOFT, loc="best")
    return figure
