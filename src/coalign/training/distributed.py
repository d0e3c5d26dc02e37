"""Distributed training: rank and world size, equal token axes, the differentiable all-gather, and the gradient all-reduce."""

from __future__ import annotations

import atexit
import os
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F

from coalign.devices import best_device
from coalign.dtensor import is_sharded
from coalign.errors import UserError
from coalign.randomness import stable_hash
from coalign.training.stopwatch import timed
from coalign.types import NOT_MASKED, Batch, TextView

TIMEOUT = timedelta(minutes=10)  # for a process to start, and for a collective
BUCKET_ELEMENTS = 8_000_000  # 32 MB of float32 per all-reduce


@dataclass(frozen=True)
class World:
    """Rank of this process, number of processes, and the device to train on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Returns the sum over ranks, without gradient."""
        total = tensor.detach().clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def max(self, values: Sequence[int]) -> list[int]:
        """Returns the elementwise maximum over ranks. All ranks must pass the same number of values."""
        if self.size == 1:
            return list(values)
        largest = torch.tensor(values, dtype=torch.int64, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return largest.tolist()

    def broadcast(self, value: Any) -> Any:
        """Returns the first rank's value on every rank."""
        if self.size == 1:
            return value
        holder = [value]
        dist.broadcast_object_list(holder, src=0, device=self.device)
        return holder[0]

    def gather_objects(self, value: Any) -> list[Any]:
        """Returns the values of all ranks, in rank order, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()


def join_world(device: str | None = None) -> World:
    """Joins the process group of torchrun (environment variables RANK, WORLD_SIZE, LOCAL_RANK), if there is one.

    device: as in `best_device`. Raises UserError if there is no such device, or if it serves only one process.
    """
    size, rank, local_rank = (
        int(os.environ.get(name, default)) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    chosen = torch.device(best_device(device))
    if chosen.type == "mps" and size > 1:
        raise UserError("Several processes cannot compute on an Apple GPU; use one process, or --device cpu.")
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
            atexit.register(_destroy_process_group)
    return World(rank, size, chosen)


def _destroy_process_group() -> None:
    """Joins gloo's threads before the interpreter exits: freeing a tensor after that would abort the process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def fresh_prefix(store: dist.Store, rank: int, size: int) -> dist.Store:
    """Returns the store under a prefix that is new in this start of the processes and equal on all ranks.

    torchrun keeps one store across restarts, including the addresses of dead processes. Its restart count cannot identify a start,
    because each machine has its own count. So rank 0 offers a prefix, and every other rank signs the offer with a token. If the token
    is acknowledged, the offer comes from the live rank 0 and not from a dead one. Raises UserError after `TIMEOUT`.
    """
    token = uuid4().hex
    if rank == 0:
        store.set("offer", token)
        for other in range(1, size):
            store.set(f"{token}/acknowledged/{other}", store.get(f"{token}/signed/{other}").decode())  # `get` blocks
        return dist.PrefixStore(token, store)
    deadline = time.monotonic() + TIMEOUT.total_seconds()
    while time.monotonic() < deadline:
        offer = store.get("offer").decode()
        store.set(f"{offer}/signed/{rank}", token)
        with suppress(dist.DistStoreError):  # timed out: rank 0 is not there yet, or the offer is a dead process's
            store.wait([f"{offer}/acknowledged/{rank}"], timedelta(seconds=1))
            if store.get(f"{offer}/acknowledged/{rank}").decode() == token:
                return dist.PrefixStore(offer, store)
        time.sleep(0.02)
    raise UserError(
        f"Rank 0 of {size} processes did not respond to rank {rank} within {TIMEOUT}; restart all processes."
    )


def pad_to_global_batch(batch: Batch, world: World) -> Batch:
    """Pads captions and tags to the longest of the global batch, because the loader pads them to the longest of this rank's samples.

    Any tensor with a token axis can then be gathered. Communicates one integer per text view.
    """
    lengths = [view.ids.shape[1] for view in batch.texts.values()]
    lengths += [] if batch.tags is None else [batch.tags.shape[1]]
    if world.size == 1 or not lengths:
        return batch
    with timed("communication"):
        longest = world.max(lengths)
    texts = {name: _pad_text(view, length) for (name, view), length in zip(batch.texts.items(), longest)}
    tags = None if batch.tags is None else _pad(batch.tags, longest[-1], -1)
    return replace(batch, texts=texts, tags=tags)


def _pad_text(view: TextView, length: int) -> TextView:
    labels = None if view.labels is None else _pad(view.labels, length, NOT_MASKED)
    return replace(view, ids=_pad(view.ids, length, 0), labels=labels)


def _pad(rows: Tensor, length: int, value: int) -> Tensor:
    return F.pad(rows, (0, length - rows.shape[1]), value=value)


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        context.rows = len(tensor)
        pieces = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(pieces, tensor.contiguous())
        return torch.cat(pieces)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Tensor:
        # our rows are columns in the loss of every rank, so their gradient is the sum over ranks
        total = gradients[0].contiguous()
        dist.all_reduce(total)
        start = dist.get_rank() * context.rows
        return total[start : start + context.rows]


class RankGather:
    """All-gathers rows in global order, differentiable (implements `types.Gather`).

    All ranks must call it equally often, in the same order. Each call first checks that shapes and dtypes are equal on all ranks, with one
    all-reduce of two integers. A rank must not skip this for shapes that it has checked before: it cannot know whether another rank's
    shape is new, and one rank would wait in the check while the other waits in the all-gather.
    """

    def __init__(self, world: World) -> None:
        self.world = world

    def __call__(self, tensor: Tensor) -> Tensor:
        if self.world.size == 1:
            return tensor
        with timed("communication"):
            self._check(tensor)
            return _AllGather.apply(tensor)

    def sum(self, tensor: Tensor) -> Tensor:
        with timed("communication"):
            return self.world.sum(tensor)

    def global_indices(self, tensor: Tensor) -> Tensor:
        return torch.arange(len(tensor), device=tensor.device) + self.world.rank * len(tensor)

    def _check(self, tensor: Tensor) -> None:
        """Raises ValueError on all ranks if shapes or dtypes differ between ranks."""
        signature = (tuple(tensor.shape), str(tensor.dtype))
        key = stable_hash(*signature)
        largest, negated_smallest = self.world.max([key, -key])
        if largest != -negated_smallest:  # on all ranks, so that all of them gather the signatures
            raise ValueError(_mismatch(self.world.gather_objects(signature)))


def _mismatch(signatures: Sequence[tuple[tuple[int, ...], str]]) -> str:
    """Describes how the first differing rank differs from rank 0. `signatures`: shape and dtype on each rank."""
    rank = next(rank for rank, signature in enumerate(signatures) if signature != signatures[0])
    (shape, dtype), (other_shape, other_dtype) = signatures[0], signatures[rank]
    requirements: list[tuple[str, object, object]] = [
        ("equal trailing dimensions", list(shape[1:]), list(other_shape[1:])),
        ("the same number of rows", list(shape), list(other_shape)),
        ("the same dtype", dtype, other_dtype),
    ]
    what, one, other = next(requirement for requirement in requirements if requirement[1] != requirement[2])
    return f"Gather requires {what} on all ranks, but rank 0 has {one} and rank {rank} has {other}."


def reduce_gradients(parameters: Iterable[nn.Parameter], world: World) -> None:
    """Sums gradients over ranks, in buckets. A missing gradient counts as zero; if it is missing on all ranks, it stays None.

    Each rank's loss is its share of the global loss (see LossTerm), so the sum is the gradient of the global loss.
    """
    if world.size == 1:
        return
    trained = [p for p in parameters if p.requires_grad and not is_sharded(p)]  # FSDP2 reduces sharded ones
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
