"""Loads exported ONNX folders, which onnxruntime runs on the CPU (extra "onnx")."""

from __future__ import annotations

import copyreg
import json
from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from coalign.embeds import fields
from coalign.errors import UserError
from coalign.types import DualEncoder, Embeds, Preprocess, Similarity, dot_product

INFO = "onnx_model.json"  # image size and geometry, context length, special tokens, logit scale, outputs and similarity, for clients
TOKENIZER = "tokenizer.json"
COSINE = "cosine"  # in INFO, instead of the similarity's file name
MISSING = 'ONNX needs the extra "onnx": pip install "coalign[onnx]".'


def from_onnx(folder: Path) -> DualEncoder:
    """Loads an exported folder, which onnxruntime runs on the CPU. Raises UserError if the folder is not an ONNX export."""
    info = read_info(folder)
    tokenizer, uncut = (read_tokenizer(folder / TOKENIZER) for _ in range(2))
    uncut.no_truncation()
    image, text = (session(folder / f"{name}.onnx") for name in ("image", "text"))
    return DualEncoder(
        encode_image=lambda pixels: to_embeds(image(pixels=pixels.cpu().numpy())),
        encode_text=lambda texts: to_embeds(text(input_ids=token_ids(tokenizer, texts))),
        image_size=info["image_size"],
        preprocess=Preprocess(interpolation=info["interpolation"], resize_mode=info["resize_mode"]),
        name=str(folder),
        logit_scale=info["logit_scale"],
        weights=lambda: {
            name: torch.from_numpy(np.fromfile(folder / name, np.uint8)) for name in ("image.onnx", "text.onnx")
        },
        num_tokens=lambda text: len(uncut.encode(text).ids),
        context_length=info["context_length"],
        similarity=dot_product if info["similarity"] == COSINE else _similarity(folder / info["similarity"]),
    )


def read_tokenizer(path: Path) -> Tokenizer:
    """Reads the tokenizer of an ONNX export, which truncates and pads. Raises UserError if the file is none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises a plain Exception for all errors
        raise UserError(f"{path} is not a tokenizer file of an ONNX export: {error}.") from None
    if tokenizer.truncation is None or tokenizer.padding is None:
        raise UserError(
            f"{path} is of an export by an older version of coalign, without start and end tokens; export the run again."
        )
    tokenizer.encode_special_tokens = True  # encode special tokens in a text as ordinary text
    return tokenizer


def token_ids(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """Returns the token ids of texts, int64 [text, token]."""
    readable = [text.encode("utf-8", "replace").decode() for text in texts]  # without lone surrogates
    return np.array([encoding.ids for encoding in tokenizer.encode_batch(readable)], np.int64)


def _similarity(path: Path) -> Similarity:
    compare = session(path)

    def similarity(images: Embeds, texts: Embeds) -> Tensor:
        named = {
            f"{kind}_{name}": value
            for kind, embeds in (("image", images), ("text", texts))
            for name, value in fields(embeds).items()
        }
        return torch.from_numpy(compare(**{name: value.numpy() for name, value in named.items()})["similarity"])

    return similarity


def to_embeds(outputs: Mapping[str, np.ndarray]) -> Any:
    """Returns the outputs of a graph as a tensor, if "embeds" is the only one, else as a NamedTuple."""
    tensors = {name: torch.from_numpy(value) for name, value in outputs.items()}
    return tensors["embeds"] if list(tensors) == ["embeds"] else _embeds_class(*tensors)(**tensors)


@cache
def _embeds_class(*names: str) -> Any:
    embeds_class = namedtuple("Embeds", names)  # type: ignore[misc]
    copyreg.pickle(embeds_class, lambda embeds: (_restore, (names, tuple(embeds))))  # processes exchange embeds
    return embeds_class


def _restore(names: tuple[str, ...], values: tuple[Tensor, ...]) -> Any:
    return _embeds_class(*names)(*values)


def read_info(folder: Path) -> dict[str, Any]:
    try:
        info = json.loads((folder / INFO).read_text())
        return {
            "image_size": int(info["image_size"]),
            "interpolation": str(info.get("interpolation", "bicubic")),
            "resize_mode": str(info.get("resize_mode", "shortest")),
            "context_length": int(info["context_length"]),
            "logit_scale": float(info["logit_scale"]),
            "similarity": str(info.get("similarity", COSINE)),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INFO} is not a valid file of an ONNX export: {error}.") from error


def session(path: Path) -> Callable[..., dict[str, np.ndarray]]:
    """Returns the graph of a file as a function of its named inputs to its named outputs.

    Raises UserError if it cannot be loaded or run.
    """
    try:
        import onnxruntime
    except ImportError:
        raise UserError(MISSING) from None
    try:
        graph = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has its own exception types
        raise UserError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error

    names = [output.name for output in graph.get_outputs()]

    def run(**inputs: np.ndarray) -> dict[str, np.ndarray]:
        try:
            return dict(zip(names, graph.run(names, inputs)))
        except Exception as error:
            raise UserError(f"onnxruntime cannot run {path}: {str(error).splitlines()[0]}") from error

    return run
