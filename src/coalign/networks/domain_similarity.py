"""UniCLIP's similarity, with a separate temperature and offset for each combination of image and text."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from coalign.networks.logit_scale import TEMPERATURE

COMBINATIONS = ("image_image", "image_text", "text_text")  # D, in the order of `domain_combinations`


class DomainSimilarity(nn.Module):
    """Learned 1/τ_D (in log-space) and b_D of s_ij = exp((cos(z_i, z_j) − b_D) / τ_D) (UniCLIP, Eq. 16).

    `domains` [view, view] is the combination of each two views. With `shared` there is a single τ. Without `offsets`, b is fixed at zero,
    for cases in which it cancels (Eq. 15).
    """

    domains: Tensor

    def __init__(
        self, domains: Int[Tensor, "view view"], temperature: float | None, shared: bool, offsets: bool
    ) -> None:
        super().__init__()
        self.register_buffer("domains", domains * 0 if shared else domains, persistent=False)
        num_domains = 1 if shared else len(COMBINATIONS)
        self.log_logit_scales = nn.Parameter(torch.full([num_domains], math.log(1 / (temperature or TEMPERATURE))))
        self.offsets = nn.Parameter(torch.zeros(num_domains)) if offsets else None

    def forward(self) -> tuple[Float[Tensor, "view view"], Float[Tensor, "view view"]]:
        """Returns 1/τ_D and b_D for each pair of views."""
        logit_scales = self.log_logit_scales.exp()[self.domains]
        return logit_scales, torch.zeros_like(logit_scales) if self.offsets is None else self.offsets[self.domains]

    @torch.no_grad()
    def clamp_(self, max_logit_scale: float) -> None:
        """Clamps every 1/τ to [1, max_logit_scale]."""
        self.log_logit_scales.clamp_(0, math.log(max_logit_scale))

    def scalars(self) -> dict[str, Tensor]:
        """Returns every 1/τ_D and b_D by name. `logit_scale` is 1/τ of image-text pairs, as in other methods, or the shared 1/τ."""
        scales = self.log_logit_scales.detach().exp()
        names = ("logit_scale_image_image", "logit_scale", "logit_scale_text_text")
        scalars = {"logit_scale": scales[0]} if len(scales) == 1 else dict(zip(names, scales))
        if self.offsets is not None:
            scalars |= {f"offset_{name}": offset for name, offset in zip(COMBINATIONS, self.offsets.detach())}
        return scalars
