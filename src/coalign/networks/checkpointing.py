"""Gradient checkpointing: the forward pass of a block keeps only its inputs, and the backward pass recomputes the rest.

Values, gradients and random numbers are those of a step without it. Batch statistics of a recomputed pass are discarded, so that running
statistics are updated once per step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from coalign.networks.batch_norm import StepStatistics
from coalign.networks.blocks import find_blocks
from coalign.networks.open_clip_parts import Transformer

_calls: list[partial[Any]] | None = None  # see `recorded_blocks`


def checkpoint_blocks(tower: nn.Module) -> bool:
    """Recomputes the blocks of a tower in the backward pass, from now on. Returns whether it has any: a CNN without residual blocks, such
    as VGG, does not."""
    transformers = [module for module in tower.modules() if isinstance(module, Transformer)]
    for transformer in transformers:
        transformer.grad_checkpointing = True  # for open_clip's own forward pass, and for ours
    blocks: list[Any] = find_blocks(tower, of_transformers=False)  # a Transformer's check its flag
    for block in blocks:
        norms = [module for module in block.modules() if isinstance(module, StepStatistics)]
        block.forward = partial(_with_statistics, norms, block.forward) if norms else partial(recomputed, block.forward)
    return bool(transformers or blocks)


def recomputed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Returns `function(*args, **options)`, whose intermediate results are recomputed in the backward pass."""
    if not torch.is_grad_enabled():
        return function(*args, **options)
    if _calls is not None:
        _calls.append(partial(function, *args, **options))
    return checkpoint(function, *args, use_reentrant=False, **options)


# torch.compile compiles what a block calls; it cannot compile a recomputation that changes lists
@torch.compiler.disable(recursive=False)
def _with_statistics(norms: Sequence[StepStatistics], function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """`recomputed` for a function with batch norms."""
    is_first = True

    def run(*args: Any, **options: Any) -> Any:
        nonlocal is_first
        with nullcontext() if is_first else _discarded_statistics(norms):
            is_first = False
            return function(*args, **options)

    return recomputed(run, *args, **options)


@contextmanager
def _discarded_statistics(norms: Sequence[StepStatistics]) -> Iterator[None]:
    """Context in which statistics of `norms` are not added to this step's."""
    kept = [norm.pending for norm in norms]
    for norm in norms:
        norm.pending = []
    try:
        yield
    finally:
        for norm, pending in zip(norms, kept):
            norm.pending = pending


@contextmanager
def recorded_blocks() -> Iterator[list[partial[Any]]]:
    """Context that yields a list of the calls of checkpointed blocks, of which each can be repeated."""
    global _calls
    _calls = []
    try:
        yield _calls
    finally:
        _calls = None
