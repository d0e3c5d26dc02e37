"""train(): trains a model, evaluates it on held-out pairs, and writes a report."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from rich.console import Console

from coalign.config import TrainConfig, fields_marked, flatten, to_json
from coalign.data.text.tokenizer import Tokenizer
from coalign.errors import UserError
from coalign.files import write_atomically, write_json
from coalign.method import Method
from coalign.methods import recipe
from coalign.networks.towers.spec import model_config
from coalign.runs.folder import (
    CONFIG,
    HELD_OUT,
    MODEL,
    REPORT,
    RESULTS,
    TOKENIZER,
    SavedConfig,
    describe_samples,
    read_config,
    read_results,
    write_config,
)
from coalign.runs.outcomes import item_hashes, write_outcomes
from coalign.runs.run import check_device
from coalign.training.checkpoint import RunLock
from coalign.training.distributed import World, join_world
from coalign.training.sharding import unsharded
from coalign.training.trainer import Trainer, TrainResult
from coalign.workflows.train.batches import TrainingData, pair_loader
from coalign.workflows.train.image_cache import RunImageCache
from coalign.workflows.train.preflight import open_and_check
from coalign.workflows.train.setup import (
    ConfigFn,
    add_workers,
    compile_towers,
    fingerprint,
    initial_method,
    resolve,
    shard_model,
)
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
        device: "cpu", "cuda" or "cuda:N". None: a GPU if there is one.
        dry_run: Only print the settings, the model, its cost and the first batch. Writes nothing.

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
    world = join_world(check_device(device))
    if not dry_run:
        _check_folder(out, resume)
    resumed = resume == "auto" and (out / CONFIG).exists()
    pairs, settings, tokenizer = open_and_check(data, config_for, console, world, out, resumed)
    workers_given, settings = settings.workers, resolve(settings, len(pairs.train), world, out if resumed else None)
    method = initial_method(settings, tokenizer, world)
    if dry_run:
        if world.is_first:
            from coalign.workflows.train.dry_run import print_dry_run

            print_dry_run(console, data, out, settings, method, tokenizer, pairs, world)
        return None
    shard_model(method, settings, world)
    tags, images = pairs.tag_ids(method.view_plan.tags), RunImageCache(settings, method, pairs, out, world)
    if workers_given is None and images.cache is None:
        settings = add_workers(settings, world)
    loader = pair_loader(
        method, settings, pairs.source, pairs.train, tokenizer, world, settings.batch_size, tags, images.cache
    )
    total_steps = max(1, round(settings.epochs * loader.steps_per_epoch))
    trainer = Trainer(
        method, settings, world, out,
        batches=loader.batches, num_pairs=len(pairs.train), total_steps=total_steps,
        interactive=world.is_first and sys.stdout.isatty(),
    )  # fmt: skip
    compile_towers(method, settings)
    saved = SavedConfig(data, settings, len(pairs.train), len(pairs.val), fingerprint(pairs))
    with _lock(out, world):
        trainer.validate = validation(method, settings, pairs, tokenizer, world, tags)
        _prepare_folder(out, saved, tokenizer, world)  # last, after all checks of the settings
        first_step = trainer.resume() if resume == "auto" else 0
        if world.is_first:
            console.print(_start_lines(settings, method, pairs, tags, total_steps, first_step, world))
            if images.description and first_step < total_steps:
                console.print(images.description)
        result = _fit(trainer, images, world)
        with unsharded(method):
            if world.is_first and result.ended == "interrupted":
                console.print(_interrupted_line(result, images.folder))
            elif world.is_first and result.step == first_step and _is_reported(out, first_step):
                console.print(f"The run is already complete. Report: {out / REPORT}")
            elif world.is_first:
                _finish(console, data, out, settings, method, tokenizer, pairs, result)
            world.barrier()
    return result


def _fit(trainer: Trainer, images: RunImageCache, world: World) -> TrainResult:
    """Trains, and removes the image cache afterwards unless the run was interrupted and can be resumed."""
    if trainer.progress.step == 0:
        images.remove()  # left by an abandoned run in the same folder
    world.barrier()
    try:
        result = trainer.fit()
        world.barrier()  # no process reads the cache after this
    except Exception:
        images.remove()
        raise
    if result.ended != "interrupted":
        images.remove()
    return result


# ---------------------------------------------------------------- preparation


def _config_fn(config: str | TrainConfig | ConfigFn) -> ConfigFn:
    if isinstance(config, str):
        return recipe(config)
    return config if callable(config) else lambda _: config


def _check_folder(out: Path, resume: str) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"The output {out} is a file; choose a folder with --out.")
    if resume == "no" and (out / CONFIG).exists():
        raise UserError(
            f"{out} already contains a run; resume it with --resume auto, or choose another folder with --out."
        )
    if not (out / CONFIG).exists() and out.is_dir() and any(out.glob("*.safetensors")):
        raise UserError(f"{out} contains other files; choose an empty folder with --out.")


def _lock(out: Path, world: World) -> RunLock | Any:
    return RunLock(out) if world.is_first else nullcontext()  # the lock also creates the folder


def _prepare_folder(out: Path, saved: SavedConfig, tokenizer: Tokenizer, world: World) -> None:
    """Writes tokenizer, model file and configuration of a new run. For a resumed run, raises UserError if settings or data differ."""
    is_new = not (out / CONFIG).exists()
    world.barrier()  # all ranks have checked before the first one writes
    if is_new:
        if world.is_first:
            write_atomically(out / TOKENIZER, tokenizer.save)
            if Path(saved.config.model).exists():  # a file or a folder, which may be deleted later
                write_json(out / MODEL, model_config(saved.config.model))
            write_config(out, saved)
        return
    original = read_config(out)
    old, new = (flatten(to_json(each.config)) for each in (original, saved))
    may_change = fields_marked(TrainConfig, "may_change_on_resume")
    changes = [
        f"{name} was {old.get(name)}, now {new.get(name)}"
        for name in {**old, **new}
        if name.partition(".")[0] not in may_change and old.get(name) != new.get(name)
    ]
    if original.num_train != saved.num_train:
        changes.append(f"the data had {original.num_train:,} training pairs, now {saved.num_train:,}")
    elif original.fingerprint and original.fingerprint != saved.fingerprint:
        changes.append(f"the data was {original.data}, and {saved.data} has different pairs")
    if changes:
        raise UserError(
            f"The run in {out} was started with different settings: {'; '.join(changes)}. Resume it with the original settings, "
            "or choose another folder with --out."
        )


# ---------------------------------------------------------------- printed lines and results


def _interrupted_line(result: TrainResult, image_cache: Path) -> str:
    kept = f" The decoded images are kept in {image_cache}." if image_cache.exists() else ""
    return f"Interrupted at step {result.step:,}; resume with --resume auto.{kept}"


def _start_lines(
    config: TrainConfig,
    method: Method,
    pairs: TrainingData,
    tags: Mapping[str, int],
    total_steps: int,
    first_step: int,
    world: World,
) -> str:
    millions = sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6
    start = (
        f"resuming at step {first_step:,} of {total_steps:,}"
        if first_step
        else f"{total_steps:,} steps, batch size {config.batch_size:,}"
    )
    run = (
        f"{config.method} with {config.model} ({millions:.1f} M parameters) on {describe_samples(config, len(pairs.train))}, "
        f"{len(pairs.val):,} held out; {start}, on {world.device}" + (f" × {world.size}" if world.size > 1 else "")
    )
    untagged = f"No training pair has tags, so the tag loss of {config.method} stays at 0; add a column or field of tags, or --no-j-tag."
    return "\n".join([*([untagged] if method.view_plan.tags and not tags else []), run])


def _finish(
    console: Console,
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    tokenizer: Tokenizer,
    pairs: TrainingData,
    result: TrainResult,
) -> None:
    # not at the top: it imports matplotlib, which would slow down the start of training
    from coalign.workflows.train.run_report import write_run_report

    results = evaluate_held_out(method, config, pairs, tokenizer, out.name)
    verdict, report = write_run_report(data, out, config, method, result, results, pairs)
    items = {
        task: item_hashes(held_out.source, evaluation.images.indices, evaluation.texts)
        for task, held_out in results.items()
        if (evaluation := held_out.result.evaluation)
    }
    write_outcomes(out, {task: held_out.result.metrics for task, held_out in results.items()}, items)
    tasks = {task: held_out.result.to_json() for task, held_out in results.items()}
    look_alikes = {each.split: each.look_alikes[0] for each in results.values() if each.look_alikes is not None}
    parameters = {role: sum(p.numel() for p in group) for role, group in method.parameter_groups().items()}
    values = {"run": asdict(result), "parameters": parameters, "tasks": tasks, "look_alikes_in_train": look_alikes}
    write_json(out / RESULTS, values, default=_plain)  # last: if it exists, the report is complete
    console.print(verdict)
    console.print(f"Report: {report}")


def _is_reported(out: Path, step: int) -> bool:
    """Returns whether the results and the report of the run after `step` steps are complete."""
    if not (out / HELD_OUT).exists():
        return False
    try:
        return bool(read_results(out)["run"]["step"] == step)
    except UserError:
        return False


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)
