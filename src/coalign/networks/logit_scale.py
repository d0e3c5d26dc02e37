"""The factor of the similarities in contrastive losses, 1/τ."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

TEMPERATURE = 0.07  # CLIP's initial temperature


class LogitScale(nn.Module):
    """1/τ, learned in log-space (CLIP, §2.3)."""

    def __init__(self, temperature: float | None) -> None:
        super().__init__()
        self.log = nn.Parameter(
            torch.tensor([math.log(1 / (temperature or TEMPERATURE))])
        )  # FSDP2 refuses 0-d parameters

    def forward(self) -> Float[Tensor, 1]:
        return self.log.exp()

    @torch.no_grad()
    def clamp_(self, max_logit_scale: float) -> None:
        """Clamps 1/τ to [1, max_logit_scale]."""
        self.log.clamp_(0, math.log(max_logit_scale))
