"""Collections whose answers can be computed by hand: one image per color, embedded as its mean color."""

from __future__ import annotations

import io

import numpy as np
import torch
from PIL import Image

from coalign.errors import UserError
from coalign.types import DualEncoder
from coalign.workflows.collection.nearest import ExactVectors
from coalign.workflows.collection.query import Collection
from coalign.workflows.collection.records import Records
from coalign.workflows.evaluate.eval_model import EvalModel

COLORS = {"red": (230, 20, 30), "green": (20, 210, 40), "blue": (30, 20, 220), "yellow": (240, 220, 20)}


def unit(vector):
    return np.asarray(vector, np.float32) / np.linalg.norm(vector)


def color_vector(text):
    """The vector of a text: the sum of the colors that it names, else gray."""
    named = [color for name, color in COLORS.items() if name in text]
    return unit(np.sum(named, axis=0) if named else (1, 1, 1))


def color_encoder():
    """An encoder of mean colors."""
    return DualEncoder(
        lambda pixels: pixels.float().mean((2, 3)),
        lambda texts: torch.tensor(np.stack([color_vector(text) for text in texts])),
        image_size=8,
        name="mean color",
        logit_scale=10.0,
    )


class ColorRecords(Records):
    """Image files of one color each, in two folders; `lost` rows have none."""

    def __init__(self, colors, side=40, lost=()):
        self.colors, self.lost, self.shape = colors, lost, (side, 2 * side, 3)

    def __len__(self):
        return len(self.colors)

    def key(self, row):
        return f"{'even' if row % 2 == 0 else 'odd'}/{row}.png"

    def captions(self, row):
        return (f"image {row}",)

    def tags(self, row):
        return (f"third-{row % 3}",)

    def image(self, row):
        if row in self.lost:
            raise UserError(f"The image {self.key(row)} is gone.")
        return image_bytes(self.colors[row], self.shape)


def image_bytes(color, shape=(40, 80, 3), kind="PNG", **options):
    """An image file of one color."""
    file = io.BytesIO()
    Image.fromarray(np.full(shape, color, np.uint8)).save(file, kind, **options)
    return file.getvalue()


def random_colors(count, seed=0):
    return np.random.default_rng(seed).integers(1, 256, (count, 3))


def color_collection(count=24, seed=0, name="colors", lost=()):
    colors = random_colors(count, seed)
    vectors = np.stack([unit(color) for color in colors])
    return Collection(name, EvalModel(color_encoder()), ExactVectors(vectors), ColorRecords(colors, lost=lost))
