"""A model that counts colors and letters, and a folder of small images of one color each, for tests of embeddings."""

import numpy as np
import torch
from PIL import Image

from coalign.types import DualEncoder

DIM = 26
_MIX = torch.randn(3, DIM, generator=torch.Generator().manual_seed(1))


class Letters:
    """Counts the images and texts that it embeds."""

    def __init__(self):
        self.images = self.texts = 0

    def encoder(self, **changes):
        return DualEncoder(self._images, self._texts, **{"image_size": 8, "name": "letters", **changes})

    def _images(self, pixels):
        self.images += len(pixels)
        return pixels.float().mean((2, 3)) @ _MIX

    def _texts(self, texts):
        self.texts += len(texts)
        counts = [[text.count(chr(ord("a") + letter)) for letter in range(DIM)] for text in texts]
        return torch.tensor(counts, dtype=torch.float) + 0.1


def color_of(number):
    return tuple(np.random.default_rng(number).integers(0, 256, 3).tolist())


def expected_image(number):
    """The embedding of the image of a number, by arithmetic on its color."""
    vector = np.array(color_of(number), np.float32) @ _MIX.numpy()
    return vector / np.linalg.norm(vector)


def expected_text(captions):
    """The normalized mean of the normalized counts of letters."""
    vectors = [np.array([text.count(chr(ord("a") + i)) + 0.1 for i in range(DIM)]) for text in captions]
    mean = sum(vector / np.linalg.norm(vector) for vector in vectors)
    return mean / np.linalg.norm(mean)


def write_image(folder, name, number, caption=None):
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    Image.new("RGB", (8, 8), color_of(number)).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption)
    return path


def write_images(folder, count):
    for number in range(count):
        write_image(folder, f"{number:04d}", number, f"caption {chr(ord('a') + number % 26)} {number}")
    return folder
