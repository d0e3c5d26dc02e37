"""Pictures without a file, drawn views, and how far two pictures are apart."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from coalign.data.images.views import NUM_DRAWS, sample_params
from coalign.types import AugmentationParams, AugmentationPolicy


def photograph(width: int, height: int, low: int = 0, high: int = 255, seed: int = 0) -> np.ndarray:
    """Smooth color noise at several scales."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells in (3, 8, 20):
        for channel in range(3):
            noise = Image.fromarray(rng.normal(size=(cells, cells)).astype(np.float32))
            pixels[..., channel] += np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC)) / cells**0.5
    pixels = (pixels - pixels.min()) / (pixels.max() - pixels.min())
    return (low + (high - low) * pixels).astype(np.uint8)


def difference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.int() - b.int()).abs()


def draws(policy: AugmentationPolicy, size: tuple[int, int], count: int) -> list[AugmentationParams]:
    numbers = np.random.default_rng(0).random((count, NUM_DRAWS))
    return [AugmentationParams(*row) for row in sample_params(numbers, policy, np.tile(size, (count, 1))).tolist()]
