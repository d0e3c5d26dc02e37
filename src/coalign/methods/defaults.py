"""Default settings by dataset size, for recipes that do not reproduce a paper."""

from __future__ import annotations

from typing import Any

from coalign.config import OptimizerConfig, RoleConfig, TrainConfig


def default_config(num_pairs: int, method: str, method_config: Any) -> TrainConfig:
    """Returns settings chosen by the number of training pairs.

    Below 20,000 pairs the model is `tiny`, below 100,000 `small`: both take 64-pixel images, train their own vocabulary and run for 30
    epochs with a learning rate of 2e-3. Below a million pairs it is ViT-S-32, above that ViT-B-32 as in the papers. On small data, a
    batch holds at most a tenth of the pairs, so that an epoch has several steps.
    """
    if num_pairs < 100_000:
        batch_size = _power_of_two(max(2, min(256, num_pairs // 10)))
        return TrainConfig(
            method=method,
            method_config=method_config,
            model="tiny" if num_pairs < 20_000 else "small",
            context_length=48,
            tokenizer="captions",
            batch_size=batch_size,
            epochs=30,
            optimizer=OptimizerConfig(
                lr=2e-3,
                weight_decay=0.2,
                warmup_fraction=0.1,
                final_lr=1e-5,
                # overrides nothing; listed so that --roles.scale.lr-multiplier is available
                roles={"scale": RoleConfig()},
            ),
        )
    paper_scale = num_pairs >= 1_000_000
    return TrainConfig(
        method=method,
        method_config=method_config,
        model="ViT-B-32" if paper_scale else "ViT-S-32",
        batch_size=4096 if paper_scale else 1024,
        epochs=32,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.2, warmup_fraction=1 / 32, final_lr=1e-5),
    )


def _power_of_two(number: int) -> int:
    """Returns the largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)
