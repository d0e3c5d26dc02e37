"""What training starts from: the pairs and their split, settings that make sense, the tokenizer, and the method on its device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from coalign import __version__
from coalign.config import TrainConfig, flatten, to_json
from coalign.data.mixture import Mixture
from coalign.data.randomness import stable_hash
from coalign.data.sources import open_source
from coalign.data.splits import assign_splits, nested_share
from coalign.data.texts_alone import TextsAlone
from coalign.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from coalign.errors import BadSample, UserError
from coalign.method import Method
from coalign.networks.batch_norm import GroupedBatchNorm2d
from coalign.networks.towers import ImageTower
from coalign.run import model as runs
from coalign.run.pairs import MAX_READ, Data
from coalign.training.distributed import World
from coalign.training.sharding import shard
from coalign.types import Source

Settle = Callable[[int], TrainConfig]  # number of training pairs -> configuration


def open_data(data: str, settle: Settle, world: World) -> tuple[Data, TrainConfig]:
    """The pairs, and the configuration settled for their number."""
    first = settle(10_000)  # the split needs no more than its fraction
    check_settings(first)
    pairs = _first_then_others(world, lambda: _pairs(data, first))
    config = settle(len(pairs.train))
    _check_agreement(config, pairs, world)
    return pairs, config


def _pairs(data: str, config: TrainConfig) -> Data:
    source = open_source(data)
    if config.val_data:
        val_source = open_source(config.val_data)
        val = (getattr(val_source, "splits", None) or {}).get("val", np.arange(len(val_source)))
        pairs = Data(source, _splits(data, source, 0.0, None)["train"], val_source, val)
    else:
        splits = _splits(data, source, config.val_fraction, config.val_by)
        pairs = Data(source, splits["train"], source, splits["val"])
    pairs.tests = _test_splits(data, source, config.test_splits)
    parts = [nested_share(pairs.train, config.train_fraction)]
    if config.rest_as_texts:
        texts = TextsAlone(source, pairs.train, parts[0])
        parts.append(pairs.train[texts.is_text[pairs.train]])
        pairs.source = texts
    if isinstance(source, Mixture):
        parts = [source.weighted(part) for part in parts]
    pairs.train = parts[0] if len(parts) == 1 else np.concatenate(parts)  # no second copy of a hundred million
    return pairs


def _first_then_others(world: World, work: Callable[[], Data]) -> Data:
    """`work` on the first rank, which leaves indexes and caches, then on the others, which find them. What one cannot do all say."""
    found, failure = None, None
    for first in (True, False):
        if world.is_first == first:
            try:
                found = work()
            except UserError as error:
                failure = str(error)
        for rank, said in enumerate(world.gather_objects(failure)):
            if said is not None:
                raise UserError(said if world.size == 1 else f"Process {rank} of {world.size}: {said}")
    assert found is not None
    return found


def _check_agreement(config: TrainConfig, pairs: Data, world: World) -> None:
    """UserError on every rank where one has other code, settings or data than the first."""
    if world.size == 1:
        return
    facts = {"coalign": __version__, "the data": fingerprint(pairs), "training pairs": len(pairs.train)}
    first, *others = world.gather_objects({**facts, **flatten(to_json(config))})
    for rank, other in enumerate(others, 1):
        if differing := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            name = differing[0]
            raise UserError(
                f"Process {rank} of {world.size} differs from the first in {', '.join(differing)} ({name}: {other.get(name)}, not "
                f"{first.get(name)}); start all with the same code, options and data."
            )


def fingerprint(pairs: Data) -> str:
    """Of the names and captions of some training pairs: the same wherever the data lie."""
    seen: list[Any] = []
    for index in pairs.train[np.linspace(0, len(pairs.train) - 1, 64).astype(int)].tolist():
        try:
            record = pairs.source.record(index)
            seen.append((record.key, record.captions))
        except BadSample as bad:
            seen.append(bad.reason)
    return f"{stable_hash(*seen):016x}"


def _splits(data: str, source: Source, val_fraction: float, val_by: str | None) -> dict[str, np.ndarray]:
    splits = dict(assign_splits(source, val_fraction, by=val_by)[0])
    if "train" not in splits:
        raise UserError(f"{data} has nothing to train on: it is all {' and '.join(splits)}; name the training data.")
    return {"val": np.arange(0), **splits}


def _test_splits(data: str, source: Source, names: Sequence[str]) -> dict[str, np.ndarray]:
    own: dict[str, np.ndarray] = getattr(source, "splits", None) or {}
    for name in names:
        if name in ("train", "val") or len(own.get(name, ())) < 2:
            known = [split for split in own if split not in ("train", "val") and len(own[split]) > 1]
            there = f"there is {', '.join(known)}" if known else "there is none beside train and val"
            raise UserError(f"{data} has no split {name!r} to test on with --test-splits; {there}.")
    return {name: own[name] for name in names}


def check_settings(config: TrainConfig) -> None:
    """UserError for a number that makes no sense; the optimiser checks its own."""
    if config.probe and not config.classes:
        raise UserError("--probe needs classes to tell apart; give them with --classes FILE.")
    if config.rest_as_texts and config.train_fraction == 1:
        raise UserError("--rest-as-texts needs a --train-fraction below 1: nothing is left out.")
    demands = {
        "epochs": (config.epochs > 0, "more than 0"),
        "context_length": (config.context_length >= 3, "at least 3: start, a token and end"),
        "image_size": (config.image_size is None or config.image_size >= 1, "at least 1"),
        "micro_batch": (config.micro_batch is None or config.micro_batch >= 1, "at least 1"),
        "batch_norm_group": (config.batch_norm_group >= 1, "at least 1"),
        "max_grad_norm": (config.max_grad_norm is None or config.max_grad_norm > 0, "more than 0"),
        "image_cache": (config.image_cache >= 0, "at least 0"),
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


def starting_method(config: TrainConfig, tokenizer: Tokenizer, world: World) -> Method:
    """The method as training starts with it, on its device."""
    method = runs.build_method(config, tokenizer)
    if config.rest_as_texts and not method.view_plan.imageless:
        raise UserError(
            f"--rest-as-texts needs a method that learns from texts alone, such as mct or oner; {config.method}, as it is set, does not."
        )
    if config.init_from:
        runs.initialise(method, config)
    _check_batch_norm(method, config, world)
    return method.to(world.device).to(memory_format=torch.channels_last)


def divide(method: Method, config: TrainConfig, world: World) -> None:
    """The weights over the processes, if asked for; one process alone has them whole."""
    if config.shard and config.precision == "fp16":
        raise UserError("--shard and --precision fp16 do not go together; take bf16 or fp32.")
    if config.shard and world.size > 1:
        shard(method, world)


def compile_towers(method: Method, config: TrainConfig) -> None:
    """The image towers, if asked for. Not the text towers, which pack their captions: another shape at every step."""
    for tower in (module for module in method.modules() if isinstance(module, ImageTower)) if config.compile else ():
        tower.compile()


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


def settle_workers(config: TrainConfig, world: World) -> TrainConfig:
    if config.workers is not None:
        return config
    return replace(config, workers=max(1, min(8, (os.cpu_count() or 1) // world.size)))


def run_tokenizer(config: TrainConfig, pairs: Data, out: Path) -> Tokenizer:
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
