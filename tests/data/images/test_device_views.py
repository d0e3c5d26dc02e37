"""Color and blur on the device equal those of single views."""

import numpy as np
import pytest
import torch
from helpers.image_draws import difference, draws, photograph

from coalign.data.images.device_views import finish
from coalign.data.images.views import apply
from coalign.types import STRONG, WEAK, AugmentationParams

CPU = torch.device("cpu")


def both(image, params, size):
    vectors = torch.tensor([p.vector() for p in params])
    unfinished = torch.stack([apply(image, p, size, finish=False) for p in params])
    return finish(unfinished, vectors, CPU), torch.stack([apply(image, p, size) for p in params])


@pytest.mark.parametrize("size", [16, 64, 224])
def test_strong_views(size):
    """More views than fit in a chunk; at 224 pixels, the largest sigmas have six taps per side."""
    ours, theirs = both(photograph(90, 70), draws(STRONG, (90, 70), 300 if size < 224 else 24), size)
    off = difference(ours, theirs)
    assert off.max() <= 1
    assert off.float().mean() < 1e-3


def test_weak_views_are_unchanged():
    ours, theirs = both(photograph(90, 70), draws(WEAK, (90, 70), 20), 32)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("size", [3, 40, 224])
def test_blur_alone_is_exact(size):
    params = [AugmentationParams(blur=float(sigma)) for sigma in np.float32([0.1, 0.5, 1.0, 2.0, 7.5])]
    ours, theirs = both(photograph(90, 70), params, size)
    assert torch.equal(ours, theirs)


def test_single_changes_and_gray():
    changes = [
        {"brightness": 0.4},
        {"contrast": -0.4},
        {"saturation": 0.4},
        {"hue": 0.1},
        {"grayed": 1.0, "contrast": 0.3},
    ]
    ours, theirs = both(photograph(90, 70), [AugmentationParams(**change) for change in changes], 64)
    assert difference(ours, theirs).max() <= 1
    assert torch.equal(ours[4, 0], ours[4, 1])
