"""Prepares training: data and splits, validated settings, tokenizer, and the method on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from coalign.config import NOMINAL_PAIRS, TrainConfig, flatten, to_json
from coalign.cores import num_cores
from coalign.data.loading.train import check_batch_size
from coalign.data.sources.base import Source, Splits
from coalign.data.sources.labeled import label_by_captions
from coalign.data.sources.mixture import Mixture
from coalign.data.sources.open import check_columns, open_any
from coalign.data.sources.unpaired_captions import UnpairedCaptions
from coalign.data.splits import nested_subset, run_splits
from coalign.data.text.tokenizer import CLIP_VOCABULARY, Tokenizer, has_tokenizer, load_tokenizer, train_bpe
from coalign.errors import BadSample, UserError
from coalign.method import Method
from coalign.networks.batch_norm import GroupedBatchNorm2d
from coalign.networks.checkpointing import checkpoint_blocks
from coalign.networks.logit_scale import TEMPERATURE
from coalign.networks.open_clip_parts import AttentionPool2d
from coalign.networks.towers.pretrained import pretrained_logit_scale
from coalign.networks.towers.side_by_side import side_by_side, suit_side_by_side
from coalign.networks.towers.spec import TowerSpec, find_towers
from coalign.networks.towers.text import TextTower
from coalign.networks.tuning import Tuning
from coalign.randomness import stable_hash
from coalign.runs.folder import TOKENIZER, describe_model, read_config
from coalign.runs.run import build_method, default_vocab_size, init_from_run, start_from_run, text_weights
from coalign.training.distributed import World
from coalign.training.sharding import shard
from coalign.version import __version__
from coalign.workflows.train.batches import MAX_VOCABULARY_PAIRS, TrainingData

_WITHOUT_BATCH_NORM = (
    ", or use a model without BatchNorm, such as ViT-B-32 or convnext_tiny, which allows any batch size"
)
MAX_THREAD_PAIRS = 10_000  # training pairs that a thread loads by default
ConfigFn = Callable[[int], TrainConfig]  # number of training pairs -> configuration


def open_data(data: str, config_for: ConfigFn, world: World) -> tuple[TrainingData, TrainConfig]:
    """Opens and splits the data. Returns it with the configuration for its number of training pairs.

    Raises UserError on every rank if the data cannot be opened, a setting is invalid, or ranks have different data or settings.
    """
    # the number of pairs is not known yet; settings of the split do not depend on it
    nominal = config_for(NOMINAL_PAIRS)
    _check_reading(nominal)  # before the data is read
    pairs = _first_rank_then_others(world, lambda: _open_and_split(data, nominal))
    config = config_for(len(pairs.train))
    _check_reading(config)
    _check_same_on_all_ranks(config, pairs, world)
    return pairs, config


def _check_reading(config: TrainConfig) -> None:
    """Raises UserError if an option on how the data is read does not go with the method or the other options."""
    if config.reading.prompts and config.reading.captions_from is None and config.classes is None:
        raise UserError(
            "--prompts needs names of classes; add --captions-from folder or a column to make captions of them, or --classes."
        )


def _open_and_split(data: str, config: TrainConfig) -> TrainingData:
    """Opens the data, splits it, and selects the training samples (`train_fraction`, `unpaired_captions`, mixture weights)."""
    opened = open_any(data, config.reading)
    source = label_by_captions(opened)
    if config.val_data:
        val_opened = open_any(config.val_data, config.reading)
        check_columns([opened, val_opened], config.reading)
        val_source = label_by_captions(val_opened)
        val = (val_source.splits or {}).get("val", np.arange(len(val_source)))
        splits = _splits(data, source, config)
        pairs = TrainingData(source, splits["train"], val_source, val)
    else:
        check_columns([opened], config.reading)
        splits = _splits(data, source, config)
        pairs = TrainingData(source, splits["train"], source, splits["val"])
    pairs.test_splits = _test_splits(data, splits, config.test_splits)
    parts = [nested_subset(pairs.train, config.train_fraction)]
    if config.unpaired_captions:
        texts = UnpairedCaptions(source, pairs.train, parts[0])
        parts.append(pairs.train[texts.is_text_only[pairs.train]])
        pairs.source = texts
    if isinstance(opened, Mixture):
        parts = [opened.epoch_indices(part) for part in parts]
    pairs.train = parts[0] if len(parts) == 1 else np.concatenate(parts)  # avoids a copy of up to 100 million indices
    return pairs


def _first_rank_then_others(world: World, work: Callable[[], TrainingData]) -> TrainingData:
    """Runs `work` on rank 0, which writes indexes and caches, and then on the other ranks, which read them.

    If it raises UserError on any rank, raises it on all ranks.
    """
    result, failure = None, None
    for first in (True, False):
        if world.is_first == first:
            try:
                result = work()
            except UserError as error:
                failure = str(error)
        for rank, message in enumerate(world.gather_objects(failure)):
            if message is not None:
                raise UserError(message if world.size == 1 else f"Rank {rank} of {world.size}: {message}")
    assert result is not None
    return result


def _check_same_on_all_ranks(config: TrainConfig, pairs: TrainingData, world: World) -> None:
    """Raises UserError on every rank if any rank has a different version, configuration or dataset from rank 0."""
    if world.size == 1:
        return
    facts = {"coalign": __version__, "data": fingerprint(pairs), "training pairs": len(pairs.train)}
    first, *others = world.gather_objects({**facts, **flatten(to_json(config))})
    for rank, other in enumerate(others, 1):
        if differing := [name for name in {**first, **other} if first.get(name) != other.get(name)]:
            name = differing[0]
            raise UserError(
                f"Rank {rank} of {world.size} differs from rank 0 in {', '.join(differing)} ({name}: {other.get(name)} instead of "
                f"{first.get(name)}); start all processes with the same code, options and data."
            )


def fingerprint(pairs: TrainingData) -> str:
    """Returns a hash of the keys and captions of 64 training pairs. It does not depend on where the data is stored."""
    seen: list[Any] = []
    for index in pairs.train[np.linspace(0, len(pairs.train) - 1, 64).astype(int)].tolist():
        try:
            record = pairs.source.record(index)
            seen.append((record.key, record.captions))
        except BadSample as bad:
            seen.append(bad.reason)
    return f"{stable_hash(*seen):016x}"


def _splits(data: str, source: Source, config: TrainConfig) -> Splits:
    splits = dict(run_splits(source, config))
    if "train" not in splits:
        raise UserError(
            f"{data} has nothing to train on: all samples are in {' and '.join(splits)}; pass data with a train split."
        )
    return {"val": np.arange(0), **splits}


def _test_splits(data: str, splits: Splits, names: Sequence[str]) -> dict[str, np.ndarray]:
    for name in names:
        if name in ("train", "val") or len(splits.get(name, ())) < 2:
            known = [split for split in splits if split not in ("train", "val") and len(splits[split]) > 1]
            available = f"available: {', '.join(known)}" if known else "it has none besides train and val"
            raise UserError(f"{data} has no split {name!r} for --test-splits; {available}.")
    return {name: splits[name] for name in names}


def initial_method(
    config: TrainConfig, tokenizer: Tokenizer, world: World, resumed: Path | None = None
) -> tuple[Method, Tuning]:
    """Builds the method with its initial weights, on its device, and freezes what is not trained. resumed: the run whose checkpoint is
    loaded afterwards; None if it was killed before the first one."""
    check_batch_size(config.batch_size, world.size)
    method = build_method(config, tokenizer, resumed or config.init_from)
    if config.unpaired_captions and not method.view_plan.imageless:
        raise UserError(
            "--unpaired-captions needs a method that trains on captions without images, such as mct or oner; "
            f"{config.method} with these settings does not."
        )
    if tokenizer.mask_id is None and any(policy.mask_p for policy in method.view_plan.texts.values()):
        raise UserError(
            f"{config.method} masks words, but the tokenizer {tokenizer.name} has no mask token; use a text encoder trained on masked "
            "words, such as BERT, or turn masked language modeling off."
        )
    if config.init_from:
        if not resumed:
            init_from_run(method, config)
        start_from_run(method, config.init_from)
    tuning = Tuning(method, config)
    _check_mask_token(method, config)
    _check_batch_norm(method, config, world)
    for tower in find_towers(method) if config.gradient_checkpointing else ():
        if not checkpoint_blocks(tower):
            raise UserError(
                f"An encoder of {describe_model(config)} is not made of blocks that can be recomputed; omit "
                "--gradient-checkpointing or use a model of residual blocks, such as ViT-B-32 or RN50."
            )
    method = method.to(world.device)
    # on Apple GPUs, the backward of batch normalization fails in this format (pytorch#188371)
    return method if world.device.type == "mps" else method.to(memory_format=torch.channels_last), tuning


def shard_model(method: Method, config: TrainConfig, world: World) -> None:
    """Shards the weights over the processes if `config.shard` is set and there is more than one."""
    if config.shard and world.size > 1:
        shard(method, world, whole=(AttentionPool2d,))


def compile_towers(method: Method, config: TrainConfig) -> None:
    """Compiles the towers with fixed shapes if `config.compile` is set. Text towers pack captions, so their shapes change in every step."""
    for tower in find_towers(method) if config.compile else ():
        if tower.has_fixed_shapes:
            tower.compile()


def step_threads(method: Method, config: TrainConfig, world: World) -> AbstractContextManager[None]:
    """Returns the context in which to train: the towers in a thread each, if this is faster than to split operations among cores."""
    on_cores = world.device.type == "cpu" and torch.get_num_threads() > 1
    changed = config.compile or config.gradient_checkpointing or (config.shard and world.size > 1)
    if on_cores and method.encodes_both and not changed:
        towers, plan = cast("Any", method), method.view_plan
        if suit_side_by_side(towers.image, towers.text, len(plan.images), len(plan.texts)):
            return side_by_side()
    return nullcontext()


def _check_mask_token(method: Method, config: TrainConfig) -> None:
    """Raises UserError if words are masked by a token that the pretrained text encoder does not have, and cannot learn."""
    text = getattr(method, "text", None)
    masks = any(policy.mask_p for policy in method.view_plan.texts.values())
    if masks and isinstance(text, TextTower) and not text.transformer.token_embedding.weight.requires_grad:
        if config.init_from is not None:
            return  # of a run that has learned it
        term = method.token_terms["text"]
        raise UserError(
            f"The term {term} of {config.method} masks words by a token that is new to the text encoder, but --text-tuning "
            f"{config.text_tuning} freezes its token embeddings; add --no-{term.replace('_', '-')}, or use --text-tuning full."
        )


def _check_batch_norm(method: Method, config: TrainConfig, world: World) -> None:
    """Raises UserError if trained BatchNorm layers have groups of one sample, or if the batch size per process or the micro-batch is not a
    multiple of the group size."""
    local = config.batch_size // world.size
    norms = [module for module in method.modules() if isinstance(module, GroupedBatchNorm2d) and module.training]
    for group in {norm.group for norm in norms}:
        if group == 1:
            raise UserError(
                f"{config.image_tower or config.model} has BatchNorm, which cannot train on single samples; set --batch-norm-group, "
                "--micro-batch and the batch size per process to 2 or more, lock the encoder with --image-tuning locked"
                f"{_WITHOUT_BATCH_NORM}."
            )
        for size, name in ((local, "the batch size per process"), (config.micro_batch or group, "--micro-batch")):
            if size % group:
                raise UserError(
                    f"{config.image_tower or config.model} has BatchNorm over groups of {group} samples, but {name}, {size}, is not "
                    f"a multiple of {group}; change it or --batch-norm-group{_WITHOUT_BATCH_NORM}."
                )


def resolve(config: TrainConfig, num_pairs: int, world: World, resumed: Path | None = None) -> TrainConfig:
    """Sets what depends on the data and the number of processes, if it is unset. (`resolve_workers` sets the loader workers.)

    A group of BatchNorm is what a process encodes at once; a resumed run keeps its group size, also with another number of processes or
    another micro-batch. An unset temperature is the pretrained model's. The warm-up of a constant schedule is a number of steps, which an
    extended run keeps.
    """
    group = config.batch_norm_group
    original = None if resumed is None else read_config(resumed).config
    if group is None and original is not None:
        group = original.batch_norm_group
    if group is None:
        group = config.micro_batch or max(1, config.batch_size // world.size)
    optimizer = config.optimizer
    if optimizer.schedule == "constant" and optimizer.warmup_steps is None:
        warmup = optimizer.num_warmup_steps(num_steps(config, num_pairs))
        if original is not None and original.optimizer.warmup_fraction == optimizer.warmup_fraction:
            warmup = original.optimizer.warmup_steps or 0
        optimizer = replace(optimizer, warmup_steps=warmup)
    resolved = replace(config, batch_norm_group=group, optimizer=optimizer)
    return _resolve_temperature(resolved, resumed)


def num_steps(config: TrainConfig, num_pairs: int) -> int:
    """Returns the number of steps of a run on `num_pairs` training pairs."""
    return max(1, round(config.epochs * (num_pairs // config.batch_size)))


def _resolve_temperature(config: TrainConfig, resumed: Path | None) -> TrainConfig:
    """Sets an unset temperature to the pretrained model's, and raises the upper bound of 1/τ to it."""
    own = config.method_config
    if getattr(own, "temperature", TEMPERATURE) is not None:
        return config
    if resumed is not None:
        saved = read_config(resumed).config.method_config
        changes = {"temperature": saved.temperature, "max_logit_scale": saved.max_logit_scale}
    else:
        is_whole = not (config.image_tower or config.text_tower) and config.head == "linear"
        pretrained = config.pretrained if is_whole else None
        scale = pretrained_logit_scale(TowerSpec(config.model, 0, image_size=config.image_size, pretrained=pretrained))
        changes = {"temperature": TEMPERATURE}
        if scale is not None:
            changes = {"temperature": 1 / scale, "max_logit_scale": max(own.max_logit_scale, scale)}
    return replace(config, method_config=replace(own, **changes))


def resolve_workers(config: TrainConfig, num_pairs: int, world: World, decodes_once: bool) -> TrainConfig:
    """Sets the number of loader workers per process, if it is unset: CPU cores over processes, at most 8.

    It is 0, a thread, for few pairs whose decoded images or features are kept: starting processes takes longer than loading.
    """
    if config.workers is not None:
        return config
    is_short = decodes_once and num_pairs <= MAX_THREAD_PAIRS
    return replace(config, workers=0 if is_short else max(1, min(8, num_cores() // world.size)))


def run_tokenizer(
    config: TrainConfig, pairs: TrainingData, resumed: Path | None = None
) -> tuple[Tokenizer, TrainConfig]:
    """Returns the tokenizer of a run, equal on all ranks, and the configuration with its name. resumed: the run to resume.

    A resumed run and --init-from keep the tokenizer and the context length. Otherwise the tokenizer is loaded, or trained on the captions.
    Raises UserError if it is not the one that the pretrained text encoder was trained with.
    """
    for folder in filter(None, (resumed, config.init_from)):
        saved = read_config(folder).config
        if folder != resumed and config.tokenizer not in (None, saved.tokenizer):
            raise UserError(f"--init-from keeps the tokenizer of {folder}, {saved.tokenizer}; omit --tokenizer.")
        name, context = config.tokenizer or saved.tokenizer, config.context_length or saved.context_length
        return load_tokenizer(folder / TOKENIZER), replace(config, tokenizer=name, context_length=context)
    pretrained, fitting = text_weights(config)
    name = config.tokenizer or fitting
    if pretrained is not None:
        tokenizer = _fitting_tokenizer(pretrained, name, fitting)
        return tokenizer, replace(config, tokenizer=name)
    name = name or ("clip" if default_vocab_size(config.model) == CLIP_VOCABULARY else "captions")
    config = replace(config, tokenizer=name)
    if name != "captions":
        return load_tokenizer(name), config
    return train_bpe(captions_of(pairs.source, pairs.train), default_vocab_size(config.model)), config


def _fitting_tokenizer(pretrained: str, name: str | None, fitting: str | None) -> Tokenizer:
    """Loads the tokenizer `name` for a pretrained text encoder. fitting: the tokenizer that it was trained with, if that is known."""
    if name is None:
        raise UserError(f"The tokenizer of the text encoder {pretrained} is not known; give it with --tokenizer.")
    if name == "captions":
        raise UserError(
            f"--tokenizer captions trains a new vocabulary, which does not fit the pretrained text encoder {pretrained}; omit --tokenizer."
        )
    tokenizer = load_tokenizer(name)
    if fitting not in (None, name) and has_tokenizer(fitting) and not tokenizer.equals(load_tokenizer(fitting)):
        raise UserError(
            f"The tokenizer {name} does not fit the text encoder {pretrained}, which was trained with {fitting}; omit --tokenizer."
        )
    return tokenizer


def captions_of(source: Source, indices: np.ndarray) -> Iterator[str]:
    """Yields the captions of at most the first `MAX_VOCABULARY_PAIRS` pairs that can be read."""
    for index in indices[:MAX_VOCABULARY_PAIRS].tolist():
        try:
            yield from source.record(index).captions
        except BadSample:
            continue  # counted during training
