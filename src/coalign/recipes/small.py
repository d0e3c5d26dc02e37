"""Defaults that follow the size of the data, for the recipes that are not a row of a paper."""

from __future__ import annotations

from typing import Any

from coalign.config import TrainConfig
from coalign.optim import OptimiserConfig, RoleConfig


def small_data(num_pairs: int, method: str, method_config: Any) -> TrainConfig:
    """Settings by the number of training pairs: below 100,000 a small model at 64 pixels with its own vocabulary, a few tens of epochs;
    below a million ViT-S-32; then ViT-B-32 as in the papers. The batch stays below a tenth of the data, so that an epoch has steps."""
    batch_size = max(2, min(256, 2 ** (max(num_pairs, 20) // 10).bit_length() // 2))
    if num_pairs < 100_000:
        return TrainConfig(
            method=method,
            method_config=method_config,
            model="small",
            context_length=48,
            tokenizer="captions",
            batch_size=batch_size,
            epochs=30,
            optimiser=OptimiserConfig(
                lr=1e-3,
                weight_decay=0.2,
                warmup_fraction=0.1,
                final_lr=1e-5,
                roles={"scale": RoleConfig(lr_multiplier=10)},
            ),
        )
    small = num_pairs < 1_000_000
    return TrainConfig(
        method=method,
        method_config=method_config,
        model="ViT-S-32" if small else "ViT-B-32",
        batch_size=1024 if small else 4096,
        epochs=32,
        optimiser=OptimiserConfig(lr=1e-3, weight_decay=0.2, warmup_fraction=1 / 32, final_lr=1e-5),
    )
