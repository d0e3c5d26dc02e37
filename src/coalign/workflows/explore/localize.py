"""localize(): maps of the image regions that match a text, for any run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coalign.devices import best_device
from coalign.errors import UserError
from coalign.evaluation.embed import cut_lines
from coalign.evaluation.localization import upsample
from coalign.networks.grad_cam import grad_cam
from coalign.networks.towers.image import ImageTower
from coalign.runs.run import Run, context_length, image_size, load, preprocess
from coalign.types import Localizer
from coalign.workflows.image_files import check_figure_path, read_image, save_figure


def localizer(run: Run) -> tuple[Localizer, str]:
    """Returns a function that computes localization maps, and its technique: the method's own maps if it has any, else Grad-CAM."""
    method, device = run.method.eval(), next(run.method.parameters()).device

    def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, lengths = run.tokenizer(texts, context_length(method))
        return ids.to(device), lengths.to(device)

    if method.localize is not None:
        compare_patches = torch.no_grad()(method.localize)
        return lambda pixels, texts: compare_patches(pixels.to(device), *tokens(texts)), "patch similarity"
    tower = getattr(method, "image", None)
    if not isinstance(tower, ImageTower):
        raise UserError(f"{run.path} has no image tower for Grad-CAM and no localization maps of its own.")

    def grad_cam_maps(pixels: Tensor, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            embeds = method.encode_text(*tokens(texts))
        return grad_cam(tower, method.encode_image, pixels.to(device), embeds, method.similarity)

    return grad_cam_maps, "Grad-CAM"


def localize(
    runs: Sequence[str | Path], image: str | Path, texts: Sequence[str], out: str | Path, device: str | None = None
) -> np.ndarray:
    """Writes a figure of the maps over the image as each run sees it, with one row per run and one column per text.

    Returns the maps, float32 [run, text, side, side]. Raises UserError if there are no runs or texts, or a file cannot be read or written.
    """
    from coalign.report.localization_maps import map_grid

    if not runs:
        raise UserError("No model is given; give a run's folder, such as runs/oner.")
    if not texts or not all(text.strip() for text in texts):
        raise UserError('There is nothing to localize; give --text, such as --text "a red apple".')
    out = check_figure_path(out)
    device = best_device(device)
    loaded = [load(run, device=device) for run in runs]
    side = max(image_size(run.method) for run in loaded)
    backgrounds, maps, names = [], [], []
    for run in loaded:
        for text in texts:
            for line in cut_lines(run.encoder(), [text], f"text {text[:40]!r}"):
                print(f"{run.path.name}: {line}")
        compute_maps, technique = localizer(run)
        backgrounds.append(read_image(image, side, preprocess(run.method))[0].permute(1, 2, 0).numpy())
        pixels = read_image(image, image_size(run.method), preprocess(run.method))
        run_maps = compute_maps(pixels.expand(len(texts), -1, -1, -1), list(texts))
        maps.append(upsample(run_maps.cpu(), side).numpy())
        names.append(f"{run.path.name}, {technique}")
    save_figure(map_grid(backgrounds, np.stack(maps), [list(texts)] * len(loaded), names), out)
    return np.stack(maps)
