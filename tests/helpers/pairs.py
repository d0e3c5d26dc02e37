"""Random pairs in memory, some of them bad, a loader of them, and when its batches are the same."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image

from coalign.data.loading.train import LoadedBatch, PairLoader
from coalign.data.sources.base import Source
from coalign.data.text.tokenizer import load_tokenizer
from coalign.errors import BadSample
from coalign.types import STRONG, WEAK, Batch, Record, TextPolicy, ViewPlan

SIZE, CONTEXT = 16, 24
PLAN = ViewPlan(
    images={"weak": WEAK, "strong": STRONG},
    texts={"caption": TextPolicy(), "masked": TextPolicy("eda", mask_p=0.3)},
    patch_ranks=True,
    tags=3,
    captionless=True,
)
CLIP_PLAN = ViewPlan(images={"view": WEAK}, texts={"caption": TextPolicy()})
WORDS = ["red", "blue", "green", "apple", "pear", "boat", "house", "tree", "small", "large", "old", "left", "top"]
BAD = {"no_record": {3, 11}, "no_image": {0, 20, 21, 22}, "no_captions": {5}}


@dataclass
class Pairs(Source):
    """Random pairs: an image differs from every other, has up to four captions and four tags. Some are bad."""

    size: int = 40
    no_record: set[int] = field(default_factory=set)
    no_image: set[int] = field(default_factory=set)
    no_captions: set[int] = field(default_factory=set)
    name: str = "pairs"

    def __len__(self) -> int:
        return self.size

    def record(self, index: int) -> Record:
        if index in self.no_record:
            raise BadSample("unreadable row", f"row {index}")
        random = np.random.default_rng(index)
        captions = [" ".join(random.choice(WORDS, random.integers(2, 12))) for _ in range(random.integers(1, 5))]
        tags = tuple(random.choice(["red", "boat", "tree", "rare"], random.integers(0, 4), replace=False))
        return Record(f"pair-{index}", () if index in self.no_captions else tuple(captions), tags)

    def image(self, index: int) -> bytes | np.ndarray:
        if index in self.no_image:
            return b"this is no image"
        pixels = np.random.default_rng(index).integers(0, 256, (20, 30, 3), np.uint8)
        if index % 2:
            return pixels
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        return file.getvalue()


def make_loader(source=None, indices=None, plan=PLAN, **changes) -> PairLoader:
    """Batches of eight of the pairs, in this process, with everything that the plan asks for."""
    source = source or Pairs()
    indices = np.arange(len(source)) if indices is None else indices
    settings = {"image_size": SIZE, "context_length": CONTEXT, "batch_size": 8, "seed": 7} | changes
    if plan.tags:
        settings.setdefault("tag_vocabulary", {"red": 0, "boat": 1, "tree": 2})
    if plan.patch_ranks:
        settings["patch_grid"] = (2, 3)
    return PairLoader(source, indices, plan, load_tokenizer("clip"), **settings)


def decode(ids: torch.Tensor) -> str:
    """The words of a caption's tokens."""
    return load_tokenizer("clip").decode(ids.tolist())


def batch_tensors(batch: Batch) -> dict[str, torch.Tensor]:
    tensors = {"indices": batch.indices, "caption_ids": batch.caption_ids, "has_caption": batch.has_caption}
    if batch.tags is not None:
        tensors["tags"] = batch.tags
    for name, view in (batch.images | batch.texts).items():
        tensors |= {f"{name}.{part}": value for part, value in vars(view).items() if value is not None}
    return tensors


def assert_same_batches(left: list[LoadedBatch], right: list[LoadedBatch]) -> None:
    assert len(left) == len(right)
    for one, other in zip(left, right):
        assert one.bad == other.bad
        one, other = batch_tensors(one.batch), batch_tensors(other.batch)
        assert one.keys() == other.keys()
        for name in one:
            assert one[name].dtype == other[name].dtype
            assert torch.equal(one[name], other[name]), name
