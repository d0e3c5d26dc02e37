"""Tensors of which every process holds a share (DTensor, FSDP2). Imports no torch at module level, as the optimisers' settings do not."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def is_divided(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")  # and not isinstance, for which one would import what few runs use


def own_share(tensor: Tensor) -> Tensor:
    """This process's part, which shares its memory; the tensor itself if it is whole."""
    share: Tensor = tensor.to_local() if is_divided(tensor) else tensor  # type: ignore[attr-defined]
    return share


def divided_like(own: Tensor, value: Tensor) -> Tensor:
    """`value`, whole and the same on every process, divided as `own` is; as it is if that is whole."""
    if not is_divided(own):
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(own, DTensor)
    return distribute_tensor(value.to(own.device, own.dtype), own.device_mesh, own.placements)
