"""What `train --dry-run` prints: everything that would happen, and the first batch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from coalign.config import TrainConfig, flatten, to_json
from coalign.data.loader import LoadedBatch, check_batch_size
from coalign.data.tokenizer import Tokenizer
from coalign.method import Method
from coalign.optim import build_optimisers
from coalign.run.cost import StepCost, measure_step, step_cost
from coalign.run.model import trained_on
from coalign.run.pairs import Data, pair_loader
from coalign.run.plan import AS_DECLIP, GOOD, Plan, plans
from coalign.training.distributed import World
from coalign.training.trainer import autocast_dtype
from coalign.types import Batch

SHOWN = 8  # pairs of the first batch; more are not loaded


def describe(
    console: Console,
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    tokenizer: Tokenizer,
    pairs: Data,
    world: World,
) -> None:
    """Prints the resolved configuration, parameters, steps, the first pairs and what a step costs; writes their pictures to
    out/first_batch.png. The data may be smaller than a batch."""
    check_batch_size(config.batch_size, world.size)
    autocast = autocast_dtype(config.precision, world.device)
    build_optimisers(method.parameter_groups(), config.optimiser, method)  # complains of wrong settings
    table = Table("setting", "value", title="Configuration", title_justify="left")
    for name, value in flatten(to_json(config)).items():
        table.add_row(name, str(value))
    console.print(table)
    counts = {role: sum(p.numel() for p in parameters) for role, parameters in method.parameter_groups().items()}
    table = Table("part", "trained parameters", title="Model", title_justify="left")
    for role, count in {**counts, "total": sum(counts.values())}.items():
        table.add_row(role, f"{count:,}")
    console.print(table)
    _print_steps(console, data, config, pairs)
    few = min(SHOWN, len(pairs.train))
    alone = World(0, 1, world.device)
    tag_ids = pairs.tag_ids(method.view_plan.tags)
    loader = pair_loader(method, replace(config, workers=0), pairs.source, pairs.train, tokenizer, alone, few, tag_ids)
    loaded = next(loader.batches(0, 1))
    began = time.process_time()
    next(loader.batches(1, 2) if loader.steps_per_epoch > 1 else loader.batches(0, 1))
    load_seconds = (time.process_time() - began) / few
    _print_batch(console, loaded, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "first_batch.png"
    Image.fromarray(_contact_sheet(loaded.batch)).save(picture)
    console.print(f"Its pictures, a row a view: {picture}", soft_wrap=True)
    measured = measure_step(method, loaded.batch, autocast)
    _print_cost(console, step_cost(measured, config, world.size), config, world, autocast)
    steps = max(1, round(config.epochs * (len(pairs.train) // config.batch_size)))
    _print_plans(console, plans(measured, config, steps, load_seconds), load_seconds)


def _print_steps(console: Console, data: str, config: TrainConfig, pairs: Data) -> None:
    steps = len(pairs.train) // config.batch_size
    console.print(
        f"{data}: {trained_on(config, len(pairs.train))} for training, {len(pairs.val):,} held out. {steps:,} steps an epoch "
        f"of {config.batch_size:,} pairs, {round(config.epochs * steps):,} steps in all."
    )
    if not steps:
        console.print("[bold]Training would refuse: the data has fewer pairs than a batch.[/bold]")


def _print_batch(console: Console, loaded: LoadedBatch, tokenizer: Tokenizer) -> None:
    batch = loaded.batch
    console.print(f"The first {len(batch)} pairs of the first batch:")
    for name, view in batch.images.items():
        console.print(f"image view {name}: uint8 {list(view.pixels.shape)}")
    for name, text in batch.texts.items():
        console.print(
            f"text view {name}: {list(text.ids.shape)} token ids, {text.lengths.float().mean():.1f} tokens a caption"
        )
        for row in range(len(batch)):
            console.print(f"  {tokenizer.decode(text.ids[row, : text.lengths[row]].tolist())}", markup=False)
    if loaded.bad:
        reasons = ", ".join(sorted({entry.reason for entry in loaded.bad}))
        console.print(f"{len(loaded.bad)} samples cannot be used: {reasons}.")


def _print_cost(
    console: Console, cost: StepCost, config: TrainConfig, world: World, autocast: torch.dtype | None
) -> None:
    passes = ", ".join(f"{kind} {count:g}" for kind, count in cost.passes.items())
    teachers = ", ".join(f"{kind} {count:g}" for kind, count in cost.target_passes.items())
    console.print(f"Passes a step, for every pair: {passes}; teachers: {teachers or 'none'}.")
    each = f"{config.batch_size // world.size:,} pairs"
    where = f"each of {world.size} processes" if world.size > 1 else "one process"
    precision = "fp32" if autocast is None else str(autocast).removeprefix("torch.")
    tables = (
        (
            f"A step's operations ({each}, {where})",
            "operations",
            cost.flops,
            1000,
            ("", "k", "M", "G", "T", "P", "E"),
            "FLOP",
        ),
        (
            f"Memory of a device ({each}, {precision}, {where})",
            "size",
            cost.memory,
            1024,
            ("", "Ki", "Mi", "Gi", "Ti"),
            "B",
        ),
    )
    for title, column, parts, base, prefixes, unit in tables:
        table = Table("estimated from two pairs", column, title=title, title_justify="left")
        for name, value in {**parts, "total": sum(parts.values())}.items():
            table.add_row(name, _scaled(value, base, prefixes) + unit)
        console.print(table)
    console.print("The working memory of single operations comes on top: allow a third more.")


def _print_plans(console: Console, found: Sequence[Plan], load_seconds: float) -> None:
    table = Table(
        "GPUs", "micro-batch", "memory", f"time at {GOOD:.0%}", f"at {AS_DECLIP:.0%}", "GPU hours", "sending", "cores to load",
        title="All of it on GPUs: predicted, not measured", title_justify="left",
    )  # fmt: skip
    for each in found:
        table.add_row(
            f"{each.count} × {each.device.name}",
            str(each.micro_batch or "") if each.fits else "none fits",
            _scaled(each.memory, 1024, ("", "Ki", "Mi", "Gi", "Ti")) + "B",
            duration(each.hours),
            duration(each.slow_hours),
            f"{each.gpu_hours:,.3g}",
            f"{each.communication:.0%}",
            f"{each.cores:,.1f}",
        )
    console.print(table)
    console.print(
        f"Times are for {GOOD:.0%} of the half-precision peak, as well-kept training reaches, and {AS_DECLIP:.0%}, as DeCLIP's authors "
        f"report. Cores are this machine's, for a GPU at {GOOD:.0%}: one took {1000 * load_seconds:.1f} ms for a pair. See docs/scaling.md."
    )


def duration(hours: float) -> str:
    """0.05 -> "3 min"."""
    for unit, size in (("days", 24), ("h", 1), ("min", 1 / 60)):
        if hours >= 2 * size:
            return f"{hours / size:,.3g} {unit}"
    return f"{3600 * hours:,.2g} s"


def _scaled(value: float, base: int, prefixes: Sequence[str]) -> str:
    """12,345,678 -> "12.3 M"."""
    power = 0
    while value >= 999.5 and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    return f"{value:,.3g} {prefixes[power]}" if value < 999.5 else f"{value:,.0f} {prefixes[power]}"


def _contact_sheet(batch: Batch) -> np.ndarray:
    rows = [view.pixels.permute(0, 2, 3, 1).numpy() for view in batch.images.values()]  # [pair, height, width, 3] each
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
