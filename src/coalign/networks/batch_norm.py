"""Batch normalization independent of micro-batches and ranks: over fixed groups of samples in trunks, over the global batch in heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class StepStatistics:
    """Running statistics that are updated once per step.

    The statistics of each forward pass are kept in `pending` until the trainer takes them. Only passes with gradient count, because a
    step has exactly one of them for each view of each sample.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor
    momentum: float
    pending: list[Tensor]  # [2, channel] each: mean, unbiased variance

    def take_statistics(self) -> Tensor | None:
        """Removes this step's statistics. Returns the sum of the means, of the variances, and the number of passes, [2 · channel + 1];
        None if there are none."""
        pending, self.pending = self.pending, []
        if not pending:
            return None
        total = torch.stack(pending).sum(0)
        return torch.cat([total.flatten(), total.new_tensor([len(pending)])])

    def move_statistics(self, totals: Tensor) -> None:
        """Updates the running statistics with the mean of a step's. totals: what `take_statistics` returns, summed over ranks."""
        mean, variance = (totals[:-1] / totals[-1]).view(2, -1)
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(variance, self.momentum)
        self.num_batches_tracked += 1


class GroupedBatchNorm2d(StepStatistics, nn.BatchNorm2d):  # type: ignore[misc]
    """BatchNorm over groups of `group` consecutive samples. Batches and micro-batches of each rank must be multiples of `group`.

    `after`, without parameters, is applied to the result: the dropout and the activation of timm's fused layers.
    """

    def __init__(
        self, num_features: int, group: int, eps: float, momentum: float, after: nn.Module | None = None
    ) -> None:
        super().__init__(num_features, eps=eps, momentum=momentum)
        self.group, self.after = group, after or nn.Identity()
        self.pending = []

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return self.after(super().forward(input))
        if len(input) % self.group:
            raise ValueError(
                f"The number of samples is {len(input)}, but must be a multiple of the batch-norm group of {self.group}."
            )
        outputs = []
        # split copies the gradient, even of a single chunk
        for chunk in input.split(self.group) if len(input) > self.group else (input,):
            statistics = torch.zeros(2, self.num_features, dtype=self.running_mean.dtype, device=input.device)
            mean, variance = statistics.unbind()  # overwritten by F.batch_norm, as momentum is 1
            outputs.append(F.batch_norm(chunk, mean, variance, self.weight, self.bias, True, 1.0, self.eps))
            if torch.is_grad_enabled():
                self.pending.append(statistics)
        return self.after(torch.cat(outputs) if len(outputs) > 1 else outputs[0])


class GlobalBatchNorm1d(StepStatistics, nn.BatchNorm1d):  # type: ignore[misc]
    """BatchNorm over the rows of all ranks, for heads, which run in `objective`. Computes in at least float32."""

    def __init__(self, num_features: int, affine: bool = True) -> None:
        super().__init__(num_features, affine=affine)
        self.pending = []

    def forward(self, input: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:  # type: ignore[override]
        """Normalizes [batch, num_features] by the statistics over all ranks."""
        if not self.training:
            return super().forward(input)
        x = input.float() if input.dtype in (torch.bfloat16, torch.float16) else input
        x, mean, variance, rows = _Normalize.apply(x, self.eps, sum_over_ranks)
        if torch.is_grad_enabled() and rows:
            self.pending.append(torch.stack([mean, variance * rows / (rows - 1).clamp(min=1)]))
        if self.affine:
            x = x * self.weight + self.bias
        return x.to(input.dtype)


class _Normalize(torch.autograd.Function):
    """Standardizes the rows over all ranks. Also returns the mean, the variance and the number of rows.

    Saves only the result for the gradient; autograd would also save the centered rows.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, sum_over_ranks: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        rows = sum_over_ranks(x.new_tensor(len(x)))  # ranks may have different numbers of rows
        mean = sum_over_ranks(x.sum(0)) / rows.clamp(min=1)
        result = x - mean
        variance = sum_over_ranks(result.square().sum(0)) / rows.clamp(min=1)
        scale = (variance + eps).rsqrt()
        result *= scale
        ctx.sum_over_ranks = sum_over_ranks
        ctx.save_for_backward(result, scale, rows)
        ctx.mark_non_differentiable(mean, variance, rows)
        return result, mean, variance, rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor, None, None]:
        result, scale, rows = ctx.saved_tensors
        sums = torch.stack([gradient.sum(0), (gradient * result).sum(0)])  # [2, channel]
        gradient_mean, product_mean = ctx.sum_over_ranks(sums) / rows.clamp(min=1)
        x_grad = (result * -product_mean).add_(gradient).sub_(gradient_mean).mul_(scale)
        return x_grad, None, None


def group_batch_norms(module: nn.Module, group: int) -> nn.Module:
    """Replaces every BatchNorm2d in `module`, including timm's fused norm and activation, by a GroupedBatchNorm2d with the same weights.
    Returns `module`."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            after = nn.Sequential(*(getattr(child, part) for part in ("drop", "act") if hasattr(child, part)))
            grouped = GroupedBatchNorm2d(child.num_features, group, child.eps, child.momentum or 0.1, after)
            grouped.load_state_dict(child.state_dict())
            setattr(module, name, grouped)
        else:
            group_batch_norms(child, group)
    return module
