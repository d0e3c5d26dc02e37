"""profile(): where the time of a training step goes, part by part, and what to do about it."""

from __future__ import annotations

import contextlib
import io
import os
import statistics
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.run import model as runs
from coalign.run.pairs import pair_loader
from coalign.run.prepare import (
    Settle,
    compile_towers,
    divide,
    open_data,
    run_tokenizer,
    settle_workers,
    starting_method,
)
from coalign.training.distributed import join_world
from coalign.training.stopwatch import Stopwatch
from coalign.training.trainer import Trainer

UNCOUNTED = 3  # steps at the start, in which libraries and loaders warm up
MUCH = 0.15  # of a step, from which on a part is worth a word


@dataclass(frozen=True)
class Profile:
    """The means over the counted steps, on the first rank."""

    seconds: float  # of a step
    parts: Mapping[str, float]  # seconds of each, the longest first
    pairs_per_second: float
    advice: list[str]


def profile(data: str, settle: Settle, *, steps: int = 20, device: str | None = None) -> Profile:
    """Trains for some steps as `train` would, and forgets what was learnt. Under torchrun every process calls it."""
    if steps < 1:
        raise UserError(f"--steps is {steps}, but must be at least 1.")
    world = join_world(runs.known_device(device))
    pairs, config = open_data(data, settle, world)
    config = replace(settle_workers(config, world), evals=0)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = run_tokenizer(config, pairs, Path(folder))
        method = starting_method(config, tokenizer, world)
        divide(method, config, world)
        tags = pairs.tag_ids(method.view_plan.tags)
        loader = pair_loader(
            method,
            config,
            pairs.source,
            pairs.train,
            tokenizer,
            world,
            config.batch_size,
            tags,
            Path(folder) / "images",
        )
        trainer = Trainer(
            method, config, world, Path(folder),
            batches=loader.batches, num_pairs=len(pairs.train), total_steps=UNCOUNTED + steps, saves=False,
        )  # fmt: skip
        compile_towers(method, config)
        silence = contextlib.redirect_stdout(io.StringIO())  # of a run's progress
        with Stopwatch(world.device) as watch, silence:
            ended = trainer.fit().ended
    if ended == "interrupted":
        raise KeyboardInterrupt
    cores = max(1, (os.cpu_count() or 1) // world.size)
    counted = watch.steps[UNCOUNTED:]
    names = {name for step in counted for name in step}
    parts = {name: statistics.fmean(step.get(name, 0.0) for step in counted) for name in names}
    seconds = statistics.fmean(sum(step.values()) for step in counted)
    ordered = dict(sorted(parts.items(), key=lambda item: -item[1]))
    on_gpu = world.device.type != "cpu"
    return Profile(seconds, ordered, config.batch_size / seconds, advice(ordered, seconds, config, cores, on_gpu))


def advice(
    parts: Mapping[str, float], seconds: float, config: TrainConfig, cores: int, on_gpu: bool = False
) -> list[str]:
    """What a step loses most to, and what helps. `cores`: of this machine, for each process."""
    workers = config.workers or 0
    loading = f"raise --workers {workers} ({cores} cores a process)" if workers < cores else "all cores load already"
    relief = [
        *(["--image-cache GB keeps decoded images, where they fit"] if not config.image_cache else []),
        *(["--device-views makes colours and blur on the GPU"] if on_gpu and not config.device_views else []),
        "keep images no larger than training needs",
    ]
    remedies = {
        "waiting for data": f"waits for data: {loading}; {'; '.join(relief)}.",
        "communication": "is communication, or waits for a slower process: a larger --batch-size computes more for it.",
        "optimiser, teachers and queues": "updates weights: a larger --batch-size does so more rarely.",
        "encoders once more, for --micro-batch": f"saves memory: raise --micro-batch {config.micro_batch} as far as it goes.",
    }
    found = [
        f"{parts[name] / seconds:.0%} of a step {remedy}"
        for name, remedy in remedies.items()
        if parts.get(name, 0) > MUCH * seconds
    ]
    return found or ["Encoders and their gradients take nearly all of a step, as they should."]


def print_profile(profile: Profile, steps: int) -> None:
    console = Console(highlight=False, soft_wrap=True)
    table = Table("part of a step", "ms", "share", title=f"Means over {steps} steps", title_justify="left")
    for name, seconds in profile.parts.items():
        table.add_row(name, f"{1000 * seconds:,.1f}", f"{seconds / profile.seconds:.0%}")
    console.print(table)
    console.print(f"{profile.pairs_per_second:,.0f} pairs a second.")
    for line in profile.advice:
        console.print(line)
