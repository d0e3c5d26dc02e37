"""One training step: encode on slices, objective on the whole batch, exact gradients on any number of slices and ranks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from coalign.method import Method
from coalign.training.distributed import RankGather, World, reduce_gradients
from coalign.training.stopwatch import part
from coalign.types import Batch, Features, LossTerm, StepInfo


@dataclass
class StepResult:
    loss: float  # of the global batch
    terms: dict[str, float]  # each term's global mean, unweighted
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
    """Leaves the gradient of the global batch's loss in the parameters' `.grad`, the same on every rank.

    `slices` cut this rank's rows; with several, features are computed without gradient, the objective's gradient with respect to them is
    taken, and each slice is encoded again to carry it on (gradient caching, Gao et al. 2021): memory is one slice's.
    """
    slices = slices or [slice(0, len(batch))]
    caching = len(slices) > 1

    def encode(number: int) -> Features:
        # one autocast context a slice: its weight cache must not carry casts made without gradient into a pass with it
        with _autocast(world, autocast):
            # dropout and its like are a function of the step and the slice, so that a pass can be run again and a run resumed
            torch.manual_seed((seed * 1_000_003 + step.step) * 1_009 + number)
            return method.encode(batch[slices[number]], step)

    with torch.set_grad_enabled(not caching), part("encoders, forward"):
        features = _concatenate([encode(number) for number in range(len(slices))])
    with torch.no_grad(), _autocast(world, autocast), part("teachers"):
        targets = _concatenate([method.encode_targets(batch[rows], step) for rows in slices])
    if caching:
        features = {name: t.requires_grad_(t.is_floating_point()) for name, t in features.items()}
    with _autocast(world, autocast), part("objective, forward"):
        terms = method.objective(features, targets, RankGather(world), step)
    share, loss, means = _weigh(terms, world)
    with part("objective, backward" if caching else "backward"):
        (scaler.scale(share) if scaler else share).backward()
    if caching:
        for number, rows in enumerate(slices):
            with part("encoders once more, for --micro-batch"):
                again = encode(number)
            carried = [
                (t, gradient[rows])
                for name, t in again.items()
                if t.requires_grad and (gradient := features[name].grad) is not None
            ]
            if carried:
                with part("encoders, backward"):
                    torch.autograd.backward([t for t, _ in carried], [gradient for _, gradient in carried])
    with part("communication"):
        reduce_gradients(method.parameters(), world)
    return StepResult(loss, means, {name: t.detach() for name, t in features.items()}, targets)


@torch.no_grad()
def evaluate_loss(method: Method, batch: Batch, step: StepInfo, world: World, autocast: torch.dtype | None) -> float:
    """The loss of the global batch, without gradient."""
    with _autocast(world, autocast):
        terms = method.objective(
            method.encode(batch, step), method.encode_targets(batch, step), RankGather(world), step
        )
    return _weigh(terms, world)[1]


def move_statistics(method: Method, world: World, keep: bool) -> None:
    """Running statistics of batch norms move once a step, over all ranks, and not on a skipped one."""
    for module in method.modules():
        if callable(move := getattr(module, "move_statistics", None)):
            move(world.sum, keep)


def _weigh(terms: list[LossTerm], world: World) -> tuple[Tensor, float, dict[str, float]]:
    """This rank's share of the loss (with gradient), the loss, and each term's mean. A term that counts nothing anywhere is zero."""
    sums = world.sum(torch.stack([torch.stack([t.total.detach().double(), _count(t)]) for t in terms]))  # [term, 2]
    totals, counts = sums[:, 0].tolist(), sums[:, 1].tolist()
    share = sum((t.weight / max(count, 1e-30)) * t.total for t, count in zip(terms, counts) if count)
    means = {t.name: total / count if count else 0.0 for t, total, count in zip(terms, totals, counts)}
    if not isinstance(share, Tensor):
        share = sum(0.0 * t.total for t in terms)
    return share, sum(t.weight * means[t.name] for t in terms), means


def _count(term: LossTerm) -> Tensor:
    return torch.as_tensor(term.count, dtype=torch.float64, device=term.total.device).detach()


def _concatenate(pieces: list[Features]) -> Features:
    return pieces[0] if len(pieces) == 1 else {name: torch.cat([piece[name] for piece in pieces]) for name in pieces[0]}


def _autocast(world: World, dtype: torch.dtype | None) -> AbstractContextManager[None]:
    return nullcontext() if dtype is None else torch.autocast(world.device.type, dtype)
