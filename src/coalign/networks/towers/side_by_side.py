"""Runs the two towers of a small model at the same time, each in a thread of its own, forward and backward.

Operations of small models are too short to be split among cores: to wake up a thread takes about as long. Towers do not depend on each
other up to the loss, so their threads wait for each other twice per step instead of hundreds of times, which also matters beside other busy
programs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm

from coalign.networks.towers.spec import Tower
from coalign.types import Features

MAX_SHARE = 0.7  # of the larger tower; beyond it, each operation is better split among cores
TYPICAL_TOKENS = 16  # of a caption
# after which a waiting thread is given the GIL; the default of 5 ms is as long as whole operations here
SWITCH_SECONDS = 0.0005
_worker: ThreadPoolExecutor | None = None  # the second thread, in the context `side_by_side`


@contextmanager
def side_by_side() -> Iterator[None]:
    """Context in which `both` runs in two threads. Each has half of torch's threads, also outside of `both`."""
    global _worker
    threads, interval = torch.get_num_threads(), sys.getswitchinterval()
    half = max(1, threads // 2)
    with ThreadPoolExecutor(1, "tower", _start, (half,)) as worker:
        worker.submit(int).result()  # starts the thread now, as it also sets the default of threads that start later
        torch.set_num_threads(half)
        sys.setswitchinterval(SWITCH_SECONDS)
        _worker = worker
        try:
            yield
        finally:
            _worker = None
            sys.setswitchinterval(interval)
            torch.set_num_threads(threads)


def _start(threads: int) -> None:
    torch.set_num_threads(threads)
    # Threads share the cache of cast weights, which is cleared when the outermost autocast context of any of them ends. Here, none ends.
    torch.autocast_increment_nesting()


def both(images: Callable[[], Features], texts: Callable[[], Features]) -> Features:
    """Returns the features of two functions that share no trained weights, and of which at most one draws random numbers.

    In the context `side_by_side`, they run at the same time, and so do their backward passes. The results are the same.
    """
    if _worker is None:
        return images() | texts()
    features = _at_once(_worker, images, _with_modes_of_this_thread(texts))
    if not torch.is_grad_enabled():
        return features[0] | features[1]
    leaves = [value.detach().requires_grad_(value.requires_grad) for part in features for value in part.values()]
    joined = _Join.apply(_worker, [list(part.values()) for part in features], *leaves)
    return dict(zip([*features[0], *features[1]], joined))


def _with_modes_of_this_thread(function: Callable[[], Features]) -> Callable[[], Features]:
    """Adds autocast and gradient mode, of which every thread has its own."""
    grad, autocast, dtype = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu")

    def run() -> Features:
        with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype, enabled=autocast):
            return function()

    return run


def _at_once(worker: ThreadPoolExecutor, first: Callable[[], Any], second: Callable[[], Any]) -> tuple[Any, Any]:
    running = worker.submit(second)
    try:
        result = first()
    finally:
        running.exception()  # waits for the end
    return result, running.result()


class _Join(torch.autograd.Function):
    """The identity. Its backward runs the backward passes of two lists of outputs at once."""

    @staticmethod
    def forward(
        ctx: Any, worker: ThreadPoolExecutor, outputs: list[list[Tensor]], *leaves: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.worker, ctx.outputs = worker, outputs
        ctx.set_materialize_grads(False)
        joined = tuple(leaf.view_as(leaf) for leaf in leaves)
        ctx.mark_non_differentiable(*(result for leaf, result in zip(leaves, joined) if not leaf.requires_grad))
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[None, ...]:
        first, second = ctx.outputs
        parts = ((first, gradients[: len(first)]), (second, gradients[len(first) :]))
        _at_once(ctx.worker, *(lambda part=part: _backward(*part) for part in parts))
        return (None,) * (2 + len(gradients))


def _backward(outputs: list[Tensor], gradients: tuple[Tensor | None, ...]) -> None:
    used = [(output, gradient) for output, gradient in zip(outputs, gradients) if gradient is not None]
    if used:
        torch.autograd.backward([output for output, _ in used], [gradient for _, gradient in used])


def suit_side_by_side(image: Tower, text: Tower, num_images: int, num_texts: int) -> bool:
    """Returns whether two towers are suited: neither does nearly all of the work, judged by the activations of `num_images` and `num_texts`
    views, and neither draws random numbers, whose order would depend on the threads. The towers are in training mode afterwards."""
    for tower in (image, text):
        tower.train()
        for module in tower.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
    size = image.image_size or 0
    pixels = torch.zeros((2, 3, size, size), dtype=torch.uint8)
    tokens = min(TYPICAL_TOKENS, text.context_length or TYPICAL_TOKENS)
    state = torch.get_rng_state()
    costs = (
        num_images * _saved_bytes(lambda: image(pixels)),
        num_texts * _saved_bytes(lambda: text(torch.zeros((2, tokens), dtype=torch.int64), torch.full((2,), tokens))),
    )
    draws = not torch.equal(state, torch.get_rng_state())
    image.train()
    text.train()
    return not draws and max(costs) < MAX_SHARE * sum(costs)


def _saved_bytes(function: Callable[[], Any]) -> int:
    """Returns the bytes that a function keeps for its gradient."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        function()
    return total
