"""Operations on embeddings, which are a tensor, or a NamedTuple of tensors, with the sample as their first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.types import Embeds, Similarity

_CHUNK = 8_000_000  # comparisons of two vectors in memory at a time


def map_fields(embeds: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to the tensor, or to each tensor of a NamedTuple."""
    return function(embeds) if isinstance(embeds, Tensor) else type(embeds)(*map(function, embeds))


def fields(embeds: Embeds) -> dict[str, Tensor]:
    """Returns the tensors by name; a tensor that is no field of a NamedTuple is named "embeds"."""
    return {"embeds": embeds} if isinstance(embeds, Tensor) else embeds._asdict()  # type: ignore[attr-defined]


def num_samples(embeds: Embeds) -> int:
    return len(embeds) if isinstance(embeds, Tensor) else len(embeds[0])


def take(embeds: Any, rows: Any) -> Any:
    """Returns the samples at `rows`: a slice, a list, or an int64 or bool tensor."""
    return map_fields(embeds, lambda tensor: tensor[rows])


def concatenate(parts: Sequence[Any]) -> Any:
    """Joins the samples of all parts. Other axes, such as tokens, are padded at their end with zeros (False) to the longest."""
    if isinstance(parts[0], Tensor):
        return _concatenate(parts)
    return type(parts[0])(*map(_concatenate, zip(*parts)))


def _concatenate(parts: Sequence[Tensor]) -> Tensor:
    longest = [max(lengths) for lengths in zip(*(part.shape[1:] for part in parts))]
    padded = []
    for part in parts:
        missing = [extra for length, own in zip(longest, part.shape[1:]) for extra in (length - own, 0)][::-1]
        padded.append(F.pad(part, missing) if any(missing) else part)
    return torch.cat(padded)


def similarities(similarity: Similarity, images: Embeds, texts: Embeds) -> Tensor:
    """Returns the similarity of every image and text, float32 [image, text], computed in blocks of bounded memory."""
    vectors = _num_vectors(images) * _num_vectors(texts)
    num_images, num_texts = num_samples(images), num_samples(texts)
    text_step = max(1, min(num_texts, _CHUNK // vectors))
    image_step = max(1, min(num_images, _CHUNK // (vectors * text_step)))
    rows = [
        torch.cat(
            [
                similarity(take(images, slice(i, i + image_step)), take(texts, slice(j, j + text_step))).float()
                for j in range(0, num_texts, text_step)
            ],
            dim=1,
        )
        for i in range(0, num_images, image_step)
    ]
    return torch.cat(rows)


def _num_vectors(embeds: Embeds) -> int:
    """Returns the number of vectors per sample, such as its tokens; 1 for a tensor [sample, dim]."""
    return max(1, *(tensor.shape[1:-1].numel() for tensor in fields(embeds).values()), 1)
