"""Batches of images for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coalign.data.images.decode import open_image
from coalign.data.images.views import make_views
from coalign.data.loading.train import BadEntry
from coalign.data.loading.workers import fetch_all
from coalign.data.sources.base import Source
from coalign.errors import BadSample
from coalign.randomness import generator
from coalign.types import EVALUATION, AugmentationPolicy


def image_batches(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    image_size: int,
    batch_size: int = 256,
    workers: int = 0,
    preprocess: Callable[[Any], Tensor] | None = None,
    policy: AugmentationPolicy = EVALUATION,
    epoch: int = 0,
) -> Generator[tuple[list[int], Tensor, list[BadEntry]], None, None]:
    """Yields (indices, uint8 pixels [batch, 3, size, size], bad samples) for the images at `indices`, in order.

    Bad samples are omitted from indices and pixels and listed separately, with epoch 0; a batch may be empty. Images are shown in the
    evaluation view; with `preprocess`, they are what it returns for the upright RGB PIL image; with another `policy`, views of that policy
    and epoch.
    """
    make = partial(
        _image_batch, source, np.asarray(indices, np.int64), image_size, batch_size, preprocess, policy, epoch
    )
    return fetch_all(make, range(-(-len(indices) // batch_size)), workers, ahead=workers)


def _image_batch(
    source: Source,
    indices: np.ndarray,
    size: int,
    batch_size: int,
    preprocess: Callable[[Any], Tensor] | None,
    policy: AugmentationPolicy,
    epoch: int,
    task: int,
) -> tuple[list[int], Tensor, list[BadEntry]]:
    batch = indices[task * batch_size : (task + 1) * batch_size].tolist()
    pixels = np.empty((len(batch), 3, size, size), np.uint8)
    good: list[int] = []
    bad: list[BadEntry] = []
    for index in batch:
        try:
            if preprocess is None:
                draw = partial(generator, 0, epoch, index, 0)
                view, _ = make_views(source.image(index), {"evaluation": policy}, draw, size)["evaluation"]
            else:
                view = preprocess(Image.fromarray(open_image(source.image(index)).decode(1.0)))
            pixels[len(good)] = view.numpy()
            good.append(index)
        except BadSample as error:
            bad.append(BadEntry(sample_key(source, index), error.reason, error.detail, 0))
    return good, torch.from_numpy(pixels[: len(good)]), bad


def sample_key(source: Source, index: int) -> str:
    """The key of a sample; for an unusable sample, the source's name and the index."""
    try:
        return source.record(index).key
    except BadSample:
        return f"{source.name}[{index}]"
