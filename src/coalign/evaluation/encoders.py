"""Ways for a model to encode: with what it gave before kept on disk, in bfloat16, or together with other processes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from coalign.errors import UserError
from coalign.types import DualEncoder

LEAST_COSINE = 0.999  # between an embedding in bfloat16 and in float32


def cached(model: DualEncoder, folder: Path, precision: str = "fp32") -> DualEncoder:
    """The model with every batch of embeddings kept in `folder`, by the content of model and input: an evaluation that is called again or
    goes on after a stop, encodes nothing twice. UserError for a model that does not show its weights, and for a folder that cannot be."""
    if model.weights is None:
        raise UserError(f"{model.name} does not show its weights, so that its embeddings cannot be kept.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"The cache {folder} cannot be made: {error.strerror}.") from error
    digest = f"{precision} {_digest({**model.weights(), **_sample(model)})}"

    def keep(kind: str, encode: Callable[[Any], Tensor], content: Callable[[Any], Iterable[bytes]]) -> Any:
        def encode_or_load(inputs: Any) -> Tensor:
            key = hashlib.blake2b(f"{kind} {digest}".encode(), digest_size=20)
            for part in content(inputs):
                key.update(part)
            path = folder / f"{key.hexdigest()}.safetensors"
            try:
                return load_file(path)["embeds"]
            except (OSError, SafetensorError, KeyError):  # not there yet, or cut off
                embeds = encode(inputs).detach().cpu().contiguous()
                _save(embeds, path)
                return embeds

        return encode_or_load

    return replace(
        model,
        encode_image=keep("image", model.encode_image, _of_pixels),
        encode_text=keep("text", model.encode_text, _of_texts),
        image_features=model.image_features and keep("features", model.image_features, _of_pixels),
    )


_TEXTS = ("a photo of a dog", "Two RED apples, on a table!", "of " * 200)


@torch.no_grad()
def _sample(model: DualEncoder) -> dict[str, Tensor]:
    """What the model makes of some inputs, rounded: it tells apart models of the same weights that differ otherwise, in the activation, the
    heads, the normalisation or the tokenizer."""
    side = model.image_size
    pixels = torch.randint(256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    embeds = {"sampled images": model.encode_image(pixels), "sampled texts": model.encode_text(list(_TEXTS))}
    return {name: F.normalize(value.float().cpu(), dim=-1).mul(1000).round() for name, value in embeds.items()}


def _of_pixels(pixels: Tensor) -> list[bytes]:
    return [str(tuple(pixels.shape)).encode(), pixels.cpu().contiguous().numpy().tobytes()]


def _of_texts(texts: Sequence[str]) -> list[bytes]:
    return [f"{len(encoded)} ".encode() + encoded for text in texts for encoded in [text.encode()]]


def _digest(weights: Mapping[str, Tensor]) -> str:
    found = hashlib.blake2b(digest_size=20)
    for name, value in sorted(weights.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _save(embeds: Tensor, path: Path) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        save_file({"embeds": embeds}, temporary)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"The embeddings could not be kept in {path.parent}: {error}") from error


def in_bfloat16(model: DualEncoder, device: str) -> DualEncoder:
    """The model under bfloat16 autocast. Its first batch of each kind is encoded in float32 as well: UserError if the two differ by more
    than rounding."""

    def lower(what: str, encode: Callable[[Any], Tensor]) -> Any:
        checked = False

        def encode_lower(inputs: Any) -> Tensor:
            nonlocal checked
            with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
                embeds = encode(inputs).float()
            if not checked:
                cosine = float(F.cosine_similarity(embeds, encode(inputs).float()).min())
                if not cosine >= LEAST_COSINE:
                    raise UserError(
                        f"{model.name} cannot be evaluated in bfloat16: its embeddings of {what} have a cosine of {cosine:.4f} to those in "
                        "float32; use --precision fp32."
                    )
                checked = True
            return embeds

        return encode_lower

    return replace(
        model,
        encode_image=lower("images", model.encode_image),
        encode_text=lower("texts", model.encode_text),
        image_features=model.image_features and lower("images", model.image_features),
    )


def shared_texts(model: DualEncoder, rank: int, size: int, exchange: Callable[[Tensor], list[Tensor]]) -> DualEncoder:
    """The model with the texts of a call shared among `size` processes, which all call it with the same ones. `exchange` gives the tensors
    of all processes."""

    def encode_text(texts: Sequence[str]) -> Tensor:
        if len(texts) < size:
            return model.encode_text(texts)
        parts = exchange(model.encode_text(texts[rank::size]).float().cpu())
        embeds = torch.empty(len(texts), parts[0].shape[1])
        for number, part in enumerate(parts):
            embeds[number::size] = part
        return embeds

    return replace(model, encode_text=encode_text)
