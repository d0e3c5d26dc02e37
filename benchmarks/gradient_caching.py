"""Overhead of gradient caching (`--micro-batch`) for every method: memory growth from batch 256 to 4,096, and time at equal batch size.

Memory: the growth of a step's peak tensor memory (without the batch) between the two sizes, in micro-batches of 64, over the growth of
features, teachers' features, their gradients and the objective's activations. The large batch repeats the small one's captions, so that no
micro-batch is longer. Time: a step in micro-batches over the same step at once, at batch 256, alternating. Three passes over the encoders
instead of two would be 1.33 without any other cost; teachers run once. Model: 4 layers of width 256, 64-pixel images in patches of 16, the
papers' heads, full queues of 4,096.

Run: python benchmarks/gradient_caching.py [METHOD …] [--repeats 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from lines import line
from memory import TensorPeak
from step_overhead import CONTEXT, PATCH, SIDE, WORLD, fill_queues, make_batch, timed

from coalign.config import from_json
from coalign.method import Method
from coalign.methods import METHODS, config_class, method_class
from coalign.networks.towers.spec import TowerSpec
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward
from coalign.types import Batch, Features, StepInfo

SMALL, LARGE, SLICE, QUEUE = 256, 4096, 64, 4096
MEMORY, TIME = 1.05, 1.4  # the targets
INFO = StepInfo(500, 1000)
MODEL = {
    "embed_dim": 256,
    "vision_cfg": {"image_size": SIDE, "layers": 4, "width": 256, "patch_size": PATCH, "head_width": 64},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 256, "heads": 4, "layers": 4},
}


def build(name: str, model: str) -> Method:
    torch.manual_seed(0)
    cls = config_class(name)
    config = from_json(cls, {"queue_size": QUEUE} if "queue_size" in cls.__dataclass_fields__ else {})
    method = method_class(name)(config, TowerSpec(model, MODEL["text_cfg"]["vocab_size"], CONTEXT))  # type: ignore[index]
    method.train()
    fill_queues(method)
    return method


def required_memory(method: Method, batch: Batch) -> float:
    """Returns the GB of features, teachers' features, gradients and the objective's activations of a batch."""
    size = len(batch)
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def encode_slices(encode, count) -> list[Features]:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return [encode(batch[slice(start, start + SLICE)], INFO) for start in range(0, count, SLICE)]

    features, targets = (
        {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} if pieces[0] else {}
        for pieces in (encode_slices(method.encode, size), encode_slices(method.encode_targets, size))
    )
    features = {name: t.requires_grad_(t.is_floating_point()) for name, t in features.items()}
    known = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    feature_bytes = sum(t.nbytes for t in targets.values()) + sum(
        t.nbytes * (1 + t.requires_grad) for t in features.values()
    )
    known |= {t.untyped_storage().data_ptr() for t in (*features.values(), *targets.values())}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        method.objective(features, targets, RankGather(WORLD), INFO)
    return (feature_bytes + sum(size for pointer, size in saved.items() if pointer not in known)) / 2**30


def step(method: Method, batch, slices: int | None) -> None:  # type: ignore[no-untyped-def]
    size = slices or len(batch)
    rows = [slice(start, start + size) for start in range(0, len(batch), size)]
    forward_backward(method, batch, INFO, WORLD, slices=rows)
    method.zero_grad()


def repeated(batch: Batch, size: int) -> Batch:
    """Repeats the rows of a batch up to `size`, as different samples with different captions."""
    rows = torch.arange(size)
    return replace(batch[rows % len(batch)], indices=rows, caption_ids=rows)  # type: ignore[index]


def step_peak(name: str, model: str, size: int) -> tuple[float, float]:
    """Returns the peak tensor memory of a step and the memory that its batch size requires, in GB."""
    method = build(name, model)
    batch = make_batch(method.view_plan, SMALL)
    step(method, batch[slice(0, SLICE)], SLICE // 2)  # allocates gradients and libraries' workspaces
    batch = repeated(batch, size)
    with TensorPeak() as tensors:
        step(method, batch, SLICE)
    return tensors.peak, required_memory(method, batch)


def measure(name: str, model: str, repeats: int) -> None:
    (small, small_required), (large, large_required) = (step_peak(name, model, size) for size in (SMALL, LARGE))
    method = build(name, model)
    batch = make_batch(method.view_plan, SMALL)
    pairs = [
        (timed(lambda: step(method, batch, SLICE)), timed(lambda: step(method, batch, None)))
        for _ in range(1 + repeats)
    ]
    print(f"{name}: {small * 1024:.0f} MB at batch {SMALL:,}, {large * 1024:.0f} MB at batch {LARGE:,}")
    growth = (large - small) / (large_required - small_required)
    line(f"{name} in micro-batches, memory growth over features and heads", [growth], at_most=MEMORY)
    ratios = [sliced / whole for sliced, whole in pairs[1:]]
    line(f"{name} in micro-batches, time over the step at once", ratios, at_most=TIME)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.json"
        model.write_text(json.dumps(MODEL))
        for name in options.methods:
            measure(name, str(model), options.repeats)


if __name__ == "__main__":
    main()
