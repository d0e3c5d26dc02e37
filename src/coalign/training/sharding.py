"""Fully sharded data parallelism (FSDP2): parameters, gradients and optimizer states are sharded over processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from coalign.dtensor import sharded_like
from coalign.training.distributed import World

MIN_NUMEL = 1 << 16  # smaller layers are not worth a separate all-gather


def shard(module: nn.Module, world: World, whole: tuple[type[nn.Module], ...], min_numel: int = MIN_NUMEL) -> None:
    """Shards the weights of every layer with at least `min_numel` parameters. A layer is unsharded only while it computes.

    Layers are sharded one by one, not by block, because methods call parts of blocks. Modules that read weights without calling the layer
    are not sharded: torch's `MultiheadAttention`, and those of the types `whole`.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    excluded = {
        child
        for attention in module.modules()
        if isinstance(attention, (nn.MultiheadAttention, *whole))
        for child in attention.modules()
    }
    layer_types = (nn.Linear, nn.Conv2d, nn.Embedding)
    for layer in [m for m in module.modules() if isinstance(m, layer_types) and m not in excluded]:
        if sum(p.numel() for p in layer.parameters(recurse=False)) >= min_numel:
            layer.to(memory_format=torch.contiguous_format)  # FSDP cannot shard channels-last weights
            fsdp: Any = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            # each rank's loss is its share of the global loss: gradients are summed, not averaged
            fsdp.set_gradient_divide_factor(1.0)
            fsdp.set_force_sum_reduction_for_comms(True)


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """Context in which every process holds the full weights, so that one process can run the model alone. All processes must enter it."""
    layers = [layer for layer in module.modules() if isinstance(layer, FSDPModule)]
    for layer in layers:
        layer.set_reshard_after_forward(False)
        layer.unshard()
    try:
        yield
    finally:
        for layer in layers:
            layer.reshard()
            layer.set_reshard_after_forward(True)


def full_tensors(values: Any, keep: bool) -> Any:
    """Returns nested dicts with every sharded tensor gathered to the CPU, as an unsharded run would save them.

    All processes must call it. On a process without `keep`, None stands for each sharded tensor.
    """
    if isinstance(values, DTensor):
        full = values.full_tensor()
        return full.cpu() if keep else None
    if isinstance(values, Mapping):
        return {name: full_tensors(value, keep) for name, value in values.items()}
    return values


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Loads a state dict of full tensors into a module whose parameters may be sharded."""
    own = module.state_dict()
    module.load_state_dict(
        {name: sharded_like(own[name], value) if name in own else value for name, value in weights.items()}
    )
