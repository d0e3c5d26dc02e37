"""Processes: who we are, the differentiable gather, and one explicit gradient reduction."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from coalign.training.stopwatch import part

BUCKET_ELEMENTS = 8_000_000  # 32 MB of float32 a reduction


@dataclass(frozen=True)
class World:
    """This process among all: rank, their number, and the device it trains on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, without gradient."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def broadcast(self, value: Any) -> Any:
        """The first rank's value, on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's value, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world(device: str | None = None) -> World:
    """This process's place: alone, or one of torchrun's (environment RANK, WORLD_SIZE, LOCAL_RANK)."""
    size, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if chosen.type == "cuda":
        chosen = torch.device("cuda", local_rank if size > 1 else (chosen.index or 0))
        torch.cuda.set_device(chosen)
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    return World(rank, size, chosen)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        context.rows = len(tensor)
        pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # every rank's loss reached our rows as columns of its own: the sum of what all ranks sent them
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * context.rows
        return total[start : start + context.rows]


class RankGather:
    """Rows of all ranks in global order, differentiable (`types.Gather`). Every rank must hold equally many rows."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.world.size == 1:
            return tensor
        with part("communication"):
            return _AllGather.apply(tensor)

    def own_rows(self, tensor: Tensor) -> Tensor:
        return torch.arange(len(tensor), device=tensor.device) + self.world.rank * len(tensor)


def reduce_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sums gradients over ranks, in buckets; an absent gradient counts as zero, and stays absent when absent everywhere.

    Each rank's loss is its share of the global loss (see LossTerm), so the sum is the gradient of the global loss.
    """
    if world.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad]
    present = world.sum(torch.tensor([p.grad is not None for p in trained], dtype=torch.int32, device=world.device))
    bucket: list[nn.Parameter] = []
    elements = 0
    for parameter, count in zip(trained, present.tolist()):
        if not count:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        if bucket and (elements + parameter.numel() > BUCKET_ELEMENTS or parameter.dtype != bucket[0].dtype):
            _reduce_bucket(bucket)
            bucket, elements = [], 0
        bucket.append(parameter)
        elements += parameter.numel()
    if bucket:
        _reduce_bucket(bucket)


def _reduce_bucket(bucket: list[nn.Parameter]) -> None:
    gradients = [p.grad for p in bucket if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    for gradient, piece in zip(gradients, flat.split([gradient.numel() for gradient in gradients])):
        gradient.copy_(piece.view_as(gradient))
