"""Peak memory: of this process, as measured by Linux, and of tensors alone."""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def clear_peak() -> None:
    """Resets the peak to the current resident set."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """Returns the largest resident set since the last `clear_peak`, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


class TensorPeak(TorchDispatchMode):
    """Context manager. `peak`: the maximum total size, in GB, of tensors that were created inside it and are alive.

    The counterpart of `torch.cuda.max_memory_allocated`; memory that the allocator caches is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0.0
        self._sizes: dict[int, int] = {}
        self._current = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        inputs = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = _storage(tensor)
                if storage._cdata not in self._sizes and storage._cdata not in inputs:
                    self._sizes[storage._cdata] = storage.nbytes()
                    self._current += storage.nbytes()
                    self.peak = max(self.peak, self._current / 2**30)
                    weakref.finalize(storage, self._freed, storage._cdata)
        return result

    def _freed(self, key: int) -> None:
        self._current -= self._sizes.pop(key, 0)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
