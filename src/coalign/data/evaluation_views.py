"""The images of a source as evaluation sees them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from coalign.data.image_views import make_views
from coalign.data.images import open_image
from coalign.data.loader import BadEntry
from coalign.data.randomness import generator
from coalign.data.workers import fetch_all
from coalign.errors import BadSample, NoCaption
from coalign.types import EVALUATION, AugmentationPolicy, Source


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
    """The evaluation view of each of `indices`, in order: (indices, uint8 pixels [b, 3, size, size], bad samples).

    Bad samples are left out of the first two and listed in the third, with epoch 0; b may be 0. With `preprocess`, what it makes of the
    upright RGB picture takes the place of the evaluation view. With a `policy`, it is the view of that policy and epoch, for training.
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
    """What to call a sample, also one without a caption, or that cannot be used."""
    try:
        return source.record(index).key
    except NoCaption as bad:
        return bad.record.key
    except BadSample:
        return f"{source.name}[{index}]"
