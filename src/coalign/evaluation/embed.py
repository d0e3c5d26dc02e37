"""Embeddings of a whole data set by any pair of encode callables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coalign.errors import UserError
from coalign.types import DualEncoder


@dataclass
class ImageEmbeds:
    """Rows of images that could be read, and the list of those that could not."""

    embeds: Tensor  # float32 [image, dim], normalised, on the CPU
    indices: list[int]  # of each row in its source
    bad: list[Any] = field(default_factory=list)  # what the loader says of each unreadable image


@dataclass
class Evaluation:
    """A task's result with the embeddings that it was made from."""

    result: Any  # RetrievalResult, ZeroShotResult, …
    images: ImageEmbeds
    texts: list[str]  # captions, or class names
    text_embeds: Tensor | None = None  # float32 [text, dim]; None: the task has no use for them


Batches = Iterable[
    tuple[Sequence[int], Tensor, Sequence[Any]]
]  # what `image_batches` gives: indices, pixels, bad entries
# the part of this process -> the parts of all processes
Exchange = Callable[[ImageEmbeds], Sequence[ImageEmbeds]]


def embed_images(model: DualEncoder, batches: Batches, exchange: Exchange | None = None) -> ImageEmbeds:
    """Embeds the batches (indices, uint8 pixels [batch, 3, size, size], bad entries) of `data.evaluation_views.image_batches`. Of several
    processes, each is given its own batches, and gets the embeddings of all by `exchange`."""
    return _encode_images(model, model.encode_image, batches, F.normalize, exchange)


def image_features(model: DualEncoder, batches: Batches, exchange: Exchange | None = None) -> ImageEmbeds:
    """The same of the image encoder's output before its projection, as it is: float32 [image, width]. UserError for a model that does not
    give it."""
    if model.image_features is None:
        raise UserError(f"{model.name} does not give its image features, which a probe needs.")
    return _encode_images(model, model.image_features, batches, lambda features: features, exchange)


@torch.no_grad()
def _encode_images(
    model: DualEncoder,
    encode: Callable[[Tensor], Tensor],
    batches: Batches,
    finish: Callable[[Tensor], Tensor],
    exchange: Exchange | None,
) -> ImageEmbeds:
    parts: list[Tensor] = []
    indices: list[int] = []
    bad: list[Any] = []
    for batch_indices, pixels, batch_bad in batches:
        bad.extend(batch_bad)
        if len(batch_indices):
            parts.append(finish(_checked(encode(pixels), len(batch_indices), f"{model.name}: image")))
            indices.extend(batch_indices)
    own = ImageEmbeds(torch.cat(parts) if parts else torch.empty(0, 0), indices, bad)
    found = own if exchange is None else _merged(exchange(own))
    if not found.indices:
        raise UserError(f"There is nothing to evaluate: the data gave no readable image ({len(found.bad)} bad).")
    return found


def _merged(parts: Sequence[ImageEmbeds]) -> ImageEmbeds:
    """The parts of all processes, in the order of the indices."""
    indices = [index for part in parts for index in part.indices]
    order = sorted(range(len(indices)), key=indices.__getitem__)
    held = [part.embeds for part in parts if part.indices]
    embeds = torch.cat(held)[order] if held else torch.empty(0, 0)
    return ImageEmbeds(embeds, [indices[row] for row in order], [entry for part in parts for entry in part.bad])


@torch.no_grad()
def embed_texts(model: DualEncoder, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """float32 [text, dim], normalised, on the CPU. Equal texts are encoded once and get equal rows."""
    if not texts:
        raise UserError("There is nothing to evaluate: the data gave no caption.")
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # by length, so that a batch needs little padding
    parts = []
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        parts.append(F.normalize(_checked(model.encode_text(batch), len(batch), f"{model.name}: text")))
    row = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts)[[row[text] for text in texts]]


def _checked(embeds: Tensor, rows: int, what: str) -> Tensor:
    if embeds.ndim != 2 or len(embeds) != rows:
        raise ValueError(f"{what} encoder gave shape {tuple(embeds.shape)} for {rows} inputs; [batch, dim] is expected")
    embeds = embeds.detach().float().cpu()
    require_finite(embeds, what)
    return embeds


def require_finite(embeds: Tensor, what: str) -> None:
    """UserError if a row of [item, dim] holds NaN or infinity."""
    broken = int((~torch.isfinite(embeds).all(dim=-1)).sum())
    if broken:
        raise UserError(
            f"{what} embeddings are not finite for {broken} of {len(embeds)} inputs; "
            "the weights are broken or the precision is too low."
        )
