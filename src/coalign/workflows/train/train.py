"""train(): trains a model, evaluates it on held-out pairs, and writes a report."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from coalign.config import NOMINAL_PAIRS, TrainConfig
from coalign.data.images import evaluation_view
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import UserError
from coalign.files import write_json
from coalign.method import Method
from coalign.methods import recipe
from coalign.networks.tuning import Tuning
from coalign.runs.folder import (
    CONFIG,
    HELD_OUT,
    REPORT,
    RESULTS,
    TRACKED,
    SavedConfig,
    describe_model,
    describe_samples,
    read_results,
)
from coalign.runs.outcomes import item_hashes, write_outcomes
from coalign.training import checkpoint
from coalign.training.distributed import World, join_world
from coalign.training.sharding import unsharded
from coalign.training.trainer import Trainer, TrainResult
from coalign.workflows.train.batches import TrainingData, pair_loader
from coalign.workflows.train.caches.features import RunFeatures
from coalign.workflows.train.caches.images import RunImageCache
from coalign.workflows.train.preflight import open_and_check
from coalign.workflows.train.resume import check_folder, extension_lines, prepare_folder
from coalign.workflows.train.setup import (
    ConfigFn,
    compile_towers,
    fingerprint,
    initial_method,
    num_steps,
    resolve,
    resolve_workers,
    shard_model,
    step_threads,
)
from coalign.workflows.train.start import Tracking, check_track, save_start
from coalign.workflows.train.validation import evaluate_held_out, validation


def train(
    data: str,
    out: str | Path,
    config: str | TrainConfig | ConfigFn = "clip",
    *,
    resume: Literal["no", "auto"] = "no",
    device: str | None = None,
    dry_run: bool = False,
) -> TrainResult | None:
    """Trains a model, evaluates it on held-out pairs, and writes a report.

    The folder `out` receives the checkpoints (`last/`, `best/`), `metrics.jsonl`, `results.json` and `report.html`. Ctrl-C saves a
    checkpoint and stops. Under `torchrun`, call this function in every process.

    Args:
        data: The training data, as in `open_data`. Without a validation split of its own, `config.val_fraction` of it is held out.
        out: The folder of the run. It is created, and must not contain a run unless `resume` is "auto".
        config: The name of a recipe; a function from the number of training pairs to a `TrainConfig`, such as `recipe` returns; or a
            `TrainConfig`.
        resume: "auto" resumes from the newest checkpoint in `out`, or starts if there is none. "no" always starts.
        device: "cpu", "cuda", "cuda:N" or "mps". None: the best there is.
        dry_run: Only print the settings, the model, its cost and the first batch. Writes nothing but `first_batch.png`.

    Returns:
        How the training ended, or None for a dry run. The metrics are in `results.json` and the report.

    Raises:
        UserError: A setting is invalid, the data cannot be used, or `out` contains another run.

    Example:
        ```python
        coalign.train("photos", "runs/clip")
        coalign.train("photos", "runs/mcd", "mcd", resume="auto")
        ```
    """
    config_for = _config_fn(config)
    console, out = Console(highlight=False, soft_wrap=True, markup=False, emoji=False), Path(out)
    world = join_world(device)
    check_track(config_for(NOMINAL_PAIRS))
    if not dry_run:
        check_folder(out, resume)
    resumed = resume == "auto" and (out / CONFIG).exists()
    pairs, settings, tokenizer = open_and_check(data, config_for, console, world, out, resumed)
    settings = resolve(settings, len(pairs.train), world, out if resumed else None)
    method, tuning = initial_method(settings, tokenizer, world, out if checkpoint.exists(out) else None)
    features = RunFeatures(method, settings, tokenizer, out, world)
    images = RunImageCache(settings, method, pairs, out, world, once="image" in features.towers)
    settings = resolve_workers(settings, len(pairs.train), world, images.decodes_once)
    tracking = Tracking(data, out, settings, method, tokenizer, world)
    if dry_run:
        _dry_run(world, console, data, out, settings, method, tuning, tokenizer, pairs, world, features)
        return None
    shard_model(method, settings, world)
    tags = pairs.tag_ids(method.view_plan.tags)
    cached = features.views("train", pairs.source, pairs.train, tags)
    loader = pair_loader(
        method, settings, pairs.source, pairs.train, tokenizer, world, settings.batch_size, tags, images.cache, cached
    )
    trainer = Trainer(
        method, settings, world, out,
        batches=loader.batches, num_pairs=len(pairs.train), total_steps=num_steps(settings, len(pairs.train)),
        interactive=world.is_first and sys.stdout.isatty(),
        tuning=tuning, head_steps=round(settings.head_epochs * loader.steps_per_epoch),
    )  # fmt: skip
    compile_towers(method, settings)
    saved = SavedConfig(data, settings, len(pairs.train), len(pairs.val), fingerprint(pairs))
    with _lock(out, world):
        trainer.validate = validation(method, settings, pairs, tokenizer, world, tags, features, images)
        epochs_before = prepare_folder(out, saved, tokenizer, world)  # last, after all checks of the settings
        first_step = trainer.resume() if resume == "auto" else 0
        if not first_step:
            save_start(out, method, settings, world)
        lines = [] if epochs_before is None else extension_lines(trainer, epochs_before, len(pairs.train))
        _print(console, world, [*lines, *_start_lines(trainer, tuning, pairs, tags, images)])
        _print(console, world, tracking.evaluate_start(first_step))
        result = _fit(trainer, images, features, console)
        if result.ended == "interrupted":
            lines = [_interrupted_line(result, images.folder, features.folder)]
        elif result.step == first_step and world.broadcast(_is_reported(out, first_step)):
            lines = [f"The run is already complete. Report: {out / REPORT}"]
        else:
            lines = _finish(data, out, settings, method, tuning, tokenizer, pairs, result, tracking)
        _print(console, world, lines)
        world.barrier()
    return result


def _dry_run(world: World, *described: Any) -> None:
    """Prints what `print_dry_run` describes, from the first process."""
    from coalign.workflows.train.dry_run import print_dry_run

    if world.is_first:
        print_dry_run(*described)


def _fit(trainer: Trainer, images: RunImageCache, features: RunFeatures, console: Console) -> TrainResult:
    """Trains, and removes the caches afterwards unless the run was interrupted and can be resumed."""
    world = trainer.world
    if trainer.progress.step == 0:
        images.remove()  # left by an abandoned run in the same folder
    world.barrier()
    if trainer.progress.step < trainer.total_steps:
        features.compute(console, trainer.config.workers or 0)
    try:
        with step_threads(trainer.method, trainer.config, world):
            result = trainer.fit()
        world.barrier()  # no process reads the cache after this
    except Exception:
        images.remove()
        raise
    if result.ended != "interrupted":
        images.remove()
        features.remove()
    return result


# ---------------------------------------------------------------- preparation


def _config_fn(config: str | TrainConfig | ConfigFn) -> ConfigFn:
    if isinstance(config, str):
        return recipe(config)
    return config if callable(config) else lambda _: config


def _lock(out: Path, world: World) -> checkpoint.RunLock | Any:
    return checkpoint.RunLock(out) if world.is_first else nullcontext()  # the lock also creates the folder


# ---------------------------------------------------------------- printed lines and results


def _interrupted_line(result: TrainResult, image_cache: Path, features: Path) -> str:
    kept = f" The decoded images are kept in {image_cache}." if image_cache.exists() else ""
    kept += f" The features of the locked towers are kept in {features}." if features.exists() else ""
    return f"Interrupted at step {result.step:,}; resume with --resume auto.{kept}"


def _print(console: Console, world: World, lines: Sequence[str]) -> None:
    if world.is_first and lines:
        console.print("\n".join(lines))


def _start_lines(
    trainer: Trainer, tuning: Tuning, pairs: TrainingData, tags: Mapping[str, int], images: RunImageCache
) -> list[str]:
    config, method, world = trainer.config, trainer.method, trainer.world
    first_step, total_steps = trainer.progress.step, trainer.total_steps
    millions, frozen = sum(tuning.num_trained().values()) / 1e6, sum(tuning.num_frozen().values()) / 1e6
    parameters = f"{millions:.1f} M parameters" + (f", {frozen:.1f} M more frozen" if frozen else "")
    start = (
        f"resuming at step {first_step:,} of {total_steps:,}"
        if first_step
        else f"{total_steps:,} steps, batch size {config.batch_size:,}"
    )
    run = (
        f"{config.method} with {describe_model(config)} ({parameters}) on {describe_samples(config, len(pairs.train))}, "
        f"{len(pairs.val):,} held out; {start}, on {world.device}" + (f" × {world.size}" if world.size > 1 else "")
    )
    untagged = f"No training pair has tags, so the tag loss of {config.method} stays at 0; add a column or field of tags, or --no-j-tag."
    kept = [images.description] if images.description and first_step < total_steps else []
    warnings = [] if first_step else list(filter(None, [tuning.warning()]))
    return [*([untagged] if method.view_plan.tags and not tags else []), *warnings, run, *kept]


def _finish(
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    tuning: Tuning,
    tokenizer: Tokenizer,
    pairs: TrainingData,
    result: TrainResult,
    tracking: Tracking,
) -> list[str]:
    """Evaluates the result, and writes results and report. All processes call it. Returns what to print."""
    # not at the top: it imports matplotlib, which would slow down the start of training
    from coalign.workflows.train.run_report import write_run_report

    tracked = tracking.evaluate_end()
    with unsharded(method):
        if not tracking.world.is_first:
            return []
        results = evaluate_held_out(method, config, pairs, tokenizer, out.name)
        verdict, report = write_run_report(data, out, config, method, tuning, result, results, pairs, tracked)
    items = {
        task: item_hashes(held_out.source, evaluation.images.indices, evaluation.texts)
        for task, held_out in results.items()
        if (evaluation := held_out.result.evaluation)
    }
    metrics = {task: held_out.result.metrics for task, held_out in results.items()}
    for number, task in enumerate(tracked.values):
        metrics[f"{TRACKED}{number}"], items[f"{TRACKED}{number}"] = tracked.end.metrics[task], tracked.end.items[task]
    write_outcomes(out, metrics, items)
    tasks = {task: held_out.result.to_json() for task, held_out in results.items()}
    look_alikes = {each.split: each.look_alikes[0] for each in results.values() if each.look_alikes is not None}
    values = {
        "run": asdict(result),
        "parameters": tuning.num_trained(),
        "frozen_parameters": tuning.num_frozen(),
        "tasks": tasks,
        "look_alikes_in_train": look_alikes,
        "evaluation_view": evaluation_view.VERSION,
        **({"tracked": tracked.values} if tracked.values else {}),
    }
    write_json(out / RESULTS, values, default=_plain)  # last: if it exists, the report is complete
    return [verdict, *tracked.lines(), f"Report: {report}"]


def _is_reported(out: Path, step: int) -> bool:
    """Returns whether the results and the report of the run after `step` steps are complete, and evaluated on today's pixels."""
    if not (out / HELD_OUT).exists():
        return False
    try:
        results = read_results(out)
        return bool(results["run"]["step"] == step and results.get("evaluation_view") == evaluation_view.VERSION)
    except UserError:
        return False


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)
