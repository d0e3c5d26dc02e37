"""train(): from data and a configuration to a trained, evaluated and reported model."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from coalign.config import TrainConfig, flatten, to_json
from coalign.data.randomness import stable_hash
from coalign.data.sources import open_source
from coalign.data.splits import assign_splits, nested_share
from coalign.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from coalign.errors import BadSample, UserError
from coalign.method import Method
from coalign.networks.batch_norm import GroupedBatchNorm2d
from coalign.networks.towers import ImageTower, model_config
from coalign.recipes import recipe
from coalign.run import model as runs
from coalign.run.held_out import evaluate_held_out, validation
from coalign.run.outcomes import write_outcomes
from coalign.run.pairs import MAX_READ, Data, pair_loader
from coalign.training.checkpoint import RunLock
from coalign.training.distributed import World, join_world
from coalign.training.trainer import Trainer, TrainResult
from coalign.types import Source

# what may differ when a run is resumed: it changes nothing that the run computes
FREE_TO_CHANGE = {
    "workers",
    "save_every",
    "patience",
    "max_bad_fraction",
    "max_non_finite",
    "micro_batch",
    "evals",
    "probe",
}

Settle = Callable[[int], TrainConfig]  # number of training pairs -> configuration


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
    pairs, settings = _open_data(data, settle, world)
    settings = _settle_workers(settings, world)
    tokenizer = _tokenizer(settings, pairs, out)
    method = _method(settings, tokenizer, world)
    if dry_run:
        if world.is_first:
            from coalign.run.dry_run import describe

            describe(console, data, out, settings, method, tokenizer, pairs, world)
        return None
    tags = pairs.tag_ids(method.view_plan.tags)
    loader = pair_loader(method, settings, pairs.source, pairs.train, tokenizer, world, settings.batch_size, tags)
    total_steps = max(1, round(settings.epochs * loader.steps_per_epoch))
    trainer = Trainer(
        method, settings, world, out,
        batches=loader.batches, num_pairs=len(pairs.train), total_steps=total_steps,
        interactive=world.is_first and sys.stdout.isatty(),
    )  # fmt: skip
    if settings.compile:
        for tower in (module for module in method.modules() if isinstance(module, ImageTower)):
            tower.compile()  # a text tower packs its captions: another shape at every step
    saved = runs.SavedConfig(data, settings, len(pairs.train), len(pairs.val), _fingerprint(pairs))
    with _lock(out, world):
        trainer.validate = validation(method, settings, pairs, tokenizer, world, tags)
        _prepare_folder(out, saved, tokenizer, world)  # once nothing in the settings can be wrong any more
        done = trainer.resume() if resume == "auto" else 0
        if world.is_first:
            console.print(_opening_line(settings, method, pairs, total_steps, done, world))
        result = trainer.fit()
        if world.is_first and result.ended == "interrupted":
            console.print(f"Stopped at step {result.step:,}; go on with --resume auto.")
        elif world.is_first and result.step == done and _reported(out, done):
            console.print(f"The run was complete already. Report: {out / runs.REPORT}")
        elif world.is_first:
            _finish(console, data, out, settings, method, tokenizer, pairs, result)
    world.barrier()
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


def _open_data(data: str, settle: Settle, world: World) -> tuple[Data, TrainConfig]:
    """The pairs, and the configuration settled for their number."""
    first = settle(10_000)  # the split needs no more than its fraction
    _check_settings(first)
    if not world.is_first:
        world.barrier()  # the first rank builds indexes and caches, the others find them
    source = open_source(data)
    if first.val_data:
        val_source = open_source(first.val_data)
        val = (getattr(val_source, "splits", None) or {}).get("val", np.arange(len(val_source)))
        pairs = Data(source, _splits(data, source, 0.0)["train"], val_source, val)
    else:
        splits = _splits(data, source, first.val_fraction)
        pairs = Data(source, splits["train"], source, splits["val"])
    if world.is_first:
        world.barrier()
    pairs.train = nested_share(pairs.train, first.train_fraction)
    return pairs, settle(len(pairs.train))


def _splits(data: str, source: Source, val_fraction: float) -> dict[str, np.ndarray]:
    splits = dict(assign_splits(source, val_fraction)[0])
    if "train" not in splits:
        raise UserError(f"{data} has nothing to train on: it is all {' and '.join(splits)}; name the training data.")
    return {"val": np.arange(0), **splits}


def _check_settings(config: TrainConfig) -> None:
    """UserError for a number that makes no sense; the optimiser checks its own."""
    if config.probe and not config.classes:
        raise UserError("--probe needs classes to tell apart; give them with --classes FILE.")
    demands = {
        "epochs": (config.epochs > 0, "more than 0"),
        "context_length": (config.context_length >= 3, "at least 3: start, a token and end"),
        "image_size": (config.image_size is None or config.image_size >= 1, "at least 1"),
        "micro_batch": (config.micro_batch is None or config.micro_batch >= 1, "at least 1"),
        "batch_norm_group": (config.batch_norm_group >= 1, "at least 1"),
        "max_grad_norm": (config.max_grad_norm is None or config.max_grad_norm > 0, "more than 0"),
        "workers": (config.workers is None or config.workers >= 0, "at least 0"),
        "val_fraction": (0 <= config.val_fraction < 1, "at least 0 and less than 1"),
        "train_fraction": (0 < config.train_fraction <= 1, "more than 0 and at most 1"),
        "evals": (config.evals >= 0, "at least 0"),
        "patience": (config.patience is None or config.patience >= 1, "at least 1"),
        "save_every": (config.save_every is None or config.save_every >= 1, "at least 1"),
        "max_bad_fraction": (0 <= config.max_bad_fraction <= 1, "between 0 and 1"),
        "max_non_finite": (config.max_non_finite >= 1, "at least 1"),
    }
    for name, (holds, what) in demands.items():
        if not holds:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(config, name)}, but must be {what}.")


def _method(config: TrainConfig, tokenizer: Tokenizer, world: World) -> Method:
    """The method as training starts with it, on its device."""
    method = runs.build_method(config, tokenizer)
    if config.init_from:
        runs.initialise(method, config)
    _check_batch_norm(method, config, world)
    return method.to(world.device).to(memory_format=torch.channels_last)


def _check_batch_norm(method: Method, config: TrainConfig, world: World) -> None:
    """The groups of the trunk's BatchNorm must divide a process's share of the batch, and what it holds at once."""
    local = config.batch_size // world.size
    for group in {module.group for module in method.modules() if isinstance(module, GroupedBatchNorm2d)}:
        for held, what in ((local, "a process's share of the batch"), (config.micro_batch or group, "--micro-batch")):
            if held % group:
                raise UserError(
                    f"{config.model} has BatchNorm over groups of {group} samples, of which {what}, {held}, is no multiple; "
                    "change it or --batch-norm-group."
                )


def _settle_workers(config: TrainConfig, world: World) -> TrainConfig:
    if config.workers is not None:
        return config
    return replace(config, workers=max(1, min(8, (os.cpu_count() or 1) // world.size)))


def _tokenizer(config: TrainConfig, pairs: Data, out: Path) -> Tokenizer:
    """The run's own when it is resumed; else as configured. Trained on the training captions, it is the same on every rank."""
    if (out / runs.TOKENIZER).exists():
        return load_tokenizer(out / runs.TOKENIZER)
    if config.init_from:
        runs.read_config(config.init_from)  # says what is wrong with the folder
        return load_tokenizer(config.init_from / runs.TOKENIZER)
    if config.tokenizer != "captions":
        return load_tokenizer(config.tokenizer)
    return train_bpe(_captions(pairs.source, pairs.train), runs.default_tokens(config.model))


def _captions(source: Source, indices: np.ndarray) -> Iterator[str]:
    for index in indices[:MAX_READ].tolist():
        try:
            yield from source.record(index).captions
        except BadSample:
            continue  # counted when training meets it


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


def _fingerprint(pairs: Data) -> str:
    """Of the names and captions of some training pairs: the same wherever the data lie."""
    seen: list[Any] = []
    for index in pairs.train[np.linspace(0, len(pairs.train) - 1, 64).astype(int)].tolist():
        try:
            record = pairs.source.record(index)
            seen.append((record.key, record.captions))
        except BadSample as bad:
            seen.append(bad.reason)
    return f"{stable_hash(*seen):016x}"


# ---------------------------------------------------------------- the end


def _opening_line(config: TrainConfig, method: Method, pairs: Data, total_steps: int, done: int, world: World) -> str:
    millions = sum(p.numel() for p in method.parameters() if p.requires_grad) / 1e6
    start = (
        f"going on at step {done:,} of {total_steps:,}"
        if done
        else f"{total_steps:,} steps of {config.batch_size} pairs"
    )
    return (
        f"{config.method} with {config.model} ({millions:.1f} M parameters) on {len(pairs.train):,} pairs, {len(pairs.val):,} held out; "
        f"{start}, on {world.device}" + (f" × {world.size}" if world.size > 1 else "")
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
    write_outcomes(out, pairs.val_source, evaluations)
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
