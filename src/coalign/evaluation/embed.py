"""Embeddings of a whole dataset, by any pair of encode callables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from coalign.data.text.context import cut_texts
from coalign.embeds import concatenate, fields, take, to_cpu
from coalign.errors import UserError
from coalign.progress import progress
from coalign.types import DualEncoder, Embeds, JointEncoder


@dataclass
class ImageEmbeds:
    """Embeddings of the readable images, and the list of unreadable ones."""

    embeds: Any  # `Embeds` in float32 on the CPU; vectors [image, dim] compared by their cosine are normalized
    indices: list[int]  # sample index of each row
    bad: list[Any] = field(default_factory=list)  # the loader's entry for each unreadable image


@dataclass
class Evaluation:
    """A task's result with the embeddings it was computed from."""

    result: Any  # RetrievalResult, ZeroShotResult, …
    images: ImageEmbeds
    texts: list[str]  # captions, or class names
    text_embeds: Embeds | None = None  # as those of images; None if the task does not use them


# the output of `image_batches`: indices, pixels, bad entries
Batches = Iterable[tuple[Sequence[int], Tensor, Sequence[Any]]]
# this rank's embeddings -> the embeddings of each rank
AllGather = Callable[[ImageEmbeds], Sequence[ImageEmbeds]]


def embed_images(
    model: DualEncoder, batches: Batches, all_gather: AllGather | None = None, total: int | None = None
) -> ImageEmbeds:
    """Returns the embeddings of the batches (indices, uint8 pixels [batch, 3, size, size], bad entries) of `image_batches`.

    With several processes, each passes its own batches, and all receive all embeddings through `all_gather`. total: the number of images,
    for the progress display; None: there is none.
    """
    return _encode_images(
        lambda pixels: _embed(model, model.encode_image(pixels), len(pixels), "image"), batches, all_gather, total
    )


def image_features(
    model: DualEncoder, batches: Batches, all_gather: AllGather | None = None, total: int | None = None
) -> ImageEmbeds:
    """Returns the image encoder's output before its projection, not normalized, float32 [image, width]; otherwise as `embed_images`.

    Raises UserError if the model does not expose it.
    """
    if model.image_features is None:
        raise UserError(f"{model.name} does not expose image features, which probes need.")
    encode, name = model.image_features, f"{model.name}: image"
    return _encode_images(lambda pixels: _vectors(encode(pixels), len(pixels), name), batches, all_gather, total)


@torch.no_grad()
def _encode_images(
    encode: Callable[[Tensor], Any], batches: Batches, all_gather: AllGather | None, total: int | None
) -> ImageEmbeds:
    parts: list[Any] = []
    indices: list[int] = []
    bad: list[Any] = []
    with nullcontext() if total is None else progress("Embedding images", total) as task:
        for batch_indices, pixels, batch_bad in batches:
            bad.extend(batch_bad)
            if len(batch_indices):
                parts.append(encode(pixels))
                indices.extend(batch_indices)
            if task is not None:
                task.update(len(indices) + len(bad))
    images = ImageEmbeds(concatenate(parts) if parts else torch.empty(0, 0), indices, bad)
    if all_gather is not None:
        images = _merge(all_gather(images))
    if not images.indices:
        raise no_readable_image(len(images.bad))
    return images


def no_readable_image(num_bad: int) -> UserError:
    return UserError(f"There is nothing to evaluate: the data has no readable image ({num_bad} bad).")


def _merge(parts: Sequence[ImageEmbeds]) -> ImageEmbeds:
    """Returns the embeddings of all ranks, sorted by index."""
    indices = [index for part in parts for index in part.indices]
    order = sorted(range(len(indices)), key=indices.__getitem__)
    non_empty = [part.embeds for part in parts if part.indices]
    embeds = take(concatenate(non_empty), order) if non_empty else torch.empty(0, 0)
    return ImageEmbeds(embeds, [indices[row] for row in order], [entry for part in parts for entry in part.bad])


@torch.no_grad()
def embed_texts(model: DualEncoder, texts: Sequence[str], batch_size: int = 256) -> Any:
    """Returns the embeddings of texts, as those of images. Equal texts are encoded once and get equal rows."""
    if not texts:
        raise UserError("There is nothing to evaluate: the data has no captions.")
    distinct = sorted(set(texts), key=lambda text: (len(text), text))  # by length, so batches need little padding
    parts = []
    with progress("Embedding texts", len(distinct)) as task:
        for start in range(0, len(distinct), batch_size):
            batch = distinct[start : start + batch_size]
            parts.append(_embed(model, model.encode_text(batch), len(batch), "text"))
            task.update(start + len(batch))
    row = {text: i for i, text in enumerate(distinct)}
    return take(concatenate(parts), [row[text] for text in texts])


def cut_lines(model: DualEncoder, texts: Sequence[str], what: str = "texts") -> list[str]:
    """Returns a sentence if texts are longer than the model's context, as far as that is known."""
    if model.num_tokens is None or model.context_length is None:
        return []
    line = cut_texts(texts, model.num_tokens, model.context_length).line(what)
    return [] if line is None else [line]


@torch.no_grad()
def embed_joint(
    model: DualEncoder, encode_joint: JointEncoder, pixels: Tensor, texts: Sequence[str], batch_size: int = 256
) -> Any:
    """Returns the embeddings of images with one text each, as those of images alone."""
    parts = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        parts.append(_embed(model, encode_joint(pixels[start : start + batch_size], batch), len(batch), "joint"))
    return concatenate(parts)


def _embed(model: DualEncoder, embeds: Any, num_inputs: int, kind: str) -> Any:
    """Returns an encoder's output as float32 on the CPU, after checking it; vectors that are compared by their cosine are normalized."""
    name = f"{model.name}: {kind}"
    if model.compares_cosines:
        return F.normalize(_vectors(embeds, num_inputs, name))
    lengths = {field: len(tensor) for field, tensor in fields(embeds).items()}
    if set(lengths.values()) != {num_inputs}:
        raise ValueError(f"{name} encoder returned {lengths} samples for {num_inputs} inputs")
    embeds = to_cpu(embeds)
    require_finite(embeds, name)
    return embeds


def _vectors(embeds: Any, num_inputs: int, name: str) -> Tensor:
    """Returns float32 [batch, dim] on the CPU, after checking shape and values."""
    if not isinstance(embeds, Tensor) or embeds.ndim != 2 or len(embeds) != num_inputs:
        shape = tuple(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise ValueError(f"{name} encoder returned shape {shape} for {num_inputs} inputs; expected [batch, dim]")
    embeds = to_cpu(embeds)
    require_finite(embeds, name)
    return embeds


def require_finite(embeds: Embeds, name: str) -> None:
    """Raises UserError if a floating-point field contains NaN or infinity."""
    for tensor in fields(embeds).values():
        num_bad = int((~torch.isfinite(tensor).flatten(1).all(dim=1)).sum()) if tensor.is_floating_point() else 0
        if num_bad:
            raise UserError(
                f"{name} embeddings are not finite for {num_bad} of {len(tensor)} inputs; "
                "the weights are corrupt or the precision is too low."
            )
