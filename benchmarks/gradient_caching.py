"""What gradient caching (`--micro-batch`) costs, for every method: memory from a batch of 256 to one of 4,096, and time at equal batch.

Memory: the growth of the peak of a process in one step, beside the batch itself, at both sizes in slices of 64; their difference over what
features, teachers' features, their gradients and the objective's activations take, counted tensor by tensor. Time: a step in slices over
the same step whole, at the batch of 256, taking turns; a third pass over the encoders for two would be 1.33 without any other cost, and
teachers run once. Model: 4 layers of width 256, 64-pixel images in patches of 16; the papers' heads; queues of 4,096, filled.

Run: python benchmarks/gradient_caching.py [METHOD …] [--repeats 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from memory import clear_peak, peak
from step_overhead import CONTEXT, PATCH, SIDE, WORLD, fill_queues, make_batch, timed

from coalign.config import from_json
from coalign.method import Method
from coalign.methods import METHODS, config_class, method_class
from coalign.networks.towers import TowerSpec
from coalign.training.distributed import RankGather
from coalign.training.step import forward_backward
from coalign.types import Features, StepInfo

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


def counted(method: Method, size: int) -> float:
    """GB of features, teachers' features, gradients and the objective's activations of a batch."""
    batch = make_batch(method.view_plan, size)
    saved: dict[int, int] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    def parts(encode, count) -> list[Features]:  # type: ignore[no-untyped-def]
        with torch.no_grad():
            return [encode(batch[slice(start, start + SLICE)], INFO) for start in range(0, count, SLICE)]

    features, targets = (
        {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]} if pieces[0] else {}
        for pieces in (parts(method.encode, size), parts(method.encode_targets, size))
    )
    features = {name: t.requires_grad_(t.is_floating_point()) for name, t in features.items()}
    known = {t.untyped_storage().data_ptr() for t in (*method.parameters(), *method.buffers())}
    held = sum(t.nbytes for t in targets.values()) + sum(t.nbytes * (1 + t.requires_grad) for t in features.values())
    known |= {t.untyped_storage().data_ptr() for t in (*features.values(), *targets.values())}
    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
        method.objective(features, targets, RankGather(WORLD), INFO)
    return (held + sum(size for pointer, size in saved.items() if pointer not in known)) / 2**30


def step(method: Method, batch, slices: int | None) -> None:  # type: ignore[no-untyped-def]
    size = slices or len(batch)
    rows = [slice(start, start + size) for start in range(0, len(batch), size)]
    forward_backward(method, batch, INFO, WORLD, slices=rows)
    method.zero_grad()


def growth(name: str, model: str, size: int) -> None:
    """In a process of its own: prints the growth of the peak in a step, and what it has to be made of."""
    method = build(name, model)
    batch = make_batch(method.view_plan, size)
    step(method, batch[slice(0, SLICE)], SLICE // 2)  # gradients and what libraries keep
    clear_peak()
    before = peak()
    step(method, batch, SLICE)
    grown = peak() - before
    print(json.dumps([grown, counted(method, size)]))


def measure(name: str, model: str, repeats: int) -> None:
    found = []
    for size in (SMALL, LARGE):
        command = [sys.executable, __file__, name, "--measure", str(size), model]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    (small, small_counted), (large, large_counted) = found
    method = build(name, model)
    batch = make_batch(method.view_plan, SMALL)
    pairs = [
        (timed(lambda: step(method, batch, SLICE)), timed(lambda: step(method, batch, None)))
        for _ in range(1 + repeats)
    ]
    ratios = sorted(sliced / whole for sliced, whole in pairs[1:])
    print(
        f"{name}: {small * 1024:.0f} MB in a step of {SMALL:,}, {large * 1024:.0f} MB in one of {LARGE:,}; "
        f"growth over what is counted {(large - small) / (large_counted - small_counted):.2f} (target at most {MEMORY})\n"
        f"  RATIO of time {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}; target at most {TIME})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.measure:
        return growth(options.methods[0], options.measure[1], int(options.measure[0]))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.json"
        model.write_text(json.dumps(MODEL))
        for name in options.methods:
            measure(name, str(model), options.repeats)


if __name__ == "__main__":
    main()
