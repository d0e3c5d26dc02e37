"""Wrappers of a DualEncoder: an embedding cache on disk, bfloat16 autocast, and texts sharded over processes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coalign.embeds import concatenate, fields, map_fields, take, to_cpu
from coalign.errors import UserError
from coalign.evaluation.embed import cut_lines
from coalign.files import save_tensors, write_atomically
from coalign.types import DualEncoder, Embeds

MIN_COSINE = 0.999  # between an embedding in bfloat16 and in float32


def cached(model: DualEncoder, folder: Path, precision: str = "fp32") -> DualEncoder:
    """Wraps the model to cache every batch of embeddings in `folder`, keyed by the content of model and input.

    An evaluation that is repeated or resumed encodes nothing twice. Raises UserError if the model does not expose its weights, or the
    folder cannot be created.
    """
    if model.weights is None:
        raise UserError(f"{model.name} does not expose its weights, so its embeddings cannot be cached.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache folder {folder} cannot be created: {error.strerror}.") from error
    samples = embed_samples(model)
    digest = f"{precision} {weights_checksum({**model.weights(), **_fingerprint(samples)})}"

    def with_cache(kind: str, encode: Callable[[Any], Any], content: Callable[[Any], Iterable[bytes]]) -> Any:
        sample = samples.get(kind, torch.empty(0))  # all embeds of this kind have its type; features are tensors

        def encode_or_load(inputs: Any) -> Any:
            key = hashlib.blake2b(f"{kind} {digest}".encode(), digest_size=20)
            for part in content(inputs):
                key.update(part)
            path = folder / f"{key.hexdigest()}.safetensors"
            try:
                stored = load_file(path)
                if isinstance(sample, Tensor):
                    return stored["embeds"]
                return type(sample)(**stored)
            except (OSError, SafetensorError, KeyError, TypeError):  # absent or truncated
                embeds = map_fields(encode(inputs), lambda tensor: tensor.detach().cpu().contiguous().clone())
                _save(embeds, path)
                return embeds

        return encode_or_load

    return replace(
        model,
        encode_image=with_cache("image", model.encode_image, _pixel_bytes),
        encode_text=with_cache("text", model.encode_text, _text_bytes),
        image_features=model.image_features and with_cache("features", model.image_features, _pixel_bytes),
    )


_TEXTS = ("a photo of a dog", "Two RED apples, on a table!", "of " * 200)


@torch.no_grad()
def embed_samples(model: DualEncoder) -> dict[str, Any]:
    """Returns the model's embeddings of some fixed images and texts."""
    side = model.image_size
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return {"image": to_cpu(model.encode_image(pixels)), "text": to_cpu(model.encode_text(list(_TEXTS)))}


def _fingerprint(samples: Mapping[str, Embeds]) -> dict[str, Tensor]:
    """Returns rounded embeddings. They distinguish models with equal weights but another activation, head, normalization or tokenizer."""
    return {
        f"sampled {kind}s {name}": F.normalize(value, dim=-1).mul(1000).round() if value.is_floating_point() else value
        for kind, embeds in samples.items()
        for name, value in fields(embeds).items()
    }


def _pixel_bytes(pixels: Tensor) -> list[bytes]:
    return [str(tuple(pixels.shape)).encode(), pixels.cpu().contiguous().numpy().tobytes()]


def _text_bytes(texts: Sequence[str]) -> list[bytes]:
    return [f"{len(encoded)} ".encode() + encoded for text in texts for encoded in [text.encode()]]


def weights_checksum(weights: Mapping[str, Tensor]) -> str:
    """Returns a hash of weights by name."""
    digest = hashlib.blake2b(digest_size=20)
    for name, value in sorted(weights.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _save(embeds: Embeds, path: Path) -> None:
    try:
        write_atomically(path, lambda temporary: save_tensors(temporary, fields(embeds)))
    except (OSError, SafetensorError) as error:
        raise UserError(f"The embeddings could not be cached in {path.parent}: {error}") from error


def in_bfloat16(model: DualEncoder, device: str) -> DualEncoder:
    """Wraps the model in bfloat16 autocast.

    The first batch of each kind is also encoded in float32: raises UserError if the two differ by more than rounding.
    """

    def autocast(inputs_name: str, encode: Callable[[Any], Any]) -> Any:
        checked = False

        def encode_in_bfloat16(inputs: Any) -> Any:
            nonlocal checked
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                embeds = map_fields(encode(inputs), _to_float32)
            if not checked:
                cosine = _min_cosine(embeds, encode(inputs))
                if not cosine >= MIN_COSINE:
                    raise UserError(
                        f"{model.name} cannot be evaluated in bfloat16: the cosine between its {inputs_name} embeddings in bfloat16 and "
                        f"float32 is {cosine:.4f}; use --precision fp32."
                    )
                checked = True
            return embeds

        return encode_in_bfloat16

    return replace(
        model,
        encode_image=autocast("image", model.encode_image),
        encode_text=autocast("text", model.encode_text),
        image_features=model.image_features and autocast("image", model.image_features),
    )


def _to_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def _min_cosine(embeds: Embeds, reference: Embeds) -> float:
    """Returns the least cosine between two embeddings of the same inputs, along the last axis of each field; equal vectors have 1.

    Fields that are not floating-point, such as masks, must be equal: otherwise it is 0.
    """
    cosines = []
    for ours, theirs in zip(fields(embeds).values(), fields(reference).values()):
        if not ours.is_floating_point():
            cosines.append(torch.tensor(float(torch.equal(ours, theirs))))
            continue
        theirs = theirs.float()
        cosine = F.cosine_similarity(ours, theirs, dim=-1)
        cosines.append(cosine.masked_fill((ours == theirs).all(-1), 1).min().cpu())  # padding is zero in both
    return float(torch.stack(cosines).min())


class TextCounter:
    """Collects the distinct texts that a model encodes, to report how many are longer than its context."""

    def __init__(self) -> None:
        self.texts: dict[str, None] = {}
        self.model: DualEncoder | None = None

    def counting(self, model: DualEncoder) -> DualEncoder:
        """Wraps the model to collect the texts."""
        self.model = model

        def encode_text(texts: Sequence[str]) -> Any:
            self.texts.update(dict.fromkeys(texts))
            return model.encode_text(texts)

        return replace(model, encode_text=encode_text)

    def take_lines(self) -> list[str]:
        """Returns a sentence if texts were cut since the last call."""
        texts, self.texts = list(self.texts), {}
        return [] if self.model is None else cut_lines(self.model, texts)


def shard_texts(
    model: DualEncoder, rank: int, world_size: int, all_gather: Callable[[Any], Sequence[Any]]
) -> DualEncoder:
    """Wraps the model to encode each call's texts in shards over the processes, which all pass the same texts.

    `all_gather` returns the embeds of all ranks.
    """

    def encode_text(texts: Sequence[str]) -> Any:
        if len(texts) < world_size:
            return model.encode_text(texts)
        parts = all_gather(to_cpu(model.encode_text(texts[rank::world_size])))
        order = [i for start in range(world_size) for i in range(start, len(texts), world_size)]
        return take(concatenate(parts), torch.tensor(order).argsort())

    return replace(model, encode_text=encode_text)
