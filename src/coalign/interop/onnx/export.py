"""ONNX graphs, which onnxruntime runs without PyTorch (extra "onnx"): image.onnx, text.onnx and, for OneR, joint.onnx.

A method that does not compare cosines also has similarity.onnx.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from coalign.data.text.tokenizer import Tokenizer
from coalign.embeds import fields, map_fields
from coalign.errors import UserError
from coalign.interop.onnx.load import COSINE, MISSING
from coalign.interop.tokenizer_export import exported_tokenizer
from coalign.networks.towers.spec import find_towers
from coalign.types import Embeds, dot_product

OPSET = 18


def to_onnx(
    method: Any,
    encode: dict[str, Callable[[Any], Callable[..., Any]]],
    inputs: dict[str, tuple[Tensor, ...]],
    end_id: int,
    context_length: int,
    folder: Path,
    on_graph: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes one graph per entry of `encode` to `folder`, and similarity.onnx if the method does not compare cosines.

    Returns the entries of INFO that describe them: the names of their outputs, and the similarity.

    encode: graph name -> function from a dense copy of the method to its encode function of pixels, of token ids and lengths, or of all
    three. inputs: graph name -> example inputs, uint8 pixels [batch, 3, side, side] and int64 ids [batch, token]. A graph accepts any batch
    size and up to `context_length` tokens; a text ends at its first end token. similarity.onnx takes the outputs of image.onnx and
    text.onnx, with the prefixes image_ and text_. on_graph: called with the file name of each graph before it is traced.
    """
    try:
        import onnxscript  # noqa: F401  needed by torch.onnx
    except ImportError:
        raise UserError(MISSING) from None
    dense = make_dense(method)
    cosines = method.similarity is dot_product
    graphs = {name: _Graph(dense, get_encode(dense), end_id, cosines).eval() for name, get_encode in encode.items()}
    outputs = {}
    for name, graph in graphs.items():
        on_graph(f"{name}.onnx")
        example = inputs[name]
        names = ["pixels" if value.dtype == torch.uint8 else "input_ids" for value in example]
        outputs[name] = list(fields(graph.embed(*example)))
        batch, token = torch.export.Dim("batch", min=1), torch.export.Dim("token", min=4, max=context_length)
        shapes = tuple({0: batch} if value.dtype == torch.uint8 else {0: batch, 1: token} for value in example)
        _write(graph, example, names, outputs[name], shapes, folder / f"{name}.onnx")
    if not cosines:
        on_graph("similarity.onnx")
        _write_similarity(dense, graphs, inputs, folder / "similarity.onnx")
    return {"outputs": outputs, "similarity": COSINE if cosines else "similarity.onnx"}


def write_tokenizer(tokenizer: Tokenizer, context_length: int, path: Path) -> dict[str, int]:
    """Writes the tokenizer as a file of the `tokenizers` library, with its cleaning, start and end tokens, truncation and padding.

    Returns the entries of INFO that describe it. Whatever follows the first end token has no effect.
    """
    backend = exported_tokenizer(tokenizer)
    names = {token_id: token for token, token_id in backend.get_vocab().items() if token_id in tokenizer.special_ids}
    pad_id = next((token_id for token_id, name in names.items() if "pad" in name.lower()), tokenizer.end_id)
    backend.enable_truncation(context_length)
    backend.enable_padding(pad_id=pad_id, pad_token=names[pad_id])
    backend.save(str(path))
    return {
        "context_length": context_length,
        "start_id": tokenizer.start_id,
        "end_id": tokenizer.end_id,
        "pad_id": pad_id,
    }


def _write(
    graph: nn.Module,
    example: tuple[Tensor, ...],
    input_names: Sequence[str],
    output_names: Sequence[str],
    shapes: tuple[dict[int, Any], ...],
    path: Path,
) -> None:
    """Writes the graph of a module. shapes: the dynamic axes of each input."""
    with warnings.catch_warnings(), _ErrorsOnly("torch.onnx", "onnxscript", "torch.export"):
        warnings.simplefilter("ignore")
        torch.onnx.export(
            graph,
            example,
            str(path),
            input_names=list(input_names),
            output_names=list(output_names),
            dynamic_shapes=(shapes,),
            opset_version=OPSET,
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    _strip(path)


def _strip(path: Path) -> None:
    """Removes what the exporter notes of each node: stack traces, with the paths of this machine."""
    import onnx

    model = onnx.load(str(path))
    for part in (model, model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    onnx.save(model, str(path))


def _write_similarity(
    method: Any, graphs: Mapping[str, _Graph], inputs: Mapping[str, tuple[Tensor, ...]], path: Path
) -> None:
    """Writes the graph of a method's similarity. Axes of embeds that change with the numbers of samples and tokens are dynamic."""
    examples: list[Embeds] = []
    names: list[str] = []
    shapes: list[dict[int, Any]] = []
    for kind, count, other_count in (("image", 3, 2), ("text", 2, 3)):  # the two counts are not the same axis
        (value,) = inputs[kind]
        other_value = value[:other_count, :-1] if value.dtype == torch.int64 else value[:other_count]
        embeds, other = graphs[kind].embed(value[:count]), graphs[kind].embed(other_value)
        examples.append(embeds)
        for (name, tensor), other_tensor in zip(fields(embeds).items(), fields(other).values()):
            names.append(f"{kind}_{name}")
            lengths = enumerate(zip(tensor.shape, other_tensor.shape))
            shapes.append({axis: torch.export.Dim.DYNAMIC for axis, (one, another) in lengths if one != another})
    if list(fields(examples[0])) == list(
        fields(examples[1])
    ):  # of one form, so any two may be compared, such as two images
        half = len(shapes) // 2
        shapes = [{**one, **another} for one, another in zip(shapes[:half], shapes[half:])] * 2
    example = tuple(tensor for embeds in examples for tensor in fields(embeds).values())
    _write(_Comparison(method, *examples).eval(), example, names, ["similarity"], tuple(shapes), path)


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
    """Inputs -> the fields of their embeds; cosines take normalized [batch, dim]."""

    def __init__(self, method: nn.Module, encode: Callable[..., Any], end_id: int, cosines: bool) -> None:
        super().__init__()
        self.method, self.encode, self.end_id, self.cosines = method, encode, end_id, cosines

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(fields(self._embed(*inputs)).values())

    @torch.no_grad()
    def embed(self, *inputs: Tensor) -> Any:
        """Returns the embeds in the method's own form."""
        return self._embed(*inputs)

    def _embed(self, *inputs: Tensor) -> Any:
        arguments: list[Tensor] = []
        for value in inputs:
            arguments.append(value)
            if value.dtype == torch.int64:  # token ids come with their lengths
                arguments.append((value == self.end_id).int().argmax(1) + 1)
        embeds = self.encode(*arguments)
        if self.cosines:
            return F.normalize(embeds.float(), dim=-1)
        return map_fields(embeds, lambda tensor: tensor.float() if tensor.is_floating_point() else tensor)


class _Comparison(nn.Module):
    """The fields of images, then of texts -> similarity [image, text]. The examples determine the forms of the embeds."""

    def __init__(self, method: Any, images: Embeds, texts: Embeds) -> None:
        super().__init__()
        self.method, self.examples = method, (images, texts)

    def forward(self, *tensors: Tensor) -> Tensor:
        remaining = iter(tensors)
        images, texts = (map_fields(example, lambda _: next(remaining)) for example in self.examples)
        return self.method.similarity(images, texts).float()


def make_dense(method: nn.Module) -> Any:
    """Returns a copy whose towers run on padded sequences with a mask, as a graph cannot pack sequences."""
    dense = copy.deepcopy(method).cpu().float().eval()
    for tower in find_towers(dense):
        tower.forward = tower.dense_forward
    return dense
