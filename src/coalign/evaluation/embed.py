"""Embeddings of a whole dataset, by any pair of encode callables."""

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
    """Embeddings of the readable images, and the list of unreadable ones."""

    embeds: Tensor  # float32 [image, dim], normalized, on the CPU
    indices: list[int]  # sample index of each row
    bad: list[Any] = field(default_factory=list)  # the loader's entry for each unreadable image


@dataclass
class Evaluation:
    """A task's result with the embeddings it was computed from."""

    result: Any  # RetrievalResult, ZeroShotResult, …
    images: ImageEmbeds
    texts: list[str]  # captions, or class names
    text_embeds: Tensor | None = None  # float32 [text, dim]; None if the task does not use them


# the output of `image_batches`: indices, pixels, bad entries
Batches = Iterable[tuple[Sequence[int], Tensor, Sequence[Any]]]
# this rank's embeddings -> the embeddings of each rank
AllGather = Callable[[ImageEmbeds], Sequence[ImageEmbeds]]


def embed_images(model: DualEncoder, batches: Batches, all_gather: AllGather | None = None) -> ImageEmbeds:
    """Returns the normalized embeddings of the batches (indices, uint8 pixels [batch, 3, size, size], bad entries) of `image_batches`.

    With several processes, each passes its own batches, and all receive all embeddings through `all_gather`.
    """
    return _encode_images(model, model.encode_image, batches, F.normalize, all_gather)


def image_features(model: DualEncoder, batches: Batches, all_gather: AllGather | None = None) -> ImageEmbeds:
    """Returns the image encoder's output before its projection, not normalized, float32 [image, width]; otherwise as `embed_images`.

    Raises UserError if the model does not expose it.
    """
    if model.image_features is None:
        raise UserError(f"{model.name} does not expose image features, which probes need.")
    return _encode_images(model, model.image_features, batches, lambda features: features, all_gather)


@torch.no_grad()
def _encode_images(
    model: DualEncoder,
    encode: Callable[[Tensor], Tensor],
    batches: Batches,
    normalize: Callable[[Tensor], Tensor],
    all_gather: AllGather | None,
) -> ImageEmbeds:
    parts: list[Tensor] = []
    indices: list[int] = []
    bad: list[Any] = []
    for batch_indices, pixels, batch_bad in batches:
        bad.extend(batch_bad)
        if len(batch_indices):
            parts.append(normalize(_to_cpu(encode(pixels), len(batch_indices), f"{model.name}: image")))
            indices.extend(batch_indices)
    images = ImageEmbeds(torch.cat(parts) if parts else torch.empty(0, 0), indices, bad)
    if all_gather is not None:
        images = _merge(all_gather(images))
    if not images.indices:
        raise UserError(f"There is nothing to evaluate: the data has no readable image ({len(images.bad)} bad).")
    return images


def _merge(parts: Sequence[ImageEmbeds]) -> ImageEmbeds:
    """Returns the embeddings of all ranks, sorted by index."""
    indices = [index for part in parts for index in part.indices]
    order = sorted(range(len(indices)), key=indices.__getitem__)
    non_empty = [part.embeds for part in parts if part.indices]
    embeds = torch.cat(non_empty)[order] if non_empty else torch.empty(0, 0)
    return ImageEmbeds(embeds, [indices[row] for row in order], [entry for part in parts for entry in part.bad])


@torch.no_grad()
def embed_texts(model: DualEncoder, texts: Sequence[str], batch_size: int = 256) -> Tensor:
    """Returns the normalized embeddings of texts, float32 [text, dim], on the CPU. Equal texts are encoded once and get equal rows."""
    if not texts:
        raise UserError("There is nothing to evaluate: the data has no captions.")
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # by length, so batches need little padding
    parts = []
    for start in range(0, len(distinct), batch_size):
        batch = distinct[start : start + batch_size]
        parts.append(F.normalize(_to_cpu(model.encode_text(batch), len(batch), f"{model.name}: text")))
    row = {text: i for i, text in enumerate(distinct)}
    return torch.cat(parts)[[row[text] for text in texts]]


def _to_cpu(embeds: Tensor, num_inputs: int, name: str) -> Tensor:
    """Returns embeds as float32 on the CPU, after checking their shape and values."""
    if embeds.ndim != 2 or len(embeds) != num_inputs:
        raise ValueError(
            f"{name} encoder returned shape {tuple(embeds.shape)} for {num_inputs} inputs; expected [batch, dim]"
        )
    embeds = embeds.detach().float().cpu()
    require_finite(embeds, name)
    return embeds


def require_finite(embeds: Tensor, name: str) -> None:
    """Raises UserError if embeds [item, dim] contains NaN or infinity."""
    num_bad = int((~torch.isfinite(embeds).all(dim=-1)).sum())
    if num_bad:
        raise UserError(
            f"{name} embeddings are not finite for {num_bad} of {len(embeds)} inputs; "
            "the weights are corrupt or the precision is too low."
        )
