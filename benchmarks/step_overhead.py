"""Overhead of a training step over its encoder passes, for every method of the registry.

The step is the trainer's: encoders, heads, losses, queues, teachers, backward, gradient norm, AdamW. The baseline is the encoder calls of
one step, recorded and repeated on the same inputs, with projections, a sum instead of all losses, backward, gradient norm, and AdamW on the
encoders; teachers without gradient. Model: width 384, 12 layers, 64-pixel images in patches of 16, text width 384; the papers' heads,
queues (full) and vocabulary; web captions, with the method's own text views. Both sides alternate; the first step of each is not timed.
With one thread (the default), CPU time is measured, so that other programs hardly affect it.

Run: python benchmarks/step_overhead.py [METHOD …] [--batch-size 256] [--repeats 3] [--threads 1]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from captions import CAPTIONS
from lines import line
from torch import Tensor

from coalign.config import OptimizerConfig
from coalign.data.text.tokenizer import load_tokenizer, pad
from coalign.data.text.views import eda, mask_tokens
from coalign.method import Method
from coalign.methods import METHODS, config_class, method_class
from coalign.networks.queue import FeatureQueue
from coalign.networks.towers.spec import TowerSpec, find_towers
from coalign.networks.two_towers import TwoTowers
from coalign.optim import build_optimizers, clip_gradients
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.types import Batch, ImageView, StepInfo, TextView, ViewPlan

TARGET, CONTEXT, SIDE, PATCH = 1.15, 77, 64, 16
MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": SIDE, "layers": 12, "width": 384, "patch_size": PATCH, "head_width": 64},
    "text_cfg": {"context_length": CONTEXT, "vocab_size": 49408, "width": 384, "heads": 6, "layers": 12},
}
WORLD = World(0, 1, torch.device("cpu"))


def make_batch(plan: ViewPlan, size: int, side: int = SIDE, patch: int = PATCH) -> Batch:
    """Random pixels, whose values do not affect the time, and real captions in the method's own views."""
    tokenizer, generator = load_tokenizer("clip"), np.random.default_rng(0)
    captions = [f"{CAPTIONS[row % len(CAPTIONS)]} {row // len(CAPTIONS) or ''}".strip() for row in range(size)]
    rows, grid = torch.arange(size), side // patch
    images = {
        name: ImageView(
            torch.randint(256, (size, 3, side, side), dtype=torch.uint8),
            torch.rand(size, 11),
            torch.rand(size, grid, grid) if plan.patch_ranks else None,
        )
        for name in plan.images
    }
    texts = {}
    for name, policy in plan.texts.items():
        changed = [eda(caption, generator) if policy.kind == "eda" else caption for caption in captions]
        ids, lengths = pad([tokenizer.encode(caption, CONTEXT) for caption in changed])
        masked, labels = mask_tokens(
            ids.numpy(), lengths.numpy(), policy.mask_p, generator.random((3, *ids.shape)), tokenizer
        )
        texts[name] = TextView(torch.from_numpy(masked), lengths, torch.from_numpy(labels) if policy.mask_p else None)
    tags = torch.randint(1000, (size, 5)) if plan.tags else None
    return Batch(rows, images, texts, rows, rows >= 0, tags)


def fill_queues(method: Method) -> None:
    for queue in (module for module in method.modules() if isinstance(module, FeatureQueue)):
        columns = {name: queue[name] for name in queue.columns}
        rows = {
            name: torch.randn_like(value) if value.is_floating_point() else torch.randint_like(value, 2**31, 2**32)
            for name, value in columns.items()
        }
        queue.push(**rows)


def full_step(method: Method, batch: Batch) -> Callable[[], None]:
    optimizers = build_optimizers(method.parameter_groups(), OptimizerConfig(), method)
    parameters, info = optimizers.parameters(), StepInfo(500, 1000)

    def step() -> None:
        result = forward_backward(method, batch, info, WORLD)
        assert torch.isfinite(clip_gradients(parameters, None))
        optimizers.step()
        method.after_step(result.features, result.targets, RankGather(WORLD), info)
        optimizers.zero_grad()

    return step


def bare_step(method: Method, batch: Batch) -> tuple[Callable[[], None], list[str]]:
    """Returns a step of the encoder calls alone, and a description of each call."""
    calls: list[tuple[Any, tuple[Tensor, ...], dict[str, bool], bool]] = []

    def record(tower: Any, arguments: tuple[Tensor, ...], options: dict[str, bool]) -> None:
        calls.append((tower, arguments, options, torch.is_grad_enabled()))

    hooks = [tower.register_forward_pre_hook(record, with_kwargs=True) for tower in find_towers(method)]
    info = StepInfo(500, 1000)
    method.encode(batch, info)
    with torch.no_grad():
        method.encode_targets(batch, info)
    for hook in hooks:
        hook.remove()
    trained = {id(p): p for tower, _, _, grad in calls if grad for p in tower.parameters()}
    optimizers = build_optimizers({"towers": list(trained.values())}, OptimizerConfig())

    def step() -> None:
        sums = []
        for tower, arguments, options, grad in calls:
            with torch.set_grad_enabled(grad):
                pooled, parts = tower(*arguments, **options)
                sums.append(tower.projection(pooled).sum())
                if parts is not None:
                    sums.append(parts.sum())  # masked language modeling uses all tokens
        torch.stack([total for total in sums if total.requires_grad]).sum().backward()
        assert torch.isfinite(clip_gradients(optimizers.parameters(), None))
        optimizers.step()
        optimizers.zero_grad()

    kinds = []
    for tower, inputs, _, grad in calls:
        kind, count = tower.describe_pass(*inputs)
        kinds.append(f"{'trained' if grad else 'teacher'} {kind} × {count}")
    return step, kinds


def timed(step: Callable[[], None]) -> float:
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = clock()
    step()
    return clock() - start


def measure(name: str, model: Path, size: int, repeats: int) -> None:
    torch.manual_seed(0)
    method = method_class(name)(config_class(name)(), TowerSpec(str(model), MODEL["text_cfg"]["vocab_size"], CONTEXT))  # type: ignore[index]
    method.train()
    fill_queues(method)
    batch = make_batch(method.view_plan, size)
    if not isinstance(method, TwoTowers):
        print(f"{name}: not measured, because it has no separate image encoder")
        return
    bare, kinds = bare_step(method, batch)
    full = full_step(method, batch)
    times = [(timed(full), timed(bare)) for _ in range(1 + repeats)][1:]
    print(f"{name}: {', '.join(kinds)}")
    line(f"{name}, step over its encoder passes", [step / passes for step, passes in times], at_most=TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"batch {options.batch_size}, threads {options.threads}")
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model.json"
        model.write_text(json.dumps(MODEL))
        for name in options.methods:
            measure(name, model, options.batch_size, options.repeats)


if __name__ == "__main__":
    main()
