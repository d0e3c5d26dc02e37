"""Parameters, gradients and optimiser states divided over processes (FSDP2), for models that are too large for one device each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from open_clip.modified_resnet import AttentionPool2d
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from coalign.divided import divided_like
from coalign.training.distributed import World

LEAST = 1 << 16  # parameters of a layer: smaller ones are not worth a communication of their own


def shard(module: nn.Module, world: World, least: int = LEAST) -> None:
    """Divides the weights of every large layer over the processes. A layer has them whole while it computes, and no longer.

    It is each layer by itself that is divided, not a block, as the methods read blocks in ways of their own. Attention stays whole where
    its weights are read without a call of their layer: torch's own, and the pooling of some ResNets.
    """
    mesh = init_device_mesh(world.device.type, (world.size,))
    read = {
        part
        for attention in module.modules()
        if isinstance(attention, (nn.MultiheadAttention, AttentionPool2d))
        for part in attention.modules()
    }
    for layer in [m for m in module.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.Embedding)) and m not in read]:
        if sum(p.numel() for p in layer.parameters(recurse=False)) >= least:
            layer.to(memory_format=torch.contiguous_format)  # FSDP cannot divide channels-last weights
            divided: Any = fully_shard(layer, mesh=mesh, reshard_after_forward=True)
            # the loss of a process is its share of the whole: gradients are added, not averaged
            divided.set_gradient_divide_factor(1.0)
            divided.set_force_sum_reduction_for_comms(True)


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Every process has all weights, so that one may compute alone. All must enter it."""
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


def gathered(values: Any, keep: bool) -> Any:
    """Nested dicts with every divided tensor whole, on the CPU: what a run without division saves. All processes must call it; one that
    does not `keep` them has None in their place."""
    if isinstance(values, DTensor):
        whole_value = values.full_tensor()
        return whole_value.cpu() if keep else None
    if isinstance(values, Mapping):
        return {name: gathered(value, keep) for name, value in values.items()}
    return values


def load_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """`load_state_dict` of whole tensors, of which divided parameters take their share."""
    own = module.state_dict()
    module.load_state_dict(
        {name: divided_like(own[name], value) if name in own else value for name, value in weights.items()}
    )
