"""UniCLIP's tiled loss, forward and backward, compared with the dense version of open implementations and with matrix products alone.

2,048 pairs of three images and a text, dimension 256, float32. The dense version computes the full similarity matrix, as in the equation.
The matrix products are the four of that size that a tiled loss seems to need: the similarities, the same again for the gradient, and one
for the gradient of each side. RATIO is the median of rounds in which the three alternate. Memory is the growth of the process's peak, each
in its own process. With --scale: ours on 8,192 pairs, too many for a dense version.

Run: python benchmarks/tiled_losses.py [--pairs 2048] [--rounds 5] [--threads 2] [--scale]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from lines import line
from memory import clear_peak, peak
from torch import Tensor
from torch.nn import functional as F

from coalign.losses.multi_positive import balancing_weights, compare_views, domain_combinations, mp_nce

IMAGES, TEXTS, DIM = 3, 1, 256
DOMAINS, WEIGHTS = domain_combinations(IMAGES, TEXTS), balancing_weights(IMAGES, TEXTS).float()
FASTER, MEMORY, PRODUCTS, SCALE_GB = 5.0, 8.0, 2.0, 1.5  # the targets

Inputs = tuple[Tensor, Tensor, Tensor]


def inputs(pairs: int, device: str | torch.device = "cpu") -> Inputs:
    """Returns embeddings [pair, view, dim], and 1/τ and b of the three domain combinations."""
    torch.manual_seed(0)
    embeds = F.normalize(torch.randn(pairs, IMAGES + TEXTS, DIM), dim=-1)
    values = (embeds.to(device), torch.tensor([14.0, 20.0, 10.0], device=device), torch.zeros(3, device=device))
    return tuple(value.requires_grad_() for value in values)


def ours(values: Inputs) -> Tensor:
    embeds, scales, offsets = values
    positions = torch.arange(len(embeds), device=embeds.device)
    return mp_nce(compare_views(embeds, embeds, scales[DOMAINS], offsets[DOMAINS], (positions, positions)), WEIGHTS)


def dense(values: Inputs) -> Tensor:
    """UniCLIP's Eq. 12 on the full similarity matrix."""
    embeds, scales, offsets = values
    pairs = len(embeds)
    logits = (torch.einsum("ivd,jwd->ivjw", embeds, embeds) - offsets[DOMAINS][:, None]) * scales[DOMAINS][:, None]
    rows = torch.arange(pairs, device=embeds.device)
    own = logits[rows, :, rows]  # [pair, view, view]
    same = torch.eye(pairs, dtype=torch.bool, device=embeds.device)[:, None, :, None]
    negatives = logits.masked_fill(same, -torch.inf).flatten(2).logsumexp(2)
    return -(WEIGHTS.to(own) * F.logsigmoid(own - negatives[:, :, None])).sum()


def products(values: Inputs) -> None:
    """Four products of all embeddings, in tiles, so that memory does not limit them."""
    flat = values[0].detach().flatten(0, 1)
    for _ in range(4):
        for rows in flat.split(1024):
            for columns in flat.split(1024):
                rows @ columns.T


def step(loss: Callable[[Inputs], Tensor], values: Inputs) -> float:
    for value in values:
        value.grad = None
    total = loss(values)
    total.backward()
    return float(total.detach())


def growth(version: str, pairs: int, threads: int) -> float:
    """Returns the growth of a new process's peak memory in one step, in GB."""
    command = [sys.executable, __file__, "--measure", version, "--pairs", str(pairs), "--threads", str(threads)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def measure(version: str, pairs: int) -> None:
    values, loss = inputs(pairs), {"ours": ours, "dense": dense}[version]
    step(loss, inputs(64))  # allocates libraries' workspaces
    clear_peak()
    before = peak()
    step(loss, values)
    print(peak() - before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scale", action="store_true")
    parser.add_argument("--measure", choices=("ours", "dense"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.measure:
        return measure(args.measure, args.pairs)
    values = inputs(args.pairs)
    tiled_loss, dense_loss = step(ours, values), step(dense, values)
    assert abs(tiled_loss - dense_loss) <= 1e-5 * abs(dense_loss), (tiled_loss, dense_loss)
    runs = {
        "ours": lambda: step(ours, values),
        "dense": lambda: step(dense, values),
        "products": lambda: products(values),
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)

    def ratios(name: str, over: str) -> list[float]:
        return [a / b for a, b in zip(times[name], times[over])]

    print(f"{args.pairs:,} pairs × {IMAGES + TEXTS} × {DIM}, {args.threads} thread(s), {args.rounds} rounds")
    line("UniCLIP's loss, time of the dense version over ours", ratios("dense", "ours"), at_least=FASTER)
    line("UniCLIP's loss, our time over four matrix products", ratios("ours", "products"), at_most=PRODUCTS)
    memory = {name: growth(name, args.pairs, args.threads) for name in ("ours", "dense")}
    line("UniCLIP's loss, memory of the dense version over ours", [memory["dense"] / memory["ours"]], at_least=MEMORY)
    if args.scale:
        line("UniCLIP's loss on 8,192 pairs, GB", [growth("ours", 8192, args.threads)], at_most=SCALE_GB)


if __name__ == "__main__":
    main()
