"""The peak of memory: of this process as Linux sees it, which can be cleared, and of the tensors alone."""

import weakref
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def clear_peak() -> None:
    """The peak is what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak() -> float:
    """GB of the largest resident set since it was last cleared."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


class TensorPeak(TorchDispatchMode):
    """GB of the tensors that are made under it and still in use, at the most (`peak`): what `torch.cuda.max_memory_allocated` counts on a
    GPU. What an allocator keeps beside them is not in it."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0.0
        self._held: dict[int, int] = {}
        self._now = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {_storage(t)._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = _storage(tensor)
                if storage._cdata not in self._held and storage._cdata not in given:
                    self._held[storage._cdata] = storage.nbytes()
                    self._now += storage.nbytes()
                    self.peak = max(self.peak, self._now / 2**30)
                    weakref.finalize(storage, self._gone, storage._cdata)
        return result

    def _gone(self, key: int) -> None:
        self._now -= self._held.pop(key, 0)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()
