"""Processes: who we are, the differentiable gather, and one explicit gradient reduction."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from coalign.divided import is_divided
from coalign.errors import UserError
from coalign.training.stopwatch import part

TIMEOUT = timedelta(minutes=10)  # for a process that does not come, or does not answer
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
        store, _, _ = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo",
            store=fresh_prefix(store, rank, size), rank=rank, world_size=size, timeout=TIMEOUT,
        )  # fmt: skip
        if chosen.type == "cpu":
            atexit.register(_end_gloo)
    return World(rank, size, chosen)


def _end_gloo() -> None:
    """Joins gloo's threads: freeing a last tensor while the interpreter ends, they would abort a process that did its work."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh_prefix(store: dist.Store, rank: int, size: int) -> dist.Store:
    """The store under a prefix that no earlier start of the processes has used, the same on every rank.

    torchrun keeps one store through its restarts, and in it the addresses of the dead. Its count of restarts cannot tell
    starts apart, since each machine counts its own. So the first rank offers a name, every other signs it with one of its
    own, and has found the living first rank, not a dead one's offer, when that signature is acknowledged.
    """
    own = uuid4().hex
    if rank == 0:
        store.set("offer", own)
        for other in range(1, size):
            store.set(f"{own}/acknowledged/{other}", store.get(f"{own}/signed/{other}").decode())  # `get` waits
        return dist.PrefixStore(own, store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        offer = store.get("offer").decode()
        store.set(f"{offer}/signed/{rank}", own)
        with suppress(dist.DistStoreError):  # not yet, or never: perhaps there is another offer by now
            store.wait([f"{offer}/acknowledged/{rank}"], timedelta(seconds=1))
            if store.get(f"{offer}/acknowledged/{rank}").decode() == own:
                return dist.PrefixStore(offer, store)
        time.sleep(0.02)
    raise UserError(
        f"The first of {size} processes did not answer the one of rank {rank} within {TIMEOUT}; start them all anew."
    )


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
    trained = [p for p in parameters if p.requires_grad and not is_divided(p)]  # FSDP2 sums those that are
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
