"""train(): from data and a configuration to a trained, evaluated and reported model."""

from __future__ import annotations

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from shutil import rmtree
from typing import Any, Literal

from rich.console import Console

from coalign.config import TrainConfig, flatten, to_json
from coalign.data.tokenizer import Tokenizer
from coalign.errors import UserError
from coalign.method import Method
from coalign.networks.towers import model_config
from coalign.recipes import recipe
from coalign.run import model as runs
from coalign.run.held_out import evaluate_held_out, validation
from coalign.run.outcomes import write_outcomes
from coalign.run.pairs import Data, image_folder, pair_loader
from coalign.run.prepare import (
    Settle,
    compile_towers,
    divide,
    fingerprint,
    open_data,
    run_tokenizer,
    settle_workers,
    starting_method,
)
from coalign.training.checkpoint import RunLock
from coalign.training.distributed import World, join_world
from coalign.training.sharding import whole
from coalign.training.trainer import Trainer, TrainResult

# what may differ when a run is resumed: it changes nothing that the run computes
FREE_TO_CHANGE = {
    "workers",
    "image_cache",
    "save_every",
    "patience",
    "max_bad_fraction",
    "max_non_finite",
    "micro_batch",
    "shard",
    "evals",
    "probe",
}


def train(
    data: str,
    out: str | Path,
    config: str | TrainConfig | Settle = "clip",
    *,
    resume: Literal["no", "auto"] = "no",
    device: str | None = None,
    dry_run: bool = False,
) -> TrainResult | None:
    """Trains in the folder `out` and leaves there: config.json, tokenizer.json, last/ and best/ (checkpoints), metrics.jsonl,
    bad_samples.jsonl, results.json, report.html.

    config: a recipe's name, a configuration, or a function from the number of training pairs to one. Under torchrun every process calls
    it. With `dry_run`, prints what would happen and returns None.
    """
    settle: Settle = recipe(config) if isinstance(config, str) else config if callable(config) else lambda _: config
    console = Console(highlight=False, soft_wrap=True)
    out = Path(out)
    world = join_world(runs.known_device(device))
    if not dry_run:
        _check_folder(out, resume)
    pairs, settings = open_data(data, settle, world)
    settings = settle_workers(settings, world)
    tokenizer = run_tokenizer(settings, pairs, out)
    method = starting_method(settings, tokenizer, world)
    if dry_run:
        if world.is_first:
            from coalign.run.dry_run import describe

            describe(console, data, out, settings, method, tokenizer, pairs, world)
        return None
    divide(method, settings, world)
    tags, images = pairs.tag_ids(method.view_plan.tags), image_folder(out, pairs.source)
    loader = pair_loader(
        method, settings, pairs.source, pairs.train, tokenizer, world, settings.batch_size, tags, images
    )
    total_steps = max(1, round(settings.epochs * loader.steps_per_epoch))
    trainer = Trainer(
        method, settings, world, out,
        batches=loader.batches, num_pairs=len(pairs.train), total_steps=total_steps,
        interactive=world.is_first and sys.stdout.isatty(),
    )  # fmt: skip
    compile_towers(method, settings)
    saved = runs.SavedConfig(data, settings, len(pairs.train), len(pairs.val), fingerprint(pairs))
    with _lock(out, world):
        trainer.validate = validation(method, settings, pairs, tokenizer, world, tags)
        _prepare_folder(out, saved, tokenizer, world)  # once nothing in the settings can be wrong any more
        done = trainer.resume() if resume == "auto" else 0
        if world.is_first:
            console.print(_opening_line(settings, method, pairs, total_steps, done, world))
        result = _fit(trainer, images, world)
        with whole(method):
            if world.is_first and result.ended == "interrupted":
                console.print(_stopping_line(result, images))
            elif world.is_first and result.step == done and _reported(out, done):
                console.print(f"The run was complete already. Report: {out / runs.REPORT}")
            elif world.is_first:
                _finish(console, data, out, settings, method, tokenizer, pairs, result)
            world.barrier()
    return result


def _fit(trainer: Trainer, images: Path, world: World) -> TrainResult:
    """Trains. The decoded images of a run that was stopped stay for when it goes on."""
    if trainer.progress.step == 0:
        rmtree(images, ignore_errors=True)  # what a run of this name left that was given up
    world.barrier()
    try:
        result = trainer.fit()
        world.barrier()  # nobody reads them any more
    except Exception:
        rmtree(images, ignore_errors=True)
        raise
    if result.ended != "interrupted":
        rmtree(images, ignore_errors=True)
    return result


# ---------------------------------------------------------------- preparation


def _check_folder(out: Path, resume: str) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"The output {out} is a file; give a folder with --out.")
    if resume == "no" and (out / runs.CONFIG).exists():
        raise UserError(
            f"{out} already holds a run; go on with it by --resume auto, or choose another folder with --out."
        )
    if not (out / runs.CONFIG).exists() and out.is_dir() and any(out.glob("*.safetensors")):
        raise UserError(f"{out} holds other files; choose an empty folder with --out.")


def _lock(out: Path, world: World) -> RunLock | Any:
    return RunLock(out) if world.is_first else nullcontext()  # it makes the folder, too


def _prepare_folder(out: Path, saved: runs.SavedConfig, tokenizer: Tokenizer, world: World) -> None:
    """Writes the configuration; for a resumed run, makes sure that it is the same one."""
    is_new = not (out / runs.CONFIG).exists()
    world.barrier()  # everyone has looked before the first writes
    if is_new:
        if world.is_first:
            runs.write_file(out / runs.TOKENIZER, tokenizer.save)
            if Path(saved.config.model).exists():  # a file or a folder, which may go
                text = json.dumps(model_config(saved.config.model), indent=2) + "\n"
                runs.write_file(out / runs.MODEL, lambda path: path.write_text(text))
            runs.write_config(out, saved)
        return
    earlier = runs.read_config(out)
    was, now = (flatten(to_json(each.config)) for each in (earlier, saved))
    changed = [
        f"{name} was {was.get(name)} and is {now.get(name)}"
        for name in {**was, **now}
        if name not in FREE_TO_CHANGE and was.get(name) != now.get(name)
    ]
    if earlier.num_train != saved.num_train:
        changed.append(f"the data had {earlier.num_train:,} training pairs and has {saved.num_train:,}")
    elif earlier.fingerprint and earlier.fingerprint != saved.fingerprint:
        changed.append(f"the data was {earlier.data} and {saved.data} holds other pairs")
    if changed:
        raise UserError(
            f"The run in {out} was started otherwise: {'; '.join(changed)}. Resume it as it was, or choose another --out."
        )


# ---------------------------------------------------------------- the end


def _stopping_line(result: TrainResult, images: Path) -> str:
    kept = f" Decoded images wait for it in {images}." if images.exists() else ""
    return f"Stopped at step {result.step:,}; go on with --resume auto.{kept}"


def _opening_line(config: TrainConfig, method: Method, pairs: Data, total_steps: int, done: int, world: World) -> str:
    millions = sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6
    start = (
        f"going on at step {done:,} of {total_steps:,}"
        if done
        else f"{total_steps:,} steps of {config.batch_size} pairs"
    )
    return (
        f"{config.method} with {config.model} ({millions:.1f} M parameters) on {runs.trained_on(config, len(pairs.train))}, "
        f"{len(pairs.val):,} held out; {start}, on {world.device}" + (f" × {world.size}" if world.size > 1 else "")
    )


def _finish(
    console: Console,
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    tokenizer: Tokenizer,
    pairs: Data,
    result: TrainResult,
) -> None:
    # not at the top: it loads the plotting library, which training can start without
    from coalign.run.reporting import write_run_report

    evaluations = evaluate_held_out(method, config, pairs, tokenizer, out.name)
    verdict, report = write_run_report(
        data, out, config, method, pairs.val_source, result, evaluations, len(pairs.train)
    )
    write_outcomes(out, pairs, evaluations)
    results = {name: evaluation.result.to_json() for name, evaluation in evaluations.items()}
    parameters = {role: sum(p.numel() for p in group) for role, group in method.parameter_groups().items()}
    values = {"run": asdict(result), "parameters": parameters, **results}
    text = json.dumps(values, indent=2, default=_plain) + "\n"
    runs.write_file(out / runs.RESULTS, lambda path: path.write_text(text))  # last: it vouches for the report
    console.print(verdict)
    console.print(f"Report: {report}")


def _reported(out: Path, step: int) -> bool:
    """Whether the results and the report of the run as it is after `step` are there."""
    if not (out / runs.HELD_OUT).exists():
        return False
    try:
        return bool(json.loads((out / runs.RESULTS).read_text())["run"]["step"] == step)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _plain(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else str(value)
