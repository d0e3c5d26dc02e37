"""Smaller weights for exported graphs: int8 or float16, by onnxruntime's own tools."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from coalign.errors import UserError
from coalign.interop.onnx.load import MISSING

KINDS = ("int8", "fp16")


def quantize_graph(path: Path, kind: str) -> None:
    """Replaces the graph of a file by one with smaller weights. Inputs and outputs keep their types.

    fp16: all float32 values of the graph are float16. int8: weights are stored in 8 bits, with one scale per output channel. Matrix
    products and embedding tables are computed with them, and activations rounded to 8 bits; their weights use 7 of the bits, as processors
    without VNNI overflow with 8. Convolutions are computed in float32, as onnxruntime's 8-bit ones are several times slower; their weights
    are restored when the graph is loaded. Raises UserError if onnxruntime is not installed.
    """
    try:
        import onnx
        import onnxruntime  # noqa: F401  needed by both tools
    except ImportError:
        raise UserError(MISSING) from None
    if kind == "fp16":
        from onnxruntime.transformers.float16 import convert_float_to_float16

        onnx.save(convert_float_to_float16(onnx.load(str(path)), keep_io_types=True), str(path))
        return
    _quantize_products(path)
    model = onnx.load(str(path))
    _store_convolutions(model.graph)
    onnx.save(model, str(path))


def _quantize_products(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logger = logging.getLogger()  # the tool advises by warnings of the root logger
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        quantize_dynamic(
            onnx.load(path), path, op_types_to_quantize=["MatMul", "Gemm", "Gather"],
            per_channel=True, reduce_range=True, weight_type=QuantType.QInt8,
        )  # fmt: skip
    finally:
        logger.setLevel(level)


def _store_convolutions(graph: Any) -> None:
    """Stores the weights of convolutions in 8 bits, and restores them in the graph.

    By a cast and a product, which onnxruntime computes once, when it loads the graph. It would repeat DequantizeLinear at each call, and
    leave out what it only does for constant weights: its blocked layout of convolutions.
    """
    from onnx import TensorProto, helper, numpy_helper

    kernels = {node.input[1] for node in graph.node if node.op_type == "Conv"}
    for tensor in [each for each in graph.initializer if each.name in kernels]:
        values = numpy_helper.to_array(tensor)  # [channel, …]
        scales = np.abs(values).max(axis=tuple(range(1, values.ndim)), keepdims=True) / 127
        scales = np.where(scales == 0, 1, scales).astype(np.float32)
        rounded = np.rint(values / scales).astype(np.int8)
        name = tensor.name
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(rounded, f"{name}_int8"))
        graph.initializer.append(numpy_helper.from_array(scales, f"{name}_scale"))
        graph.node.insert(0, helper.make_node("Mul", [f"{name}_float", f"{name}_scale"], [name]))
        graph.node.insert(0, helper.make_node("Cast", [f"{name}_int8"], [f"{name}_float"], to=TensorProto.FLOAT))
