"""Teachers and momentum encoders: exponential moving averages (EMA) of a trained module, and the schedules of their momentum."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from coalign.divided import own_share
from coalign.types import StepInfo

Module = TypeVar("Module", bound=nn.Module)


def ema_copy(student: Module) -> Module:
    """A copy with the same values and of its own memory, which no optimiser trains."""
    teacher = copy.deepcopy(student)
    return teacher.requires_grad_(False)


@torch.no_grad()
def move_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """θ̄ ← m·θ̄ + (1 − m)·θ for every parameter and every floating-point buffer; whole numbers are copied.

    Running statistics are averaged like the weights: they describe activations under the student's weights of the last steps, so their
    average over the same steps fits the teacher's weights, where a copy would be ahead of them. They are read in evaluation mode only.
    """
    ours, theirs = _tensors(teacher), _tensors(student)
    if [tensor.shape for tensor in ours] != [tensor.shape for tensor in theirs]:
        raise ValueError("the teacher is no copy of the student")
    averaged = [(to, of) for to, of in zip(ours, theirs) if to.is_floating_point()]
    if averaged:
        torch._foreach_lerp_([to for to, _ in averaged], [of for _, of in averaged], 1 - momentum)
    for to, of in zip(ours, theirs):
        if not to.is_floating_point():
            to.copy_(of)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    found = [*module.parameters(), *module.buffers()]
    return [own_share(tensor) for tensor in found]  # teacher and student are divided alike


def cosine_momentum(start: float, step: StepInfo) -> float:
    """From `start` at the first step to 1 at the end of the run, on half a cosine (BYOL; MCD, Eq. 12)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(1.0, step.fraction))) / 2


def momentum_for(total_steps: int, updates: int = 113, least: float = 0.004, most: float = 0.1) -> float:
    """The start of the momentum for a run of this length: 1 − updates/total_steps, where the student's share stays in `least` … `most`.

    The teacher then averages the same part of a short run as of a paper's. The defaults give 0.996 from 28,250 steps on (MCD, OneR);
    46 and 0.001 give MoCo's 0.999 from 46,000 steps on.
    """
    return 1 - min(max(updates / max(1, total_steps), least), most)
