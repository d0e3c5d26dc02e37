"""The evaluation view of an image: resized by Pillow and cropped or padded, as open_clip and transformers do it."""

from __future__ import annotations

import numpy as np
from PIL import Image

from coalign.types import Preprocess

VERSION = 2  # of the pixels; part of the key of stored features, and of the results of a run
_MAX_RATIO = 64  # of the sides of an image that is resized as a whole


def evaluation_view(image: np.ndarray, size: int, preprocess: Preprocess) -> np.ndarray:
    """Returns the evaluation view, uint8 [size, size, 3], of an image, uint8 [height, width, 3].

    Sides and margins are rounded as in torchvision's Resize and CenterCrop, so that the pixels are those of open_clip.
    """
    source, resample = Image.fromarray(image), Image.Resampling[preprocess.interpolation.upper()]
    width, height = source.size
    if preprocess.resize_mode == "squash":
        return np.asarray(source.resize((size, size), resample))
    if preprocess.resize_mode == "longest":
        longest = max(width, height)
        inner = np.asarray(source.resize([max(1, round(size * side / longest)) for side in source.size], resample))
        view = np.zeros((size, size, 3), np.uint8)
        top, left = ((size - side) // 2 for side in inner.shape[:2])
        view[top : top + len(inner), left : left + inner.shape[1]] = inner
        return view
    shortest = min(width, height)
    w, h = (size if side == shortest else int(size * side / shortest) for side in source.size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    right, bottom = left + size, top + size
    if max(w, h) > _MAX_RATIO * size:  # only the part that is shown, as the whole may not fit into memory
        box = (left * width / w, top * height / h, right * width / w, bottom * height / h)
        return np.asarray(source.resize((size, size), resample, box))
    return np.asarray(source.resize((w, h), resample))[top:bottom, left:right]
