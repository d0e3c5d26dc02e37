"""ONNX graphs, which onnxruntime runs without PyTorch (extra "onnx"): image.onnx, text.onnx and, for OneR, joint.onnx."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.towers.spec import find_towers
from coalign.types import DualEncoder

INFO = "onnx_model.json"  # image size, context length, special tokens and logit scale, for clients
OPSET = 18
_MISSING = 'ONNX needs the extra "onnx": pip install "coalign[onnx]".'


def to_onnx(
    method: nn.Module,
    encode: dict[str, Callable[[Any], Callable[..., Tensor]]],
    inputs: dict[str, tuple[Tensor, ...]],
    end_id: int,
    context_length: int,
    folder: Path,
) -> None:
    """Writes one graph per entry of `encode` to `folder`.

    encode: graph name -> function from a dense copy of the method to its encode function of pixels, of token ids and lengths, or of all
    three. inputs: graph name -> example inputs, uint8 pixels [batch, 3, side, side] and int64 ids [batch, token]. A graph accepts any batch
    size and up to `context_length` tokens; a text ends at its first end token.
    """
    try:
        import onnxscript  # noqa: F401  needed by torch.onnx
    except ImportError:
        raise UserError(_MISSING) from None
    dense = make_dense(method)
    for name, get_encode in encode.items():
        graph = _Graph(dense, get_encode(dense), end_id).eval()
        example = inputs[name]
        names = ["pixels" if value.dtype == torch.uint8 else "input_ids" for value in example]
        batch, token = torch.export.Dim("batch", min=1), torch.export.Dim("token", min=4, max=context_length)
        shapes = tuple({0: batch} if value.dtype == torch.uint8 else {0: batch, 1: token} for value in example)
        with warnings.catch_warnings(), _ErrorsOnly("torch.onnx", "onnxscript", "torch.export"):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                graph,
                example,
                str(folder / f"{name}.onnx"),
                input_names=names,
                output_names=["embeds"],
                dynamic_shapes=(shapes,),
                opset_version=OPSET,
                dynamo=True,
                external_data=False,
                verbose=False,
            )


class _ErrorsOnly:
    """Context in which the named loggers only log errors."""

    def __init__(self, *names: str) -> None:
        self.loggers = [logging.getLogger(name) for name in names]

    def __enter__(self) -> None:
        self.levels = [logger.level for logger in self.loggers]
        for logger in self.loggers:
            logger.setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        for logger, level in zip(self.loggers, self.levels):
            logger.setLevel(level)


class _Graph(nn.Module):
    """Inputs -> normalized embeds [batch, dim]."""

    def __init__(self, method: nn.Module, encode: Callable[..., Tensor], end_id: int) -> None:
        super().__init__()
        self.method, self.encode, self.end_id = method, encode, end_id

    def forward(self, *inputs: Tensor) -> Tensor:
        arguments: list[Tensor] = []
        for value in inputs:
            arguments.append(value)
            if value.dtype == torch.int64:  # token ids come with their lengths
                arguments.append((value == self.end_id).int().argmax(1) + 1)
        return F.normalize(self.encode(*arguments).float(), dim=-1)


def make_dense(method: nn.Module) -> Any:
    """Returns a copy whose towers run on padded sequences with a mask, as a graph cannot pack sequences."""
    dense = copy.deepcopy(method).cpu().float().eval()
    for tower in find_towers(dense):
        tower.forward = tower.dense_forward
    return dense


# ---------------------------------------------------------------- loading


def from_onnx(folder: Path, tokenize: Callable[[Sequence[str], int], tuple[Tensor, Tensor]]) -> DualEncoder:
    """Loads an exported folder, which onnxruntime runs on the CPU. `tokenize`: (texts, context length) -> padded ids, lengths.

    Raises UserError if the folder is not an ONNX export.
    """
    info = read_info(folder)
    image, text = (session(folder / f"{name}.onnx") for name in ("image", "text"))

    def encode_text(texts: Sequence[str]) -> Tensor:
        ids, _ = tokenize(texts, info["context_length"])
        return torch.from_numpy(text(input_ids=ids.numpy()))

    return DualEncoder(
        encode_image=lambda pixels: torch.from_numpy(image(pixels=pixels.cpu().numpy())),
        encode_text=encode_text,
        image_size=info["image_size"],
        name=str(folder),
        logit_scale=info["logit_scale"],
        weights=lambda: {
            name: torch.from_numpy(np.fromfile(folder / name, np.uint8)) for name in ("image.onnx", "text.onnx")
        },
    )


def read_info(folder: Path) -> dict[str, Any]:
    try:
        info = json.loads((folder / INFO).read_text())
        return {
            "image_size": int(info["image_size"]),
            "context_length": int(info["context_length"]),
            "logit_scale": float(info["logit_scale"]),
        }
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder / INFO} is not a valid file of an ONNX export: {error}.") from error


def session(path: Path) -> Callable[..., np.ndarray]:
    """Returns the graph of a file as a function of its named inputs. Raises UserError if it cannot be loaded or run."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_MISSING) from None
    try:
        run = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run
    except Exception as error:  # onnxruntime has its own exception types
        raise UserError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error

    def embed(**inputs: np.ndarray) -> np.ndarray:
        try:
            return run(["embeds"], inputs)[0]
        except Exception as error:
            raise UserError(f"onnxruntime cannot run {path}: {str(error).splitlines()[0]}") from error

    return embed
