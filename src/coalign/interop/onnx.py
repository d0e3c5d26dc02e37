"""Models as ONNX graphs, which onnxruntime runs without PyTorch (extra "onnx"): image.onnx, text.onnx and, for one tower, joint.onnx."""

from __future__ import annotations

import copy
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.errors import UserError
from coalign.networks.towers import ImageTower, TextFeatures, TextTower
from coalign.networks.transformer import is_plain
from coalign.networks.unified import UnifiedTower
from coalign.types import DualEncoder

INFO = "onnx_model.json"  # what a client must know: image size, context length, special tokens, logit scale
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
    """Writes a graph for each of `encode`: name -> function of the (dense copy of the) method that gives its encode function of pixels, of
    token ids and lengths, or of all three. `inputs`: an example of each graph's inputs, uint8 pixels [batch, 3, side, side] and int64 ids
    [batch, token]. A graph takes any batch and up to `context_length` tokens; a text ends at its first end token.
    """
    try:
        import onnxscript  # noqa: F401  the exporter's own
    except ImportError:
        raise UserError(_MISSING) from None
    dense = densely(method)
    for name, choose in encode.items():
        graph = _Graph(dense, choose(dense), end_id).eval()
        example = inputs[name]
        names = ["pixels" if value.dtype == torch.uint8 else "input_ids" for value in example]
        batch, token = torch.export.Dim("batch", min=1), torch.export.Dim("token", min=4, max=context_length)
        shapes = tuple({0: batch} if value.dtype == torch.uint8 else {0: batch, 1: token} for value in example)
        with warnings.catch_warnings(), _Quiet("torch.onnx", "onnxscript", "torch.export"):
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


class _Quiet:
    """Keeps libraries from logging their progress."""

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
    """Inputs -> normalised embeds [batch, dim]."""

    def __init__(self, method: nn.Module, encode: Callable[..., Tensor], end_id: int) -> None:
        super().__init__()
        self.method, self.encode, self.end_id = method, encode, end_id

    def forward(self, *inputs: Tensor) -> Tensor:
        given: list[Tensor] = []
        for value in inputs:
            given.append(value)
            if value.dtype == torch.int64:
                given.append((value == self.end_id).int().argmax(1) + 1)
        return F.normalize(self.encode(*given).float(), dim=-1)


# ---------------------------------------------------------------- dense forwards


def densely(method: nn.Module) -> Any:
    """A copy whose towers compute padded sequences and mask the padding: a graph cannot pack them."""
    dense = copy.deepcopy(method).cpu().float().eval()
    forwards: dict[type, Callable[..., Any]] = {ImageTower: _image, TextTower: _text, UnifiedTower: _unified}
    for module in dense.modules():
        if type(module) in forwards:
            module.forward = partial(forwards[type(module)], module)
    return dense


def _image(tower: ImageTower, pixels: Tensor) -> Tensor:
    x = (pixels.to(tower.mean.dtype) - tower.mean) / tower.std
    trunk = tower.trunk
    if not isinstance(trunk, VisionTransformer) or not is_plain(trunk.transformer):
        return trunk(x)
    return trunk._pool(_blocks(trunk.transformer.resblocks, trunk._embeds(x), None))[0]


def _text(tower: TextTower, ids: Tensor, lengths: Tensor, with_tokens: bool = False) -> TextFeatures:
    transformer, place = tower.transformer, torch.arange(ids.shape[1], device=ids.device)
    x = transformer.token_embedding(ids) + transformer.positional_embedding[: ids.shape[1]]
    valid = place < lengths[:, None]  # [batch, token]
    mask = (place <= place[:, None])[None, None] if tower.attention == "causal" else valid[:, None, None]
    x = transformer.ln_final(_blocks(transformer.transformer.resblocks, x, mask)) * valid[..., None]
    if tower.pooling == "mean":
        pooled = x.sum(1) / lengths[:, None].to(x.dtype)
    elif tower.pooling == "start":
        pooled = x[:, 0]
    else:
        pooled = (x * (place == lengths[:, None] - 1)[..., None]).sum(1)
    return TextFeatures(pooled, x if with_tokens else None)


def _unified(tower: UnifiedTower, tokens: Any) -> Any:
    return tower.given(tokens, tokens)  # F(X|X) is F(X)


def _blocks(blocks: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    """x [batch, token, width]; `mask` bool, true where a key is seen, of any shape that fits [batch, heads, query, key]."""
    for block in blocks:
        attention = block.attn
        q, k, v = F.linear(block.ln_1(x), attention.in_proj_weight, attention.in_proj_bias).chunk(3, dim=-1)
        q, k, v = (z.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for z in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        x = x + block.ls_1(attention.out_proj(mixed))
        x = x + block.ls_2(block.mlp(block.ln_2(x)))
    return x


# ---------------------------------------------------------------- as evaluation takes them


def from_onnx(folder: Path, tokenize: Callable[[Sequence[str], int], tuple[Tensor, Tensor]]) -> DualEncoder:
    """An exported folder, run by onnxruntime on the CPU; `tokenize` gives padded ids of texts."""
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
        raise UserError(f"{folder / INFO} is not what an export to ONNX writes: {error}.") from error


def session(path: Path) -> Callable[..., np.ndarray]:
    """The graph of a file as a function of its named inputs. UserError for what is none."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(_MISSING) from None
    try:
        run = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run
    except Exception as error:  # onnxruntime's own kinds
        raise UserError(f"onnxruntime cannot load {path}: {str(error).splitlines()[0]}") from error

    def embed(**inputs: np.ndarray) -> np.ndarray:
        try:
            return run(["embeds"], inputs)[0]
        except Exception as error:
            raise UserError(f"onnxruntime cannot run {path}: {str(error).splitlines()[0]}") from error

    return embed
