"""Defaults that follow the size of the data, for the recipes that are not a row of a paper."""

from __future__ import annotations

from typing import Any

from coalign.config import TrainConfig
from coalign.optim import OptimiserConfig, RoleConfig


def small_data(num_pairs: int, method: str, method_config: Any) -> TrainConfig:
    """Settings by the number of training pairs: below 20,000 the model `tiny` and below 100,000 `small`, both at 64 pixels, with their own
    vocabulary and a few tens of epochs; below a million ViT-S-32; then ViT-B-32 as in the papers. The batch stays below a tenth of the
    data, so that an epoch has steps."""
    if num_pairs < 100_000:
        batch_size = _power_of_two(max(2, min(256, num_pairs // 10)))
        return TrainConfig(
            method=method,
            method_config=method_config,
            model="tiny" if num_pairs < 20_000 else "small",
            context_length=48,
            tokenizer="captions",
            batch_size=batch_size,
            batch_norm_group=min(32, batch_size),
            epochs=30,
            optimiser=OptimiserConfig(
                lr=1e-3,
                weight_decay=0.2,
                warmup_fraction=0.1,
                final_lr=1e-5,
                # nothing of its own, but named, so that --roles.scale.lr-multiplier can be given
                roles={"scale": RoleConfig()},
            ),
        )
    papers = num_pairs >= 1_000_000
    return TrainConfig(
        method=method,
        method_config=method_config,
        model="ViT-B-32" if papers else "ViT-S-32",
        batch_size=4096 if papers else 1024,
        epochs=32,
        optimiser=OptimiserConfig(lr=1e-3, weight_decay=0.2, warmup_fraction=1 / 32, final_lr=1e-5),
    )


def _power_of_two(number: int) -> int:
    """The largest that is not above."""
    return 1 << (number.bit_length() - 1)
