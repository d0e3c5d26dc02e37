"""The output of `coalign train --dry-run`: settings, model size, cost and the first batch."""

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
from coalign.data.loading.train import LoadedBatch, check_batch_size
from coalign.data.text.tokenizer import Tokenizer
from coalign.devices import device_line
from coalign.formatting import duration
from coalign.method import Method
from coalign.networks.tuning import Tuning
from coalign.optim import build_optimizers
from coalign.runs.folder import describe_samples, end_of_path
from coalign.runs.run import saved_model
from coalign.training.distributed import World
from coalign.training.trainer import autocast_dtype, precision_name
from coalign.types import Batch
from coalign.workflows.train.batches import TrainingData, pair_loader
from coalign.workflows.train.caches.features import RunFeatures
from coalign.workflows.train.gpu_plan import DECLIP_MFU, GOOD_MFU, Plan, plans
from coalign.workflows.train.step_cost import StepCost, measure_step, step_cost

NUM_SHOWN = 8  # pairs of the first batch to load and print


def print_dry_run(
    console: Console,
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    tuning: Tuning,
    tokenizer: Tokenizer,
    pairs: TrainingData,
    world: World,
    features: RunFeatures,
) -> None:
    """Prints the resolved configuration, parameter counts, number of steps, first pairs and cost per step.

    Writes the images of the first pairs to out/first_batch.png. The dataset may be smaller than a batch. Raises UserError for settings that
    training would reject.
    """
    check_batch_size(config.batch_size, world.size)
    autocast = autocast_dtype(config.precision, world.device)
    build_optimizers(tuning.groups(), config.optimizer, method, tuning.rates())  # rejects invalid settings
    table = Table("setting", "value", title="Configuration", title_justify="left")
    for name, value in flatten(to_json(config)).items():
        table.add_row(name, str(value))
    console.print(table)
    console.print(device_line(world.device))
    _print_parts(console, tuning)
    for line in _start_lines(method, config):
        console.print(line)
    _print_steps(console, data, config, pairs)
    batch_size = min(NUM_SHOWN, len(pairs.train))
    single = World(0, 1, world.device)
    tag_ids = pairs.tag_ids(method.view_plan.tags)
    loader = pair_loader(
        method, replace(config, workers=0), pairs.source, pairs.train, tokenizer, single, batch_size, tag_ids
    )
    loaded = next(loader.batches(0, 1))
    start = time.process_time()
    next(loader.batches(1, 2) if loader.steps_per_epoch > 1 else loader.batches(0, 1))
    load_seconds = 0.0 if "image" in features.towers else (time.process_time() - start) / batch_size
    _print_batch(console, loaded, tokenizer)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "first_batch.png"
    Image.fromarray(_contact_sheet(loaded.batch)).save(path)
    console.print(f"Images of these pairs, one row per view: {path}", soft_wrap=True)
    if features.towers:
        features.views("train", pairs.source, pairs.train, tag_ids)
        console.print(features.announcement(), soft_wrap=True)
    measured = measure_step(method, features.replaced(loaded.batch), autocast)
    _print_cost(console, step_cost(measured, config, world.size), config, world, autocast)
    steps = max(1, round(config.epochs * (len(pairs.train) // config.batch_size)))
    _print_plans(console, plans(measured, config, steps, load_seconds), load_seconds)


def _start_lines(method: Method, config: TrainConfig) -> list[str]:
    """Returns a sentence on each pretrained encoder, and on its projection."""
    model = saved_model(config) or {}
    lines = []
    for modality in ("image", "text"):
        starts = getattr(getattr(method, modality, None), "starts", {})
        if not starts:
            continue
        line = f"The {modality} encoder starts from {starts['trunk']}"
        own, dim = model.get(_CFG[modality], {}).get("embed_dim"), model.get("embed_dim")
        if "projection" in starts:
            line += ", projection included."
        elif own in (None, dim):  # has none, or --head replaces it
            line += ", with a new projection."
        else:
            line += (
                f", with a new projection: the pretrained one has {own} dimensions, but the model's embed_dim is {dim}."
            )
        lines.append(line)
    return lines


_CFG = {"image": "vision_cfg", "text": "text_cfg"}


def _print_parts(console: Console, tuning: Tuning) -> None:
    """Prints what each part of the model starts from, how much of it is trained, and its peak learning rate."""
    table = Table(
        "part", "starts from", "tuning", "parameters", "frozen", "peak rate", title="Model", title_justify="left"
    )
    parts = tuning.table()
    for each in parts:
        name, rate = f"{each.role} {each.part}".strip(), "" if each.lr is None else f"{each.lr:g}"
        table.add_row(
            name, end_of_path(each.starts), each.tuning, f"{each.trained + each.frozen:,}", f"{each.frozen:,}", rate
        )
    trained, frozen = sum(each.trained for each in parts), sum(each.frozen for each in parts)
    table.add_row("total", "", "", f"{trained + frozen:,}", f"{frozen:,}", "")
    console.print(table)
    if warning := tuning.warning():
        console.print(warning)


def _print_steps(console: Console, data: str, config: TrainConfig, pairs: TrainingData) -> None:
    steps = len(pairs.train) // config.batch_size
    console.print(
        f"{data}: {describe_samples(config, len(pairs.train))} for training, {len(pairs.val):,} held out. Batch size "
        f"{config.batch_size:,}, {steps:,} steps per epoch, {round(config.epochs * steps):,} steps in total."
    )
    if not steps:
        console.print("Training would fail: the dataset is smaller than a batch.", style="bold")


def _print_batch(console: Console, loaded: LoadedBatch, tokenizer: Tokenizer) -> None:
    batch = loaded.batch
    console.print(f"The first {len(batch)} pairs of the first batch:")
    for name, view in batch.images.items():
        console.print(f"image view {name}: uint8 {list(view.pixels.shape)}")
    for name, text in batch.texts.items():
        console.print(
            f"text view {name}: {list(text.ids.shape)} token ids, {text.lengths.float().mean():.1f} tokens per caption"
        )
        for row in range(len(batch)):
            console.print(f"  {tokenizer.decode(text.ids[row, : text.lengths[row]].tolist())}", markup=False)
    if loaded.bad:
        reasons = ", ".join(sorted({entry.reason for entry in loaded.bad}))
        console.print(f"{len(loaded.bad)} samples are unusable: {reasons}.")


def _print_cost(
    console: Console, cost: StepCost, config: TrainConfig, world: World, autocast: torch.dtype | None
) -> None:
    passes = ", ".join(f"{kind} {count:g}" for kind, count in cost.passes.items())
    teachers = ", ".join(f"{kind} {count:g}" for kind, count in cost.target_passes.items())
    console.print(f"Encoder passes per pair: {passes or 'none'}; teacher passes: {teachers or 'none'}.")
    local = f"{config.batch_size // world.size:,} pairs"
    processes = f"each of {world.size} processes" if world.size > 1 else "one process"
    precision = precision_name(autocast)
    tables = (
        (
            f"Compute per step ({local}, {processes})",
            "compute",
            cost.flops,
            1000,
            ("", "k", "M", "G", "T", "P", "E"),
            "FLOP",
        ),
        (
            f"Memory per device ({local}, {precision}, {processes})",
            "memory",
            cost.memory,
            1024,
            ("", "Ki", "Mi", "Gi", "Ti"),
            "B",
        ),
    )
    for title, column, values, base, prefixes, unit in tables:
        table = Table("estimated from two pairs", column, title=title, title_justify="left")
        for name, value in {**values, "total": sum(values.values())}.items():
            table.add_row(name, _scaled(value, base, prefixes) + unit)
        console.print(table)
    console.print("Operator workspace is not included: allow a third more memory.")


def _print_plans(console: Console, options: Sequence[Plan], load_seconds: float) -> None:
    if all(3600 * each.slow_hours < 60 for each in options):
        console.print("The whole run would take less than a minute on a GPU (predicted, not measured).")
        return
    table = Table(
        "GPUs", "micro-batch", "memory", f"{GOOD_MFU:.0%} MFU", f"{DECLIP_MFU:.0%} MFU", "GPU hours", "comm.", "cores",
        title="The whole run on GPUs (predicted, not measured)", title_justify="left",
    )  # fmt: skip
    for each in options:
        table.add_row(
            f"{each.count} × {each.gpu.name}",
            str(each.micro_batch or "") if each.fits else "none fits",
            _scaled(each.memory, 1024, ("", "Ki", "Mi", "Gi", "Ti")) + "B",
            duration(3600 * each.hours),
            duration(3600 * each.slow_hours),
            f"{each.gpu_hours:,.3g}",
            f"{each.communication:.0%}",
            f"{each.cores:,.1f}",
        )
    console.print(table)
    console.print(
        f"MFU is the fraction of the half-precision peak: {GOOD_MFU:.0%} is typical of well-optimized training, {DECLIP_MFU:.0%} matches "
        f"the times that DeCLIP's authors report. Comm. is the share of communication in a step, without overlap. Cores are CPU cores "
        f"per GPU for data loading, at {1000 * load_seconds:.1f} ms per pair as measured here; both are at {GOOD_MFU:.0%} MFU. "
        'The documentation\'s page "Predicted cost" has the recipes of the papers.'
    )


def _scaled(value: float, base: int, prefixes: Sequence[str]) -> str:
    """Formats a number with a unit prefix: 12,345,678 -> "12.3 M"."""
    power = 0
    while value >= 999.5 and power + 1 < len(prefixes):
        value, power = value / base, power + 1
    return f"{value:,.3g} {prefixes[power]}" if value < 999.5 else f"{value:,.0f} {prefixes[power]}"


def _contact_sheet(batch: Batch) -> np.ndarray:
    """Returns the images of a batch in a grid, one row per view and one column per pair, uint8 [height, width, 3]."""
    rows = [view.pixels.permute(0, 2, 3, 1).numpy() for view in batch.images.values()]  # [pair, height, width, 3] each
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
