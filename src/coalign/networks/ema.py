"""Teachers and momentum encoders: exponential moving averages (EMA) of a trained module, and their momentum schedules."""

from __future__ import annotations

import copy
import math
from typing import TypeVar

import torch
from torch import nn

from coalign.dtensor import local_part
from coalign.types import StepInfo

Module = TypeVar("Module", bound=nn.Module)


def ema_copy(student: Module) -> Module:
    """Returns a frozen deep copy of `student`."""
    teacher = copy.deepcopy(student)
    return teacher.requires_grad_(False)


@torch.no_grad()
def update_ema(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """Updates θ̄ ← m·θ̄ + (1 − m)·θ for all parameters and floating-point buffers; copies integer buffers. Raises ValueError if the shapes
    of teacher and student differ.

    Running statistics are averaged like the weights. They describe activations under the student's recent weights, so their average over
    the same steps matches the teacher's weights, while a copy would be ahead of them. They are used in evaluation mode only.
    """
    teacher_tensors, student_tensors = _local_tensors(teacher), _local_tensors(student)
    if [tensor.shape for tensor in teacher_tensors] != [tensor.shape for tensor in student_tensors]:
        raise ValueError("Teacher and student have different shapes; create the teacher with ema_copy.")
    averaged = [(t, s) for t, s in zip(teacher_tensors, student_tensors) if t.is_floating_point()]
    if averaged:
        torch._foreach_lerp_([t for t, _ in averaged], [s for _, s in averaged], 1 - momentum)
    for t, s in zip(teacher_tensors, student_tensors):
        if not t.is_floating_point():
            t.copy_(s)


def _local_tensors(module: nn.Module) -> list[torch.Tensor]:
    tensors = [*module.parameters(), *module.buffers()]
    return [local_part(tensor) for tensor in tensors]  # teacher and student are sharded in the same way


def cosine_momentum(start: float, step: StepInfo) -> float:
    """Returns a momentum that rises from `start` at the first step to 1 at the end of the run, on half a cosine (BYOL; MCD, Eq. 12)."""
    return 1 - (1 - start) * (1 + math.cos(math.pi * min(1.0, step.fraction))) / 2


def momentum_for(total_steps: int, updates: int = 113, min_rate: float = 0.004, max_rate: float = 0.1) -> float:
    """Returns the initial EMA momentum for a run of `total_steps`: 1 − updates/total_steps, with 1 − momentum in [min_rate, max_rate].

    In a short run, the teacher then averages over the same fraction of the run as in the paper's. The defaults give 0.996 from 28,250 steps
    on (MCD, OneR); 46 and 0.001 give MoCo's 0.999 from 46,000 steps on.
    """
    return 1 - min(max(updates / max(1, total_steps), min_rate), max_rate)
