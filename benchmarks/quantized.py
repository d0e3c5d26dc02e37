"""Exported ONNX encoders with int8 and float16 weights, compared with float32: size and speed.

The models have random weights, which change neither. Each encoder of a model is exported once and quantized as by `coalign export
--quantize`. onnxruntime runs the three on the same inputs, alternating, on one thread, timed by the processor. RATIO is the float32
size or time over the quantized one: above 1 is smaller or faster. What quantization costs in retrieval depends on the
trained model; the export measures it.

Run: python benchmarks/quantized.py [MODEL …] [--repeats 5] [--batch-size 16]
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from lines import line

from coalign.data.text.tokenizer import load_tokenizer
from coalign.interop.onnx.export import to_onnx
from coalign.interop.onnx.quantize import KINDS, quantize_graph
from coalign.methods import recipe
from coalign.runs.run import build_method, context_length, image_size

MODELS = ["tiny", "small", "ViT-S-32"]
ENCODERS = {"image": "pixels", "text": "input_ids"}
WORDS = 12  # in the measured captions


def write_graphs(model: str, folder: Path, batch_size: int) -> dict[str, Any]:
    """Writes the encoders of a model in float32, int8 and fp16. Returns the inputs of each encoder."""
    tokenizer = load_tokenizer("clip")
    method = build_method(replace(recipe("clip")(10_000), model=model, tokenizer="clip", precision="fp32"), tokenizer)
    side, generator = image_size(method), torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (batch_size, 3, side, side), dtype=torch.uint8, generator=generator)
    ids, _ = tokenizer(["red " * WORDS] * batch_size, context_length(method))
    encode = {"image": lambda dense: dense.encode_image, "text": lambda dense: dense.encode_text}
    to_onnx(
        method, encode, {"image": (pixels[:3],), "text": (ids[:3],)}, tokenizer.end_id, context_length(method), folder
    )
    for name in ENCODERS:
        for kind in KINDS:
            shutil.copy(folder / f"{name}.onnx", folder / f"{name}-{kind}.onnx")
            quantize_graph(folder / f"{name}-{kind}.onnx", kind)
    return {"image": pixels.numpy(), "text": ids.numpy()}


def measure(folder: Path, name: str, values: Any, repeats: int) -> dict[str, list[float]]:
    """Returns the processor times of each kind of encoder, by repetition."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    files = {"fp32": f"{name}.onnx"} | {kind: f"{name}-{kind}.onnx" for kind in KINDS}
    sessions = {
        kind: onnxruntime.InferenceSession(str(folder / file), options, providers=["CPUExecutionProvider"])
        for kind, file in files.items()
    }
    times: dict[str, list[float]] = {kind: [] for kind in sessions}
    for repeat in range(repeats + 1):
        for kind, session in sessions.items():
            start = time.process_time()
            session.run(None, {ENCODERS[name]: values})
            if repeat:  # the first run allocates memory
                times[kind].append(time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, metavar="MODEL")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for model in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            inputs = write_graphs(model, folder, options.batch_size)
            for name, values in inputs.items():
                sizes = {kind: (folder / f"{name}-{kind}.onnx").stat().st_size for kind in KINDS}
                times = measure(folder, name, np.asarray(values), options.repeats)
                for kind, size in sizes.items():
                    line(f"{model}, {name} encoder, {kind}, size", [(folder / f"{name}.onnx").stat().st_size / size])
                    ratios = np.array(times["fp32"]) / np.array(times[kind])
                    line(f"{model}, {name} encoder, {kind}, speed", ratios.tolist())


if __name__ == "__main__":
    main()
