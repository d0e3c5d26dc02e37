"""Writes docs/scaling.md: what a step of each paper's recipe costs, counted on two pairs, and what follows for 1, 8 and 64 GPUs.

Run: python scripts/render_scaling.py (some minutes, 6 GB)
"""

from __future__ import annotations

import io
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from coalign.config import TrainConfig
from coalign.data.loader import PairLoader
from coalign.data.tokenizer import load_tokenizer
from coalign.method import Method
from coalign.recipes import recipe
from coalign.run.cost import Measured, measure_step, step_cost
from coalign.run.dry_run import duration
from coalign.run.model import build_method
from coalign.run.plan import A_MACHINE, AS_DECLIP, COUNTS, DEVICES, GOOD, SPARE, plan
from coalign.types import Record

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
from captions import CAPTIONS  # noqa: E402
from step_overhead import make_batch  # noqa: E402

CC3M, YFCC, WEB, COCO = 2_900_000, 15_000_000, 88_000_000, 118_000
RECIPES = {
    "clip-cc3m": CC3M, "slip-cc3m": CC3M, "declip-cc3m": CC3M, "uniclip-cc3m": CC3M, "mcd-cc3m": CC3M, "oner-cc3m": CC3M,
    "mct-coco": COCO, "clip-yfcc15m": YFCC, "declip-yfcc15m": YFCC, "uniclip-yfcc15m": YFCC, "mcd-yfcc15m": YFCC,
    "declip-88m-vit-b-32": WEB, "declip-88m-rn50": WEB,
}  # fmt: skip
# What DeCLIP's authors report (App. C and Table 9): a recipe, its changes, pairs, V100s, their hours in all, GB of each.
REPORTED = [
    ("declip-88m-vit-b-32", {}, WEB, 80, 80 * 10 * 24, None),
    ("declip-88m-rn50", {}, WEB, 80, 80 * 8 * 24, None),
    ("declip-cc3m", {"batch_size": 2048}, CC3M, 16, 304, 22.7),
    ("declip-cc3m-clip", {"batch_size": 2048, "epochs": 64}, CC3M, 16, 416, 15.8),
    ("declip-cc3m-clip", {"batch_size": 4096, "epochs": 64}, CC3M, 16, 399, 24.0),
]
PAGE = """# Planning past this machine

Made by `python scripts/render_scaling.py`. There was no GPU where coalign was written: this page is arithmetic, from operations, bytes
and messages counted on two pairs of each paper's recipe, with captions of {tokens:.0f} tokens on average and images of 224 pixels.
`coalign train --dry-run` prints the same for your data, recipe and batch.

## What a pair costs

Forward and backward, teachers included, in bf16. Activations are what is kept of a pair for the backward pass; `--micro-batch` bounds how
many pairs that are, and encodes each once more. Sent is what each of many GPUs sends for the gradients of a step, and for a pair's
features.

{costs}

## Against what the papers report

DeCLIP's authors give the GPUs and hours of their runs. Operations over those hours are a small share of a V100's half-precision peak, 125
TFLOP/s: these runs waited for something else, most likely images, and padded captions to 77 tokens, which coalign packs. So plans have
two times: at {good:.0%} of the peak, which well-kept training of such towers reaches where the data keep up, and at {slow:.0%},
about theirs.

{reported}

## Predicted

At {good:.0%} of the peak (in brackets at {slow:.0%}), in slices of so many pairs where a GPU's whole share does not fit. Nothing
that is sent is hidden behind computing. An A100 has 312 TFLOP/s, 80 GB, 300 GB/s to GPUs of its machine and 25 GB/s
beyond; an H100 989, 80 GB, 450 and 50; a machine has {machine}. Cores are those of the machine that wrote this page, for
each A100 of eight at {good:.0%}, with JPEGs of 500 × 375 pixels: where there are fewer, they decide the time, not the GPUs.

{predicted}

## What to type

The batch is that of all processes together, and the gradient is that of the batch, whatever their number.

```bash
# one GPU: slices of the batch that fit, the same gradient
coalign train --recipe mcd-cc3m --data "cc3m/{{00000..00331}}.tar" --micro-batch 512 --workers 16 --out runs/mcd

# one machine with eight
torchrun --nproc-per-node 8 -m coalign.cli train --recipe mcd-cc3m --data "cc3m/{{00000..00331}}.tar" --out runs/mcd

# eight machines with eight each: this, on every machine, with the same files at the same paths
torchrun --nnodes 8 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint FIRST_MACHINE:29500 --max-restarts 3 \\
  -m coalign.cli train --recipe mcd-yfcc15m --data "yfcc/{{00000..01499}}.tar" --resume auto --out /shared/runs/mcd
```

The first process writes the run's folder and the shards' indexes. With `--resume auto` and `--max-restarts` a run whose process died goes
on from its last checkpoint, on as many processes as there are then. `coalign profile` under the same launcher says where a step's time
goes. A model whose weights, gradients and moments do not fit one device is trained with `--shard`, which divides them over the processes
(FSDP2), layer by layer, and sends weights instead: memory for time. The plans above do without.

Where loader processes cannot keep up, `--image-cache GB` keeps decoded images in the machine's temporary folder (its processes share it)
for the epochs after the first, and `--device-views` makes colours and blur on the device: with both, about a third of a process's work
is left of three views of a JPEG of 500 × 375, in `benchmarks/views_3.py`.

With `COALIGN_TRITON=1` the losses of a CUDA device are Triton kernels, in which similarities never leave the chip (NVIDIA, from Ampere
on). They are tested in Triton's interpreter and compiled, but were never run on a GPU: compare `coalign profile` with and without it, and
the loss of the first steps, before you rely on it.
"""


class Photos:
    """A picture of 500 × 375 pixels, as often as asked."""

    name, splits = "photos", None

    def __init__(self) -> None:
        coarse = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        self.content = file.getvalue()

    def __len__(self) -> int:
        return 512

    def record(self, index: int) -> Record:
        caption = CAPTIONS[index % len(CAPTIONS)]
        return Record(str(index), (caption,), facts={"paraphrases": {caption: [caption]}})

    def image(self, index: int) -> bytes:
        return self.content


def load_seconds(method: Method, config: TrainConfig) -> float:
    """Of a core, for a pair: decoding, views and tokens."""
    source, plan_ = Photos(), method.view_plan
    loader = PairLoader(
        source, np.arange(len(source)), plan_, load_tokenizer("clip"),
        image_size=224, context_length=config.context_length, batch_size=64, seed=0,
        tag_vocabulary={} if plan_.tags else None, patch_grid=(14, 14) if plan_.patch_ranks else None,
    )  # fmt: skip
    batches = loader.batches(0, 4)
    next(batches)
    start = time.process_time()
    count = sum(len(loaded.batch) for loaded in batches)
    return (time.process_time() - start) / count


def measured(config: TrainConfig) -> tuple[Method, Measured]:
    torch.manual_seed(0)
    method = build_method(config, load_tokenizer("clip"))
    return method, measure_step(method, make_batch(method.view_plan, 8, 224), torch.bfloat16)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    torch.set_num_threads(max(1, torch.get_num_threads()))
    costs, predicted = [], []
    for name, pairs in RECIPES.items():
        config = recipe(name)(pairs)
        method, found = measured(config)
        seconds = load_seconds(method, config)
        one = step_cost(found, config, 1)
        passes = ", ".join(f"{count:g} {kind}" for kind, count in one.passes.items())
        teachers = ", ".join(f"{count:g} {kind}" for kind, count in one.target_passes.items())
        activations = (found.encoded.saved - found.casts) / 2
        costs.append(
            [
                f"`{name}`", passes, teachers or "none", f"{sum(one.flops.values()) / config.batch_size / 1e9:,.0f} GFLOP",
                f"{activations / 2**20:,.0f} MB", f"{2 * one.memory['gradients'] / 2**20:,.0f} MB",
                f"{3 * one.gathered / config.batch_size / 1024:,.1f} KB",
            ]
        )  # fmt: skip
        steps = round(config.epochs * (pairs // config.batch_size))
        row = [f"`{name}`", f"{pairs / 1e6:,.3g} M × {config.epochs:g}", f"{config.batch_size:,}"]
        for device in DEVICES[1:]:
            for count in COUNTS:
                if config.batch_size % count:
                    row.append("")
                    continue
                each = plan(found, config, steps, device, count, seconds)
                slices = f", slices of {each.micro_batch}" if each.micro_batch else ""
                row.append(f"{duration(each.hours)} ({duration(each.slow_hours)}){slices}")
        of_a100 = plan(found, config, steps, DEVICES[1], 8 if not config.batch_size % 8 else 1, seconds)
        predicted.append([*row, f"{of_a100.cores:,.0f}"])
        print(name, flush=True)
    reported = []
    for name, changes, pairs, gpus, hours, memory in REPORTED:
        config = replace(recipe(name)(pairs), **changes)
        cost = step_cost(measured(config)[1], config, gpus)
        operations = sum(cost.flops.values()) * config.epochs * (pairs // config.batch_size)  # of a GPU
        share = operations * gpus / (hours * 3600) / DEVICES[0].flops
        ours = sum(cost.memory.values()) * SPARE / 1e9
        reported.append(
            [
                f"`{name}`, batch {config.batch_size:,}, {config.epochs:g} epochs", f"{gpus} V100", f"{hours:,}", f"{share:.1%}",
                "" if memory is None else f"{memory:.1f}", f"{ours:.1f}",
            ]
        )  # fmt: skip
        print(name, flush=True)
    tokenizer = load_tokenizer("clip")
    tokens = float(np.mean([len(tokenizer.encode(caption, 77)) for caption in CAPTIONS]))
    columns = [f"{count} × {device.name}" for device in DEVICES[1:] for count in COUNTS]
    page = PAGE.format(
        tokens=tokens, good=GOOD, slow=AS_DECLIP, machine=f"{A_MACHINE} GPUs",
        costs=table(["recipe", "trained passes", "teachers", "operations", "activations", "sent a step", "sent a pair"], costs),
        reported=table(["recipe", "on", "GPU hours, theirs", "share of the peak", "GB a GPU, theirs", "counted by us"], reported),
        predicted=table(["recipe", "pairs × epochs", "batch", *columns, "cores an A100"], predicted),
    )  # fmt: skip
    (ROOT / "docs/scaling.md").write_text(page)


if __name__ == "__main__":
    main()
