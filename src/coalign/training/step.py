"""One training step: encode in slices, objective on the whole batch, exact gradients for any number of slices and ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from coalign.method import Method
from coalign.training.distributed import RankGather, World, pad_to_global_batch, reduce_gradients
from coalign.training.stopwatch import timed
from coalign.types import Batch, Features, LossTerm, StepInfo


@dataclass
class StepResult:
    """Loss of the global batch, and this rank's features."""

    loss: float
    terms: dict[str, float]  # unweighted mean of each loss term over the global batch
    features: Features
    targets: Features


def forward_backward(
    method: Method,
    batch: Batch,
    step: StepInfo,
    world: World,
    *,
    slices: list[slice] | None = None,
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    seed: int = 0,
) -> StepResult:
    """Accumulates the gradient of the global batch's loss in the parameters' `.grad`, equal on all ranks.

    `slices`, the micro-batches, partition this rank's rows. With more than one, features are computed without gradient, the objective is
    differentiated with respect to them, and each slice is encoded again to backpropagate through the encoders (gradient caching, Gao et
    al. 2021), so that activations of one slice are in memory at a time.
    """
    batch = pad_to_global_batch(batch, world)
    slices = slices or [slice(0, len(batch))]
    caching = len(slices) > 1

    def encode(index: int) -> Features:
        # one autocast context per slice: its weight cache must not reuse casts made without gradient in a pass with gradient
        with _autocast(world, autocast):
            # dropout depends on the step and on the slice of the global batch only, so that a pass can be recomputed and a run resumed
            _set_seed((seed * 1_000_003 + step.step) * 1_009 + world.rank * len(slices) + index, world.device)
            return method.encode(batch[slices[index]], step)

    with torch.set_grad_enabled(not caching), timed("encoder forward"):
        features = _concatenate([encode(index) for index in range(len(slices))])
    with torch.no_grad(), _autocast(world, autocast), timed("teacher forward"):
        targets = _concatenate([method.encode_targets(batch[rows], step) for rows in slices])
    if caching:
        features = {name: t.requires_grad_(t.is_floating_point()) for name, t in features.items()}
    with _autocast(world, autocast), timed("objective forward"):
        terms = method.objective(features, targets, RankGather(world), step)
    local_loss, loss, means = _reduce_terms(terms, world)
    with timed("objective backward" if caching else "backward"):
        (scaler.scale(local_loss) if scaler else local_loss).backward()
    if caching:
        for index, rows in enumerate(slices):
            with timed("encoder recompute (--micro-batch)"):
                recomputed = encode(index)
            outputs = [
                (t, gradient[rows])
                for name, t in recomputed.items()
                if t.requires_grad and (gradient := features[name].grad) is not None
            ]
            if outputs:
                with timed("encoder backward"):
                    torch.autograd.backward([t for t, _ in outputs], [gradient for _, gradient in outputs])
    with timed("communication"):
        reduce_gradients(method.parameters(), world)
    return StepResult(loss, means, {name: t.detach() for name, t in features.items()}, targets)


@torch.no_grad()
def evaluate_loss(method: Method, batch: Batch, step: StepInfo, world: World, autocast: torch.dtype | None) -> float:
    """Returns the loss of the global batch, without gradient."""
    batch = pad_to_global_batch(batch, world)
    with _autocast(world, autocast):
        terms = method.objective(
            method.encode(batch, step), method.encode_targets(batch, step), RankGather(world), step
        )
    return _reduce_terms(terms, world)[1]


def move_statistics(method: Method, world: World, keep: bool) -> None:
    """Updates the running statistics of all batch norms from all ranks. With `keep` False (a skipped step), discards this step's."""
    # of the class: a module without it would search its parameters, buffers and submodules in every step
    norms: list[Any] = [module for module in method.modules() if hasattr(type(module), "take_statistics")]
    taken = [(norm, totals) for norm in norms if (totals := norm.take_statistics()) is not None]
    if not keep or not taken:
        return
    summed = world.sum(torch.cat([totals for _, totals in taken]))  # at once, as each communication takes its time
    for (norm, totals), part in zip(taken, summed.split([len(totals) for _, totals in taken])):
        norm.move_statistics(part.to(totals.dtype))


def _reduce_terms(terms: list[LossTerm], world: World) -> tuple[Tensor, float, dict[str, float]]:
    """Returns this rank's share of the loss (with gradient), the global loss, and the mean of each term (0 if its count is 0)."""
    dtype = torch.float32 if world.device.type == "mps" else torch.float64  # Apple GPUs have no float64
    sums = world.sum(
        torch.stack([torch.stack([t.total.detach().to(dtype), _count(t, dtype)]) for t in terms])
    )  # [term, 2]
    totals, counts = sums[:, 0].tolist(), sums[:, 1].tolist()
    local_loss = sum((t.weight / max(count, 1e-30)) * t.total for t, count in zip(terms, counts) if count)
    means = {t.name: total / count if count else 0.0 for t, total, count in zip(terms, totals, counts)}
    if not isinstance(local_loss, Tensor):
        local_loss = sum(0.0 * t.total for t in terms)
    return local_loss, sum(t.weight * means[t.name] for t in terms), means


def _count(term: LossTerm, dtype: torch.dtype) -> Tensor:
    return torch.as_tensor(term.count, dtype=dtype, device=term.total.device).detach()


def _concatenate(slices: list[Features]) -> Features:
    return slices[0] if len(slices) == 1 else {name: torch.cat([part[name] for part in slices]) for name in slices[0]}


def _set_seed(seed: int, device: torch.device) -> None:
    """`torch.manual_seed`, which also formats the call stack for each kind of device that is absent: a millisecond per step."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


def _autocast(world: World, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)
