"""Reads files of weights: safetensors, and PyTorch files that contain only tensors. Nothing else is unpickled."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from coalign.errors import UserError, first_line

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_STATES = ("state_dict_ema", "state_dict", "model")  # keys of the weights in a training checkpoint, best first
_FIRST_BYTES = (b"P", b"\x80")  # of zip files and pickles
_PREFIXES = ("module.", "_orig_mod.")  # of wrapped modules


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Returns the weights of a file by name; half-precision weights as float32. Raises UserError if it cannot be read, or contains anything
    but tensors."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"The weights file {path} does not exist.")
    if path.suffix not in SUFFIXES:
        raise UserError(f"The weights file {path} has an unknown type; use one of {', '.join(SUFFIXES)}.")
    state = _load(path)
    for key in _STATES:
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    is_state = isinstance(state, Mapping) and all(isinstance(value, Tensor) for value in state.values())
    if not is_state or not state:
        raise UserError(f"The weights file {path} is not a dictionary of tensors; save the model's state_dict().")
    weights = {str(name): value.float() if value.is_floating_point() else value for name, value in state.items()}
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def _load(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            if file.read(1) not in _FIRST_BYTES:  # such as a web page or a pointer of Git LFS
                raise UserError(f"The weights file {path} is not a file of PyTorch; download it again.")
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError:
        raise UserError(
            f"The weights file {path} contains pickled objects other than tensors, which are never loaded; save the model's state_dict() "
            "alone, best as .safetensors."
        ) from None
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        reason = first_line(error).rstrip(".")
        raise UserError(
            f"The weights file {path} cannot be read: {reason}; if it is cut off, download it again."
        ) from error


def fit_weights(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], classifiers: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """Returns `weights` by the names of `expected`, a state_dict. Raises ValueError with the reason if they do not fit.

    If the names differ, tensors are matched in order, provided that all shapes and the last parts of all names are equal. `weights` may
    lack the number of batches of BatchNorm, and may have more: the layers `classifiers`; in order, two tensors at the end.
    """
    counts = {name: value for name, value in expected.items() if name.endswith("num_batches_tracked")}
    needed = [name for name in expected if name not in counts]
    given = {name: value for name, value in weights.items() if not name.endswith("num_batches_tracked")}
    missing = [name for name in needed if name not in given]
    if missing:
        pairs = list(zip(needed, given))
        if len(given) - len(needed) not in (0, 1, 2) or any(
            expected[own].shape != given[other].shape or own.rpartition(".")[2] != other.rpartition(".")[2]
            for own, other in pairs
        ):
            raise ValueError(f"{missing[0]} is missing")
        return {**counts, **{own: given[other] for own, other in pairs}}
    own_counts = {name: value for name, value in weights.items() if name in counts}
    unexpected = [name for name in given if name not in expected and not name.startswith(classifiers)]
    if unexpected:
        raise ValueError(f"{unexpected[0]} is not a part of the model")
    for name in needed:
        if given[name].shape != expected[name].shape:
            raise ValueError(f"{name} has shape {list(given[name].shape)} instead of {list(expected[name].shape)}")
    return {**counts, **own_counts, **{name: given[name] for name in needed}}
