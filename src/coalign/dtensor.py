"""Helpers for sharded tensors (DTensor, as used by FSDP2). Does not import torch at module level, to keep the command line's help fast."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor."""
    return hasattr(tensor, "to_local")  # isinstance would import torch.distributed.tensor in every run


def local_part(tensor: Tensor) -> Tensor:
    """Returns the shard on this process, sharing its memory, or the tensor itself if it is not sharded."""
    local: Tensor = tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return local


def sharded_like(reference: Tensor, value: Tensor) -> Tensor:
    """Shards `value`, which is the same full tensor on every process, like `reference`. Returns it as is if `reference` is not sharded."""
    if not is_sharded(reference):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    return distribute_tensor(value.to(reference.device, reference.dtype), reference.device_mesh, reference.placements)
