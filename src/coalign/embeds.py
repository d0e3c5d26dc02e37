"""Operations on embeddings, which are a tensor, or a NamedTuple of tensors, with the sample as their first axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from coalign.types import Embeds, Similarity, dot_product

_CHUNK = 8_000_000  # comparisons of two vectors in memory at a time
_PAIRS = 16  # pairs compared at a time, of which only the diagonal is used


def map_fields(embeds: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Applies a function to the tensor, or to each tensor of a NamedTuple."""
    return function(embeds) if isinstance(embeds, Tensor) else type(embeds)(*map(function, embeds))


def fields(embeds: Embeds) -> dict[str, Tensor]:
    """Returns the tensors by name; a tensor that is no field of a NamedTuple is named "embeds"."""
    return {"embeds": embeds} if isinstance(embeds, Tensor) else embeds._asdict()  # type: ignore[attr-defined]


def to_cpu(embeds: Any) -> Any:
    """Returns detached embeds on the CPU, floating-point fields as float32."""

    def convert(tensor: Tensor) -> Tensor:
        tensor = tensor.detach()
        return (tensor.float() if tensor.is_floating_point() else tensor).cpu()

    return map_fields(embeds, convert)


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
    """Returns the similarity of every image and text, float32 [image, text], computed in blocks of bounded memory.

    With gradients, it is one call: the similarity itself must bound the memory of what it keeps for backward.
    """
    num_images, num_texts = num_samples(images), num_samples(texts)
    pairs = max(1, _CHUNK // (_num_vectors(images) * _num_vectors(texts)))
    tensors = (*fields(images).values(), *fields(texts).values())
    has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    if num_images * num_texts <= pairs or has_gradient:
        return similarity(images, texts).float()
    # nearly square blocks, so that neither side is passed more often than needed
    image_step = min(num_images, isqrt(pairs))
    text_step = min(num_texts, pairs // image_step)
    image_step = min(num_images, pairs // text_step)
    # written in place: results kept block by block would fragment the heap, to many times its size
    scores = torch.empty(num_images, num_texts, device=tensors[0].device)
    for i in range(0, num_images, image_step):
        for j in range(0, num_texts, text_step):
            rows, columns = slice(i, i + image_step), slice(j, j + text_step)
            scores[rows, columns] = similarity(take(images, rows), take(texts, columns))
    return scores


def pair_similarities(
    similarity: Similarity, images: Embeds, texts: Embeds, image_rows: Sequence[int], text_rows: Sequence[int]
) -> Tensor:
    """Returns the similarity of each pair of an image row and a text row, float32 [pair]."""
    pairs = [
        (list(image_rows[i : i + _PAIRS]), list(text_rows[i : i + _PAIRS])) for i in range(0, len(text_rows), _PAIRS)
    ]
    blocks = [similarity(take(images, image), take(texts, text)).diagonal().float() for image, text in pairs]
    return torch.cat(blocks)


def transposed(similarity: Similarity) -> Similarity:
    """Returns the similarity with texts first: (texts, images) -> [text, image]. A dot product is symmetric."""
    if similarity is dot_product:
        return similarity
    return lambda texts, images: similarity(images, texts).T


def pooled(embeds: Embeds) -> Tensor:
    """Returns one normalized vector per sample, float32 [sample, dim]: the mean of its vectors, which are those of valid tokens.

    It stands for the sample in a search that must be fast, before the similarity itself compares what that found. Raises ValueError if
    the vectors have different dimensions.
    """
    if isinstance(embeds, Tensor):
        return F.normalize(embeds.float(), dim=-1)
    tensors = fields(embeds).values()
    masks = [tensor for tensor in tensors if tensor.dtype == torch.bool]
    vectors = [tensor.float() for tensor in tensors if tensor.is_floating_point()]
    if len({tensor.shape[-1] for tensor in vectors}) != 1:
        raise ValueError(f"The vectors of a sample have the dimensions {[tensor.shape[-1] for tensor in vectors]}.")
    means = []
    for tensor in vectors:
        for mask in masks:
            if mask.shape == tensor.shape[:-1]:
                tensor = tensor * mask[..., None]
        means.append(tensor.flatten(1, -2).sum(1) if tensor.ndim > 2 else tensor)
    return F.normalize(torch.stack([F.normalize(mean, dim=-1) for mean in means]).mean(0), dim=-1)


def on_device(similarity: Similarity, device: torch.device) -> Similarity:
    """Wraps a similarity to compute on `device`, where its weights are, and to return the result on the device of the embeds.

    Computes no gradients unless the embeds require them. A dot product has no weights and is returned as it is.
    """
    if similarity is dot_product:
        return similarity

    def compare(images: Embeds, texts: Embeds) -> Tensor:
        tensors = (*fields(images).values(), *fields(texts).values())
        trained = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        with torch.set_grad_enabled(trained):
            scores = similarity(*(map_fields(embeds, lambda tensor: tensor.to(device)) for embeds in (images, texts)))
        return scores.to(tensors[0].device)

    return compare


def _num_vectors(embeds: Embeds) -> int:
    """Returns the number of vectors per sample, such as its tokens; 1 for a tensor [sample, dim]."""
    return max(1, *(tensor.shape[1:-1].numel() for tensor in fields(embeds).values()), 1)
