"""Estimates the cost of a training step (encoder passes, FLOPs, memory) from a measurement on two samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from coalign.config import TrainConfig
from coalign.method import Method
from coalign.networks.batch_norm import GroupedBatchNorm2d
from coalign.networks.checkpointing import recorded_blocks
from coalign.networks.towers.spec import Tower, find_towers
from coalign.training.distributed import RankGather, World
from coalign.types import Batch, Features, StepInfo

NUM_MEASURED = 2  # samples of the measurement
MIDWAY = StepInfo(step=500, total_steps=1000)  # loss terms that start late or fade out are active


@dataclass
class StepCost:
    """Estimated cost of one process's share of a step."""

    passes: dict[str, float]  # trained encoder passes per pair, by kind
    target_passes: dict[str, float]  # teacher passes per pair, without gradient
    flops: dict[str, float]  # by stage of the step
    memory: dict[str, float]  # bytes, by use
    gathered: float  # bytes of the global batch's features, all-gathered by every process


@dataclass
class _Usage:
    """Resources used by one stage of a step."""

    flops: float
    saved_bytes: float  # bytes saved for backward
    num_samples: Counter[str]  # samples that passed through each kind of tower


@dataclass
class StepMeasurement:
    """Usage of `encode`, `encode_targets` and `objective` on `NUM_MEASURED` pairs."""

    method: Method
    pairs: Batch
    encode: _Usage  # with gradient checkpointing, includes the largest block's activations, as blocks are recomputed one at a time
    block_flops: float  # of all blocks that gradient checkpointing recomputes
    backward_flops: float  # of the encoders
    # part of `encode.saved_bytes` that does not grow with the batch: half-precision copies of the weights
    cast_bytes: float
    encode_targets: _Usage
    objective: list[_Usage]  # with 1, 2 and 3 times the rows
    gathered_bytes: float  # of the features that are all-gathered


def step_cost(measured: StepMeasurement, config: TrainConfig, num_processes: int) -> StepCost:
    """Returns the cost of one process's share of a step of `config.batch_size` pairs."""
    method, pairs, casts = measured.method, measured.pairs, measured.cast_bytes
    local, total = config.batch_size / num_processes, config.batch_size
    micro_batch = min(config.micro_batch or local, local)
    caching = micro_batch < local
    objective = _extrapolate([usage.flops for usage in measured.objective], local, total)
    forward, blocks, backward = (
        flops / NUM_MEASURED * local for flops in (measured.encode.flops, measured.block_flops, measured.backward_flops)
    )
    teacher = measured.encode_targets.flops / NUM_MEASURED * local
    flops = {
        "encoder forward": forward,
        **({"encoder recompute (--micro-batch)": forward} if caching else {}),
        **({"teacher forward": teacher} if teacher else {}),
        "objective forward": objective,
        "backward": backward + 2 * objective,
        **({"block recompute (--gradient-checkpointing)": blocks} if blocks else {}),
    }
    encoder_activations = (measured.encode.saved_bytes - casts) / NUM_MEASURED * micro_batch + casts
    activations = {
        f"encoder activations, {micro_batch:,.0f} pairs": encoder_activations,
        "objective activations": _extrapolate([usage.saved_bytes for usage in measured.objective], local, total),
    }
    if caching:  # the two are not in memory at the same time
        activations = dict([max(activations.items(), key=lambda item: item[1])])
    memory = {**_state_bytes(method, config), "batch": _batch_bytes(pairs) / NUM_MEASURED * local, **activations}
    passes, target_passes = (
        {kind: count / NUM_MEASURED for kind, count in usage.num_samples.items()}
        for usage in (measured.encode, measured.encode_targets)
    )
    return StepCost(passes, target_passes, flops, memory, measured.gathered_bytes / NUM_MEASURED * total)


class _CountingGather(RankGather):
    """A gather of a single process that counts the bytes of its inputs.

    Sums, of BatchNorm's statistics, are not counted: they do not grow with the batch.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__(World(0, 1, device))
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.bytes += _num_bytes(tensor)
        return super().__call__(tensor)


def measure_step(method: Method, batch: Batch, autocast: torch.dtype | None) -> StepMeasurement:
    """Runs a step on two typical pairs of the batch and measures it. Do not train the method afterwards: its state has changed."""
    pairs = _typical(batch).to(next(method.parameters()).device)
    for module in method.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.group = NUM_MEASURED
    method.train()
    device = pairs.indices.device
    gather = _CountingGather(device)

    def measure(work: Callable[[], Any], kept: Iterable[Any] = ()) -> tuple[Any, _Usage]:
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            return _measure(method, work, kept)

    def measure_encode(batch: Batch) -> tuple[Features, _Usage, float]:
        with recorded_blocks() as blocks:
            features, usage = measure(lambda: method.encode(batch, MIDWAY))
        recomputed = [measure(block, block.args)[1] for block in blocks]
        usage.saved_bytes += max((block.saved_bytes for block in recomputed), default=0.0)
        return features, usage, sum(block.flops for block in recomputed)

    features, encode, block_flops = measure_encode(pairs)
    casts = 0.0
    if autocast is not None:
        doubled = pairs[torch.arange(NUM_MEASURED, device=device).repeat(2)]  # type: ignore[index]
        casts = max(0.0, 2 * encode.saved_bytes - measure_encode(doubled)[1].saved_bytes)
    backward_flops = 2 * encode.flops
    if any(not parameter.requires_grad for tower in find_towers(method) for parameter in tower.parameters()):
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            again = method.encode(pairs, MIDWAY)  # `_measure` keeps one tensor for all views of a storage
        backward_flops, block_flops = _backward_flops(again), 0.0
    features = {name: value.detach() for name, value in features.items()}
    with torch.no_grad():
        targets, encode_targets = measure(lambda: method.encode_targets(pairs, MIDWAY))
        # fill queues with other sample and caption ids, because a nearest-neighbor search may exclude a sample's own
        others = {name: value + 1 if value.dtype == torch.int64 else value for name, value in features.items()}
        measure(lambda: method.objective(others, targets, gather, MIDWAY))
        before = gather.bytes
        method.after_step(others, targets, gather, MIDWAY)
        gathered = float(gather.bytes - before)

    def measure_objective(times: int) -> _Usage:
        inputs, target_inputs = _repeat(features, times), _repeat(targets, times)
        inputs = {name: value.requires_grad_(value.is_floating_point()) for name, value in inputs.items()}
        return measure(lambda: method.objective(inputs, target_inputs, gather, MIDWAY))[1]

    before = gather.bytes
    objective = [measure_objective(1)]
    gathered += float(gather.bytes - before)
    objective += [measure_objective(2), measure_objective(3)]
    return StepMeasurement(
        method, pairs, encode, block_flops, backward_flops, casts, encode_targets, objective, gathered
    )


def _state_bytes(method: Method, config: TrainConfig) -> dict[str, float]:
    """Returns the bytes of weights, gradients, optimizer state and buffers."""
    groups = method.parameter_groups().items()
    roles = {role: [p for p in parameters if p.requires_grad] for role, parameters in groups}
    trained = [parameter for parameters in roles.values() for parameter in parameters]
    ids = {id(parameter) for parameter in trained}
    optimizer = 0.0
    for role, parameters in roles.items():
        settings = config.optimizer.for_role(role)
        moments = 2 if settings.kind == "adamw" else 1 if settings.momentum else 0
        optimizer += moments * sum(map(_num_bytes, parameters))
    frozen = sum(_num_bytes(parameter) for parameter in method.parameters() if id(parameter) not in ids)
    return {
        "trained weights": sum(map(_num_bytes, trained)),
        "gradients": sum(map(_num_bytes, trained)),
        "optimizer state": optimizer,
        **({"teachers and other frozen weights": frozen} if frozen else {}),
        "queues and other buffers": sum(map(_num_bytes, method.buffers())),
    }


# ---------------------------------------------------------------- measuring


def _measure(method: Method, work: Callable[[], Any], kept: Iterable[Any] = ()) -> tuple[Any, _Usage]:
    """Returns the result of `work` and its usage, to which weights, buffers and the tensors in `kept` do not count."""
    kept = (*method.parameters(), *method.buffers(), *(value for value in kept if isinstance(value, Tensor)))
    state = {tensor.untyped_storage().data_ptr() for tensor in kept}
    saved: dict[int, Tensor] = {}  # keeps the tensors alive, so that no address is reused

    def save(tensor: Tensor) -> Tensor:
        # detached: an operation that saves its own output would form a reference cycle with the graph
        return saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

    num_samples: Counter[str] = Counter()
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with ExitStack() as stack:
        stack.enter_context(_count_passes(method, num_samples))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor))
        stack.enter_context(counter)
        result = work()
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in state)
    return result, _Usage(float(counter.get_total_flops()), float(size), num_samples)


def _backward_flops(features: Features) -> float:
    """Returns the FLOPs of the gradient of features, which frozen parts do not have. Includes blocks that are recomputed."""
    outputs = [value for value in features.values() if value.requires_grad]
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with counter:
        torch.autograd.backward(outputs, [torch.ones_like(value) for value in outputs])
    return float(counter.get_total_flops())


@contextmanager
def _count_passes(method: Method, num_samples: Counter[str]) -> Iterator[None]:
    """Context that counts the samples that pass through each kind of tower."""

    def add(tower: Tower, inputs: tuple[Any, ...], _: Any) -> None:
        if isinstance(inputs[0], Tensor) and inputs[0].is_floating_point():  # cached features
            return
        kind, count = tower.describe_pass(*inputs)
        num_samples[kind] += count

    with ExitStack() as stack:
        for tower in find_towers(method):
            stack.callback(tower.register_forward_hook(add).remove)
        yield


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(gradient: Any, query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    return sdpa_backward_flop_count(gradient, query, key, value)


# FlopCounterMode does not support these CPU kernels
CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def _typical(batch: Batch) -> Batch:
    """Returns the samples whose caption lengths are closest to the mean."""
    lengths = sum((view.lengths.float() for view in batch.texts.values()), torch.zeros(len(batch)))  # [batch]
    rows = (lengths - lengths.mean()).abs().argsort(stable=True)[:NUM_MEASURED]
    return batch[rows]  # type: ignore[index]


def _repeat(features: Features, times: int) -> Features:
    return {name: torch.cat([value] * times) for name, value in features.items()}


def _extrapolate(measured: list[float], local: float, total: float) -> float:
    """Extrapolates a usage to `local` rows and `total` columns, as a constant, a term per row and a term per row and column.

    measured: usage with n, 2n and 3n rows and columns, n = `NUM_MEASURED`.
    """
    first, second, third = measured
    square = (third - 2 * second + first) / (2 * NUM_MEASURED**2)
    linear = (second - first) / NUM_MEASURED - 3 * NUM_MEASURED * square
    constant = first - linear * NUM_MEASURED - square * NUM_MEASURED**2
    return max(0.0, constant + linear * local + square * local * total)


def _batch_bytes(batch: Batch) -> int:
    tensors = [batch.indices, batch.caption_ids, batch.has_caption, batch.tags, batch.group_ids]
    tensors += [tensor for image in batch.images.values() for tensor in (image.pixels, image.params, image.patch_ranks)]
    tensors += [tensor for text in batch.texts.values() for tensor in (text.ids, text.lengths, text.labels)]
    return sum(_num_bytes(tensor) for tensor in tensors if tensor is not None)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
