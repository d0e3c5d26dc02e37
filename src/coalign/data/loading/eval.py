"""Batches of images for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coalign.data.images.decode import OpenedImage, open_image
from coalign.data.images.views import in_groups, make_views
from coalign.data.loading.samples import BadEntry, sample_key
from coalign.data.loading.workers import fetch_all
from coalign.data.sources.base import Source
from coalign.errors import BadSample
from coalign.randomness import Draws
from coalign.types import CLIP_PREPROCESS, EVALUATION, AugmentationPolicy, Preprocess


def image_batches(
    source: Source,
    indices: Sequence[int] | np.ndarray,
    image_size: int,
    batch_size: int = 256,
    workers: int = 0,
    preprocess: Preprocess | Callable[[Any], Tensor] = CLIP_PREPROCESS,
    policy: AugmentationPolicy = EVALUATION,
    epoch: int = 0,
) -> Generator[tuple[list[int], Tensor, list[BadEntry]], None, None]:
    """Yields (indices, uint8 pixels [batch, 3, size, size], bad samples) for the images at `indices`, in order.

    Bad samples are omitted from indices and pixels and listed separately, with epoch 0; a batch may be empty. Images are shown in the
    evaluation view, or are what a function `preprocess` returns for the upright RGB PIL image; with another `policy`, they are views of
    that policy and epoch.
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
    preprocess: Preprocess | Callable[[Any], Tensor],
    policy: AugmentationPolicy,
    epoch: int,
    task: int,
) -> tuple[list[int], Tensor, list[BadEntry]]:
    batch = indices[task * batch_size : (task + 1) * batch_size]
    pixels = np.zeros((len(batch), 3, size, size), np.uint8)
    failures: dict[int, BadSample] = {}

    def opened() -> Iterator[tuple[int, OpenedImage]]:
        for row, index in enumerate(batch.tolist()):
            try:
                image = open_image(source.image(index))
                if isinstance(preprocess, Preprocess):
                    yield row, image
                else:
                    pixels[row] = preprocess(Image.fromarray(image.decode(1.0))).numpy()
            except BadSample as error:
                failures[row] = error.copy()

    for rows, images in in_groups(opened()):
        draws = Draws(0, epoch, batch[rows])
        assert isinstance(preprocess, Preprocess)  # else nothing is opened
        views = make_views(images, {"evaluation": policy}, draws.uniform, size, preprocess=preprocess)
        pixels[rows] = views.pixels[0]
        failures |= {rows[row]: error for row, error in views.failures.items()}
    bad = [BadEntry(sample_key(source, int(batch[i])), e.reason, e.detail, 0) for i, e in sorted(failures.items())]
    good = np.setdiff1d(np.arange(len(batch)), list(failures))
    return batch[good].tolist(), torch.from_numpy(pixels if len(good) == len(batch) else pixels[good]), bad
