"""Localization maps drawn over images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from coalign.report.figures import INK, SOFT, WIDTH, new_figure

# from transparent to opaque orange, so that the image stays visible
_HEAT = LinearSegmentedColormap.from_list(
    "heat", [(0.82, 0.47, 0.18, 0.0), (0.82, 0.47, 0.18, 0.45), (0.71, 0.17, 0.11, 0.9)]
)


def map_grid(
    images: Sequence[np.ndarray], maps: np.ndarray, texts: Sequence[Sequence[str]], names: Sequence[str]
) -> Figure:
    """One row per image, uint8 [side, side, 3]: the image, then each of its maps [row, column, side, side], min-max scaled and titled with
    its text. `names` label the rows."""
    rows, columns = maps.shape[:2]
    size = min(2.2, WIDTH / (columns + 1))
    figure = new_figure(size * (columns + 1), (size + 0.3) * rows)
    for row, (image, own, words, name) in enumerate(zip(images, maps, texts, names)):
        gray = _pale_gray(image)
        for column in range(columns + 1):
            axes = figure.add_subplot(rows, columns + 1, row * (columns + 1) + column + 1)
            axes.set(xticks=[], yticks=[])
            for spine in axes.spines.values():
                spine.set_visible(False)
            if column == 0:
                axes.imshow(image)
                axes.set_ylabel(name, fontsize=9, color=INK)
                continue
            heat = own[column - 1]
            axes.imshow(gray)
            axes.imshow(_scaled(heat), cmap=_HEAT, vmin=0, vmax=1)
            axes.set_title(words[column - 1], fontsize=9, color=SOFT, parse_math=False, wrap=True)
    return figure


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Draws a map [side, side], min-max scaled, over an image: uint8 [side, side, 3]."""
    colors = _HEAT(_scaled(heat))
    opacity = colors[..., 3:]
    mixed = _pale_gray(image) * (1 - opacity) + 255 * colors[..., :3] * opacity
    return np.rint(mixed).astype(np.uint8)


def _pale_gray(image: np.ndarray) -> np.ndarray:
    """Returns the image in pale gray, so that all color comes from the map."""
    return (np.repeat(image.mean(2, keepdims=True), 3, 2) * 0.75 + 64).clip(0, 255).astype(np.uint8)


def _scaled(heat: np.ndarray) -> np.ndarray:
    """Scales a map to [0, 1] by its minimum and maximum; a map that is constant up to rounding becomes 0."""
    span = float(np.ptp(heat))
    return (heat - heat.min()) / span if span > 1e-6 * float(np.abs(heat).max()) else np.zeros_like(heat)
