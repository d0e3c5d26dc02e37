"""Time of the nearest-neighbor search in a full queue of 65,536 texts, as a share of DeCLIP's training step with ViT-B/32.

A step is the trainer's: two image views, two text views, masked language modeling, all losses and the look-ups, backward, AdamW, and the
queue update. Captions have 16 tokens each, about the average of web captions; embeddings have the paper's 1,024 dimensions. The look-ups
are timed inside the step; `released_code` searches for both text views, `paper` for one. The first step is a warm-up. With one thread (the
default), CPU time is measured, so that other programs hardly affect it; with more, and on a GPU, wall-clock time.

Run: python benchmarks/queue_lookup.py [--batch-size 32] [--steps 3] [--threads 1] [--device cpu] [--model DeCLIP-ViT-B-32]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from lines import line
from torch.nn import functional as F

from coalign.config import OptimizerConfig
from coalign.methods.declip import method as declip
from coalign.methods.declip.config import DeCLIPConfig
from coalign.networks.towers.spec import TowerSpec
from coalign.optim import build_optimizers
from coalign.training.distributed import RankGather, World
from coalign.training.step import forward_backward
from coalign.types import Batch, ImageView, StepInfo, TextView

VOCABULARY, TOKENS, TARGET = 49_408, 16, 0.03


def make_batch(method: declip.DeCLIP, size: int, device: torch.device) -> Batch:
    """Random pixels and tokens; their values do not affect the time."""
    side = method.image.image_size
    images = {
        name: ImageView(torch.randint(256, (size, 3, side, side), dtype=torch.uint8), torch.zeros(size, 11))
        for name in method.view_plan.images
    }
    texts = {}
    for name, policy in method.view_plan.texts.items():
        ids = torch.randint(VOCABULARY - 2, (size, TOKENS))
        labels = torch.where(torch.rand(ids.shape) < policy.mask_p, ids, -100) if policy.mask_p else None
        texts[name] = TextView(ids, torch.full((size,), TOKENS), labels)
    rows = torch.arange(size)
    return Batch(rows, images, texts, rows, rows >= 0).to(device)


class Stopwatch:
    """Wraps a function and adds up the seconds spent in it."""

    def __init__(self, function: Callable[..., Any], clock: Callable[[], float]) -> None:
        self.function, self.clock, self.seconds = function, clock, 0.0

    def __call__(self, *arguments: Any) -> Any:
        start = self.clock()
        result = self.function(*arguments)
        self.seconds += self.clock() - start
        return result


def measure(pairs: str, options: argparse.Namespace) -> None:
    device = torch.device(options.device)

    def clock() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        alone = device.type == "cpu" and torch.get_num_threads() == 1
        return time.process_time() if alone else time.perf_counter()

    torch.manual_seed(0)
    config = DeCLIPConfig(neighbor_pairs=pairs)  # type: ignore[arg-type]
    method = declip.DeCLIP(config, TowerSpec(options.model, VOCABULARY)).train().to(device)
    while method.queue.fill < 1:
        embeds = F.normalize(torch.randn(4096, method.image.embed_dim), dim=-1).to(device)
        ids = torch.randint(2**62, (4096,), device=device)
        method.queue.push(embeds=embeds, indices=ids, caption_ids=ids)
    batch = make_batch(method, options.batch_size, device)
    optimizers = build_optimizers(method.parameter_groups(), OptimizerConfig(), method)
    world, info = World(0, 1, device), StepInfo(500, 1000)
    shares, lookup = [], Stopwatch(declip.nearest_neighbors, clock)
    declip.nearest_neighbors, original = lookup, declip.nearest_neighbors
    try:
        for number in range(1 + options.steps):
            lookup.seconds, start = 0.0, clock()
            result = forward_backward(method, batch, info, world)
            optimizers.step()
            method.after_step(result.features, result.targets, RankGather(world), info)
            optimizers.zero_grad()
            step = clock() - start
            assert result.terms["nns"] > 0, "no neighbors were found"
            if number:
                shares.append(lookup.seconds / step)
    finally:
        declip.nearest_neighbors = original
    print(f"{pairs}\n  last step {step:.3g} s, of which look-ups {lookup.seconds:.3g} s")
    line(f"neighbor look-up over the step, {pairs}", shares, at_most=TARGET)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="DeCLIP-ViT-B-32")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.model}, batch {options.batch_size}, {options.device}, threads {options.threads}, queue 65,536")
    for pairs in ("paper", "released_code"):
        measure(pairs, options)


if __name__ == "__main__":
    main()
