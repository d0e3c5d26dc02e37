"""Batch normalisation that does not depend on slices or ranks: in trunks over fixed groups of samples, in heads over the global batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class StepStatistics:
    """Running statistics that move once a step. Those of each pass wait in `pending` until the trainer calls `move_statistics`; only
    passes with gradient count, since a step takes exactly one of those for every view of every sample."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    pending: list[Tensor]  # [2, channel] each: mean, unbiased variance

    def move_statistics(self, sum_over_ranks: Callable[[Tensor], Tensor], keep: bool) -> None:
        """Moves the running statistics to the mean of this step's (of all ranks), or forgets them when the step is skipped."""
        pending, self.pending = self.pending, []
        if not keep or not pending:
            return
        total = torch.stack(pending).sum(0)
        totals = sum_over_ranks(torch.cat([total.flatten(), total.new_tensor([len(pending)])]))
        mean, variance = (totals[:-1] / totals[-1]).view(2, -1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class GroupedBatchNorm2d(StepStatistics, nn.BatchNorm2d):  # type: ignore[misc]
    """BatchNorm over groups of `group` consecutive samples; slices and ranks must be multiples of it."""

    def __init__(self, num_features: int, group: int, eps: float, momentum: float) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.group = group
        self.pending = []

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        if len(input) % self.group:
            raise ValueError(
                f"a slice of {len(input)} samples is not a multiple of the batch-norm group of {self.group}"
            )
        outputs = []
        for chunk in input.split(self.group):
            statistics = torch.zeros(2, self.num_features, dtype=self.running_mean.dtype, device=input.device)
            mean, variance = statistics.unbind()  # F.batch_norm writes into them (momentum 1: replaces)
            outputs.append(F.batch_norm(chunk, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
            if torch.is_grad_enabled():
                self.pending.append(statistics)
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]


class GlobalBatchNorm1d(StepStatistics, nn.BatchNorm1d):  # type: ignore[misc]
    """BatchNorm over the rows of all ranks, for heads, which run in `objective`. Statistics are in at least float32."""

    def __init__(self, num_features: int, affine: bool = True) -> None:
        super().__init__(num_features, affine=affine)
        self.pending = []

    def forward(self, input: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """[batch, num_features], with the ranks' `gather` -> the same shape."""
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        x, mean, variance, rows = _Normalise.apply(x, self.eps, gather)
        if torch.is_grad_enabled() and rows:
            self.pending.append(torch.stack([mean, variance * rows / (rows - 1).clamp(min=1)]))
        if self.affine:
            x = x * self.weight + self.bias
        return x.to(input.dtype)


class _Normalise(torch.autograd.Function):
    """Rows less their mean, over their standard deviation, both over the rows of all ranks; and the mean, the variance and how many rows
    there are. For the gradient it keeps the result alone, where autograd would keep the centred rows, too."""

    @staticmethod
    def forward(context: Any, x: Tensor, eps: float, gather: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        rows = gather(x.new_tensor([len(x)])).sum()  # ranks may hold unequally many
        mean = gather(x.sum(0, keepdim=True)).sum(0) / rows.clamp(min=1)
        result = x - mean
        variance = gather(result.square().sum(0, keepdim=True)).sum(0) / rows.clamp(min=1)
        scale = (variance + eps).rsqrt()
        result *= scale
        context.gather = gather
        context.save_for_backward(result, scale, rows)
        context.mark_non_differentiable(mean, variance, rows)
        return result, mean, variance, rows

    @staticmethod
    @once_differentiable
    def backward(context: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        result, scale, rows = context.saved_tensors
        sums = torch.stack([gradient.sum(0), (gradient * result).sum(0)])[None]  # [1, 2, channel]
        with_ones, with_result = context.gather(sums).sum(0) / rows.clamp(min=1)
        of_x = (result * -with_result).add_(gradient).sub_(with_ones).mul_(scale)
        return of_x, None, None


def group_batch_norms(module: nn.Module, group: int) -> nn.Module:
    """Replaces every BatchNorm2d below `module` (timm's fused norm-activations included) by the grouped one, weights kept."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            grouped = GroupedBatchNorm2d(child.num_features, group, child.eps, child.momentum or 0.1)
            grouped.load_state_dict(child.state_dict())
            activation = [
                getattr(child, part) for part in ("drop", "act") if hasattr(child, part)
            ]  # timm's BatchNormAct2d
            setattr(module, name, nn.Sequential(grouped, *activation) if activation else grouped)
        else:
            group_batch_norms(child, group)
    return module
