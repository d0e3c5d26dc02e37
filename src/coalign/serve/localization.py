"""Draws over a picture which of its regions match a text."""

from __future__ import annotations

import numpy as np
from PIL import Image

from coalign.evaluation.localization import upsample
from coalign.report.localization_maps import overlay
from coalign.runs.run import image_size, preprocess
from coalign.workflows.evaluate.eval_model import EvalModel
from coalign.workflows.image_files import evaluation_view

_SIDE = 384  # pixels


def draw_heat_map(model: EvalModel, image: Image.Image, text: str) -> np.ndarray:
    """Returns the part of the image that the model sees with its heat map, uint8 [side, side, 3].

    Raises UserError if the model has no localization maps.
    """
    method = model.require_run("localization maps").method
    compute_maps, _ = model.localizer()
    pixels, settings = np.asarray(image), preprocess(method)
    side = max(_SIDE, image_size(method))
    maps = compute_maps(evaluation_view(pixels, image_size(method), settings)[None], [text])
    background = evaluation_view(pixels, side, settings).permute(1, 2, 0).numpy()
    return overlay(background, upsample(maps.cpu(), side)[0].numpy())
