"""What a device makes of a batch of views is what each view is made by alone."""

import numpy as np
import pytest
import torch
from test_image_views import difference, draws, photograph

from coalign.data.device_views import finish
from coalign.data.image_views import apply
from coalign.types import STRONG, WEAK, AugmentationParams

CPU = torch.device("cpu")


def both(image, params, size):
    vectors = torch.tensor([p.vector() for p in params])
    unfinished = torch.stack([apply(image, p, size, finish=False) for p in params])
    return finish(unfinished, vectors, CPU), torch.stack([apply(image, p, size) for p in params])


@pytest.mark.parametrize("size", [16, 64, 224])
def test_strong_views(size):
    """More than are made at once; the greatest sigmas have six taps a side at 224 pixels."""
    ours, theirs = both(photograph(90, 70), draws(STRONG, (90, 70), 300 if size < 224 else 24), size)
    off = difference(ours, theirs)
    assert off.max() <= 1
    assert off.float().mean() < 1e-3


def test_weak_views_are_left_alone():
    ours, theirs = both(photograph(90, 70), draws(WEAK, (90, 70), 20), 32)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [3, 40, 224])
def test_blur_alone_is_exact(size):
    params = [AugmentationParams(blur=float(sigma)) for sigma in np.float32([0.1, 0.5, 1.0, 2.0, 7.5])]
    ours, theirs = both(photograph(90, 70), params, size)
    assert torch.equal(ours, theirs)


def test_each_change_alone_and_grey():
    changes = [
        {"brightness": 0.4},
        {"contrast": -0.4},
        {"saturation": 0.4},
        {"hue": 0.1},
        {"greyed": 1.0, "contrast": 0.3},
    ]
    ours, theirs = both(photograph(90, 70), [AugmentationParams(**change) for change in changes], 64)
    assert difference(ours, theirs).max() <= 1
    assert torch.equal(ours[4, 0], ours[4, 1])
