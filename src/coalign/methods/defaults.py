"""Default settings by dataset size, for recipes that do not reproduce a paper."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coalign.config import NEW_LR, PRETRAINED_LR, OptimizerConfig, RoleConfig, TrainConfig

# settings of what a model starts from and which parts of it are trained, on which `fit_to_start` depends
START = (
    "pretrained", "image_tower", "text_tower", "head",
    "image_tuning", "text_tuning", "image_layer_decay", "text_layer_decay", "head_epochs",
)  # fmt: skip
EPOCHS, HEAD_EPOCHS = 10, 30  # of encoders that start from weights, and of new heads on locked ones


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
            batch_size=batch_size,
            epochs=30,
            caption_safe_views=True,
            optimizer=OptimizerConfig(
                lr=2e-3,
                weight_decay=0.2,
                warmup_fraction=0.1,
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
        caption_safe_views=True,
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.2, warmup_fraction=1 / 32),
    )


def starts_from_weights(config: TrainConfig) -> dict[str, bool]:
    """Returns which encoders start from pretrained weights."""
    return {
        "image": bool(config.pretrained or config.image_tower),
        "text": bool(config.pretrained or config.text_tower),
    }


def with_start(default: TrainConfig, config: TrainConfig) -> TrainConfig:
    """Returns the default settings of a run that starts as `config` does."""
    start = {name: getattr(config, name) for name in START}
    if all(value == getattr(default, name) for name, value in start.items()):
        return default
    return fit_to_start(replace(default, **start))


def fit_to_start(config: TrainConfig) -> TrainConfig:
    """Returns the settings with those of fine-tuning, if an encoder starts from pretrained weights.

    Encoders are trained for 10 epochs, after `head_epochs`, with a rate of 1e-5 and weight decay of 0.1 as in FLYP (Goyal et al. 2023), and
    new parts with a rate of 1e-3. If nothing but new parts is trained, for 30 epochs. The temperature is the pretrained model's.
    """
    tunings = [getattr(config, f"{role}_tuning") for role, starts in starts_from_weights(config).items() if starts]
    if not tunings:
        return config
    locked = all(tuning == "locked" for tuning in tunings)
    optimizer = OptimizerConfig(
        lr=NEW_LR if locked else PRETRAINED_LR,
        new_lr=None if locked else NEW_LR,
        weight_decay=0.1,
        warmup_fraction=0.1,
        betas=config.optimizer.betas,
        roles={role: RoleConfig() for role in config.optimizer.roles},
    )
    short = any(tuning not in ("locked", "last:0") for tuning in tunings)
    own = config.method_config
    if hasattr(own, "temperature") and hasattr(own, "max_logit_scale"):  # a learned temperature
        own = replace(own, temperature=None)
    epochs = config.head_epochs + EPOCHS if short else HEAD_EPOCHS
    return replace(config, optimizer=optimizer, epochs=epochs, method_config=own)


def _power_of_two(number: int) -> int:
    """Returns the largest power of two that is at most `number`."""
    return 1 << (number.bit_length() - 1)
