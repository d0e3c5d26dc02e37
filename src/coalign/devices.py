"""The device that a command computes on: the best there is, unless it is given."""

from __future__ import annotations

import torch

from coalign.errors import UserError


def best_device(device: str | None) -> str:
    """Returns the name of the device: as given, else "cuda", "mps" (an Apple GPU) or "cpu", the first that this machine has.

    Raises UserError if PyTorch does not know the given device, or this machine does not have it.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"There is no device {device!r}; --device must be cpu, cuda, cuda:N or mps.")
    if chosen.type == "cuda" and (chosen.index or 0) >= (count := torch.cuda.device_count()):
        raise UserError(
            f"There is no device {device!r}: this machine has {count} CUDA devices; choose another --device."
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"There is no device {device!r}: PyTorch finds no Apple GPU here; choose another --device.")
    return device


def copies_asynchronously(device: str | torch.device) -> bool:
    """Whether copies to the device may be asynchronous. To an Apple GPU, they may read memory that is already freed (pytorch#189690)."""
    return torch.device(device).type == "cuda"


def device_line(device: str | torch.device) -> str:
    """Returns a line that names the device, such as "Device: cuda (NVIDIA H200)"."""
    chosen = torch.device(device)
    if chosen.type == "cuda":
        detail = torch.cuda.get_device_name(chosen)
    elif chosen.type == "mps":
        detail = "Apple GPU"
    else:
        threads = torch.get_num_threads()
        detail = f"{threads} thread{'' if threads == 1 else 's'}"
    return f"Device: {chosen} ({detail})"
