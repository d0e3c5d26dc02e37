"""localize(): maps of where an image shows what a text names, for any run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from coalign.errors import UserError
from coalign.evaluation.localization import upsample
from coalign.method import Method
from coalign.methods.oner import OneR
from coalign.networks.grad_cam import grad_cam
from coalign.networks.towers import ImageTower
from coalign.run.model import Run, image_size, load
from coalign.run.pictures import check_picture, read_picture, save_picture
from coalign.types import Localizer


def localizer(run: Run) -> tuple[Localizer, str]:
    """What makes maps of this run's model, and how: one tower compares patches with the text (OneR), two towers take Grad-CAM."""
    method, device = run.method.eval(), next(run.method.parameters()).device

    def tokens(texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        ids, lengths = run.tokenizer(texts, run.config.context_length)
        return ids.to(device), lengths.to(device)

    if isinstance(method, OneR):
        compare_patches = torch.no_grad()(method.localize)
        return lambda pixels, texts: compare_patches(pixels.to(device), *tokens(texts)), "patch similarity"
    tower = _image_tower(method)

    def grad_cam_maps(pixels: Tensor, texts: Sequence[str]) -> Tensor:
        with torch.no_grad():
            embeds = method.encode_text(*tokens(texts))
        return grad_cam(tower, method.encode_image, pixels.to(device), embeds)

    return grad_cam_maps, "Grad-CAM"


def _image_tower(method: Method) -> ImageTower:
    return next(module for module in method.modules() if isinstance(module, ImageTower))


def localize(
    runs: Sequence[str | Path], image: str | Path, texts: Sequence[str], out: str | Path, device: str = "cpu"
) -> np.ndarray:
    """Writes a picture of the maps of each run (a row) and text (a column) over the image's central square. Returns the maps,
    float32 [run, text, side, side]. UserError for what cannot be read."""
    from coalign.report.maps import map_grid

    if not runs:
        raise UserError("There is no model to ask; give a run's folder, such as runs/oner.")
    if not texts or not all(text.strip() for text in texts):
        raise UserError('There is nothing to look for; give --text, such as --text "a red apple".')
    out = check_picture(out)
    loaded = [load(run, device=device) for run in runs]
    side = max(image_size(run.method) for run in loaded)
    shown = read_picture(image, side)
    maps, names = [], []
    for run in loaded:
        make, how = localizer(run)
        pixels = read_picture(image, image_size(run.method))
        own = make(pixels.expand(len(texts), -1, -1, -1), list(texts))
        maps.append(upsample(own.cpu(), side).numpy())
        names.append(f"{run.path.name}, {how}")
    picture = shown[0].permute(1, 2, 0).numpy()
    save_picture(map_grid([picture] * len(loaded), np.stack(maps), [list(texts)] * len(loaded), names), out)
    return np.stack(maps)
