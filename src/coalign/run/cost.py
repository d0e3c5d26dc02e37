"""What a step of training costs: encoder passes, floating-point operations and memory, measured on two samples and scaled up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from coalign.config import TrainConfig
from coalign.method import Method
from coalign.networks.batch_norm import GroupedBatchNorm2d
from coalign.networks.hugging_face_text import HuggingFaceTextTower
from coalign.networks.towers import ImageTower, TextTower
from coalign.networks.unified import Tokens, UnifiedTower
from coalign.training.distributed import RankGather, World
from coalign.types import Batch, Features, StepInfo


def _kind(tokens: Tokens) -> str:
    """What a single tower sees."""
    parts = {"image": tokens.patches, "text": tokens.words}
    return " and ".join(name for name, part in parts.items() if part.shape[1])


SLICE = 2  # samples that are measured
# a call's arguments -> the kind of pass, and the samples that take it
TOWERS: dict[type[nn.Module], Callable[..., tuple[str, int]]] = {
    ImageTower: lambda pixels: ("image", len(pixels)),
    TextTower: lambda ids, *_: ("text", len(ids)),
    HuggingFaceTextTower: lambda ids, *_: ("text", len(ids)),
    UnifiedTower: lambda tokens: (_kind(tokens), len(tokens.lengths)),
}
MIDWAY = StepInfo(step=500, total_steps=1000)  # where terms that start late or fade are on


@dataclass
class StepCost:
    """Of one process's share of a step."""

    passes: dict[str, float]  # trained encoder passes of every pair, by tower
    target_passes: dict[str, float]  # those of teachers, without gradient
    flops: dict[str, float]  # by part of the step; the backward pass counts twice the trained forward passes
    memory: dict[str, float]  # bytes, by what takes them
    gathered: float  # bytes of features that the global batch's pairs send to every process


@dataclass
class _Used:
    """What a piece of a step used."""

    flops: float
    saved: float  # bytes kept for the backward pass
    rows: Counter[str]  # samples that went through each kind of tower


@dataclass
class Measured:
    """What SLICE pairs use in `encode` (and the part of its memory that does not grow with them), in `encode_targets`, and in `objective`
    with 1, 2 and 3 times as many rows; and the bytes that are gathered of them."""

    method: Method
    pairs: Batch
    encoded: _Used
    casts: float
    aimed: _Used
    coupled: list[_Used]
    gathered: float


def step_cost(measured: Measured, config: TrainConfig, num_processes: int) -> StepCost:
    """The cost of a step of `config.batch_size` pairs, of which each process has its share."""
    method, pairs, casts = measured.method, measured.pairs, measured.casts
    encoded, aimed, coupled = measured.encoded, measured.aimed, measured.coupled
    local, whole = config.batch_size / num_processes, config.batch_size
    at_once = min(config.micro_batch or local, local)
    caching = at_once < local
    objective = _extrapolated([used.flops for used in coupled], local, whole)
    forward = encoded.flops / SLICE * local
    flops = {
        "encoders, forward": forward,
        **({"encoders once more, for --micro-batch": forward} if caching else {}),
        **({"teachers": aimed.flops / SLICE * local} if aimed.flops else {}),
        "objective, forward": objective,
        "backward": 2 * (forward + objective),
    }
    activations = {
        f"activations of the encoders, {at_once:,.0f} pairs": (encoded.saved - casts) / SLICE * at_once + casts,
        "activations of the objective": _extrapolated([used.saved for used in coupled], local, whole),
    }
    if caching:  # never there together: what is larger counts
        activations = dict([max(activations.items(), key=lambda item: item[1])])
    memory = {**_state(method, config), "the batch": _bytes_of(pairs) / SLICE * local, **activations}
    passes, target_passes = ({kind: rows / SLICE for kind, rows in used.rows.items()} for used in (encoded, aimed))
    return StepCost(passes, target_passes, flops, memory, measured.gathered / SLICE * whole)


class _CountingGather(RankGather):
    """Of a single process; counts the bytes that it is given."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(World(0, 1, device))
        self.bytes = 0

    def __call__(self, tensor: Tensor) -> Tensor:
        self.bytes += _size(tensor)
        return super().__call__(tensor)


def measure_step(method: Method, batch: Batch, autocast: torch.dtype | None) -> Measured:
    """What a step costs, from some pairs, two or more. The method is not fit for training afterwards."""
    pairs = _typical(batch).to(next(method.parameters()).device)
    for module in method.modules():
        if isinstance(module, GroupedBatchNorm2d):
            module.group = SLICE
    method.train()
    device = pairs.indices.device
    gather = _CountingGather(device)

    def run(work: Callable[[], Any]) -> tuple[Any, _Used]:
        with nullcontext() if autocast is None else torch.autocast(device.type, autocast):
            return _measured(method, work)

    features, encoded = run(lambda: method.encode(pairs, MIDWAY))
    casts = 0.0  # under autocast, the weights' copies in half precision
    if autocast is not None:
        twice = pairs[torch.arange(SLICE, device=device).repeat(2)]  # type: ignore[index]
        casts = max(0.0, 2 * encoded.saved - run(lambda: method.encode(twice, MIDWAY))[1].saved)
    features = {name: value.detach() for name, value in features.items()}
    with torch.no_grad():
        targets, aimed = run(lambda: method.encode_targets(pairs, MIDWAY))
        # a queue must hold other samples before it can be searched
        others = {name: value + 1 if value.dtype == torch.int64 else value for name, value in features.items()}
        run(lambda: method.objective(others, targets, gather, MIDWAY))
        before = gather.bytes
        method.after_step(others, targets, gather, MIDWAY)
        gathered = float(gather.bytes - before)

    def couple(times: int) -> _Used:
        rows, aims = _repeated(features, times), _repeated(targets, times)
        rows = {name: value.requires_grad_(value.is_floating_point()) for name, value in rows.items()}
        return run(lambda: method.objective(rows, aims, gather, MIDWAY))[1]

    before = gather.bytes
    coupled = [couple(1)]
    gathered += float(gather.bytes - before)
    coupled += [couple(2), couple(3)]
    return Measured(method, pairs, encoded, casts, aimed, coupled, gathered)


def _state(method: Method, config: TrainConfig) -> dict[str, float]:
    """Bytes of what stays from step to step, and of the gradients."""
    roles = {role: list(parameters) for role, parameters in method.parameter_groups().items()}
    trained = [parameter for parameters in roles.values() for parameter in parameters]
    ids = {id(parameter) for parameter in trained}
    optimiser = 0.0
    for role, parameters in roles.items():
        own = config.optimiser.for_role(role)
        moments = 2 if own.kind == "adamw" else 1 if own.momentum else 0
        optimiser += moments * sum(map(_size, parameters))
    frozen = sum(_size(parameter) for parameter in method.parameters() if id(parameter) not in ids)
    return {
        "trained weights": sum(map(_size, trained)),
        "gradients": sum(map(_size, trained)),
        "optimiser state": optimiser,
        **({"teachers and other fixed weights": frozen} if frozen else {}),
        "queues and other buffers": sum(map(_size, method.buffers())),
    }


# ---------------------------------------------------------------- measuring


def _measured(method: Method, work: Callable[[], Any]) -> tuple[Any, _Used]:
    """The result of some work, and what it used."""
    fixed = {tensor.untyped_storage().data_ptr() for tensor in (*method.parameters(), *method.buffers())}
    saved: dict[int, Tensor] = {}  # held, so that no address is used again

    def save(tensor: Tensor) -> Tensor:
        # detached: an output that its own operation keeps would hold the graph, and be held by it, for ever
        return saved.setdefault(tensor.untyped_storage().data_ptr(), tensor.detach())

    rows: Counter[str] = Counter()
    counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
    with ExitStack() as stack:
        stack.enter_context(_watched(method, rows))
        stack.enter_context(torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor))
        stack.enter_context(counter)
        result = work()
    size = sum(tensor.untyped_storage().nbytes() for pointer, tensor in saved.items() if pointer not in fixed)
    return result, _Used(float(counter.get_total_flops()), float(size), rows)


@contextmanager
def _watched(method: Method, rows: Counter[str]) -> Iterator[None]:
    """Counts the samples that go through the towers."""
    with ExitStack() as stack:
        for module in method.modules():
            if type(module) in TOWERS:

                def count(tower: nn.Module, args: tuple[Any, ...], _: Any) -> None:
                    kind, samples = TOWERS[type(tower)](*args)
                    rows[kind] += samples

                stack.callback(module.register_forward_hook(count).remove)
        yield


def _attention_flops(query: Any, key: Any, value: Any, *args: Any, out_shape: Any = None, **options: Any) -> int:
    return sdpa_flop_count(query, key, value)


# the counter knows the kernels of other devices
CPU_ATTENTION = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops}


def _typical(batch: Batch) -> Batch:
    """The samples whose captions are nearest to the mean length."""
    lengths = sum((view.lengths.float() for view in batch.texts.values()), torch.zeros(len(batch)))  # [batch]
    rows = (lengths - lengths.mean()).abs().argsort(stable=True)[:SLICE]
    return batch[rows]  # type: ignore[index]


def _repeated(features: Features, times: int) -> Features:
    return {name: torch.cat([value] * times) for name, value in features.items()}


def _extrapolated(measured: list[float], local: float, whole: float) -> float:
    """Of what was measured with 1, 2 and 3 times SLICE rows against as many columns, what `local` rows against `whole` columns take: a
    constant, a part for each row, and a part for each row and column."""
    first, second, third = measured
    square = (third - 2 * second + first) / (2 * SLICE**2)
    linear = (second - first) / SLICE - 3 * SLICE * square
    constant = first - linear * SLICE - square * SLICE**2
    return max(0.0, constant + linear * local + square * local * whole)


def _bytes_of(batch: Batch) -> int:
    tensors = [batch.indices, batch.caption_ids, batch.has_caption, batch.tags]
    tensors += [tensor for image in batch.images.values() for tensor in (image.pixels, image.params, image.patch_ranks)]
    tensors += [tensor for text in batch.texts.values() for tensor in (text.ids, text.lengths, text.labels)]
    return sum(_size(tensor) for tensor in tensors if tensor is not None)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
