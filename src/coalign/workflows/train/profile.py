"""Profiles training: the time of each stage of a step, and advice on how to reduce it."""

from __future__ import annotations

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coalign.config import TrainConfig
from coalign.cores import num_cores
from coalign.errors import UserError
from coalign.training.distributed import join_world
from coalign.training.stopwatch import Stopwatch
from coalign.training.trainer import Trainer
from coalign.workflows.train.batches import pair_loader
from coalign.workflows.train.caches.features import RunFeatures
from coalign.workflows.train.caches.images import RunImageCache
from coalign.workflows.train.setup import (
    ConfigFn,
    compile_towers,
    initial_method,
    open_data,
    resolve,
    resolve_workers,
    run_tokenizer,
    shard_model,
    step_threads,
)

WARMUP_STEPS = 3  # not measured: libraries and loader workers start up
ADVICE_THRESHOLD = 0.15  # fraction of a step above which a stage gets advice


@dataclass(frozen=True)
class Profile:
    """Means over the measured steps, on the first rank."""

    seconds: float  # per step
    stages: Mapping[str, float]  # seconds per stage, longest first
    pairs_per_second: float
    advice: list[str]
    feature_seconds: float = (
        0.0  # per pair, of the features of locked encoders, which are computed before the first step
    )


def profile(data: str, config_for: ConfigFn, *, steps: int = 20, device: str | None = None) -> Profile:
    """Trains for `steps` steps with the settings of `train`, without saving anything. Under torchrun, call it in every process."""
    if steps < 1:
        raise UserError(f"--steps is {steps}, but must be at least 1.")
    world = join_world(device)
    pairs, config = open_data(data, config_for, world)
    # a shared folder would keep features of a few pairs, which no run reads
    config = replace(resolve(config, len(pairs.train), world), evals=0, feature_folder=None)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer, config = run_tokenizer(config, pairs)
        method, tuning = initial_method(config, tokenizer, world)
        shard_model(method, config, world)
        features = RunFeatures(method, config, tokenizer, Path(world.broadcast(folder)), world)
        features.is_temporary = True
        if features.towers:  # of the pairs of these steps only
            pairs.train = pairs.train[: (WARMUP_STEPS + steps) * config.batch_size]
        tags = pairs.tag_ids(method.view_plan.tags)
        images = RunImageCache(config, method, pairs, Path(folder), world, once="image" in features.towers)
        config = resolve_workers(config, len(pairs.train), world, images.decodes_once)
        loader = pair_loader(
            method,
            config,
            pairs.source,
            pairs.train,
            tokenizer,
            world,
            config.batch_size,
            tags,
            images.cache,
            features.views("train", pairs.source, pairs.train, tags),
        )
        trainer = Trainer(
            method, config, world, Path(folder),
            batches=loader.batches, num_pairs=len(pairs.train), total_steps=WARMUP_STEPS + steps,
            save_checkpoints=False, tuning=tuning,
        )  # fmt: skip
        compile_towers(method, config)
        start = time.monotonic()
        features.compute(Console(highlight=False, soft_wrap=True), config.workers or 0)
        feature_seconds = (time.monotonic() - start) / len(pairs.train) if features.towers else 0.0
        silence = contextlib.redirect_stdout(io.StringIO())  # hides the progress lines
        with step_threads(method, config, world), Stopwatch(world.device) as stopwatch, silence:
            ended = trainer.fit().ended
    if ended == "interrupted":
        raise KeyboardInterrupt
    cores = max(1, num_cores() // world.size)
    measured = stopwatch.steps[WARMUP_STEPS:]
    names = {name for step in measured for name in step}
    means = {name: statistics.fmean(step.get(name, 0.0) for step in measured) for name in names}
    seconds = statistics.fmean(sum(step.values()) for step in measured)
    stages = dict(sorted(means.items(), key=lambda item: -item[1]))
    on_gpu = world.device.type != "cpu"
    return Profile(
        seconds,
        stages,
        config.batch_size / seconds,
        advice(stages, seconds, config, cores, on_gpu, images.cache is not None or "image" in features.towers),
        feature_seconds,
    )


def advice(
    stages: Mapping[str, float],
    seconds: float,
    config: TrainConfig,
    cores: int,
    on_gpu: bool = False,
    images_are_kept: bool = False,
) -> list[str]:
    """Returns one sentence per expensive stage, with what would make it faster. cores: CPU cores per process."""
    workers = config.workers or 0
    loading = (
        f"raise --workers (now {workers}; {cores} cores per process)" if workers < cores else "all cores are in use"
    )
    remedies = [
        *(["keep decoded images on disk with --image-cache GB if they fit"] if not images_are_kept else []),
        *(["apply color jitter and blur on the GPU with --device-views"] if on_gpu and not config.device_views else []),
        "store images no larger than training needs",
    ]
    sentences = {
        "data loading": f"waiting for data: {loading}; {'; '.join(remedies)}.",
        "communication": "communication and waiting for slower processes: raise --batch-size to communicate less often per pair.",
        "optimizer, teacher and queue updates": "weight updates: raise --batch-size to update less often per pair.",
        "encoder recompute (--micro-batch)": f"recomputing encoders: raise --micro-batch {config.micro_batch} as far as memory allows.",
    }
    expensive = [
        f"{stages[name] / seconds:.0%} of a step is {sentence}"
        for name, sentence in sentences.items()
        if stages.get(name, 0) > ADVICE_THRESHOLD * seconds
    ]
    return expensive or ["Nearly all of a step is spent in the encoders and their gradients, as it should be."]


def print_profile(profile: Profile, steps: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("stage", "ms", "share", title=f"Time per step, mean of {steps} steps", title_justify="left")
    for name, seconds in profile.stages.items():
        table.add_row(name, f"{1000 * seconds:,.1f}", f"{seconds / profile.seconds:.0%}")
    console.print(table)
    console.print(f"{profile.pairs_per_second:,.0f} pairs per second.")
    for line in profile.advice:
        console.print(line)
