"""The random search of a table: what is drawn, how a run takes it, and how many trials its result needed. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, TypeVar

from coalign.config import OptimizerConfig, RoleConfig, TrainConfig
from coalign.types import AugmentationPolicy

Optimizer = TypeVar("Optimizer", OptimizerConfig, RoleConfig)
_RATES = ("lr", "new_lr", "start_lr", "final_lr")


@dataclass(frozen=True)
class Settings:
    """The settings of one trial. The default rates and views of the arm, and so their differences between arms, are kept.

    Attributes:
        lr_factor: Multiplies all learning rates of the arm.
        weight_decay: The weight decay. None: the arm's.
        crop: Exponent of the smallest crop area of every image view: 0.5 becomes 0.5 ** crop. Below 1, crops are weaker than the arm's.
    """

    lr_factor: float
    weight_decay: float | None
    crop: float


OWN = Settings(1.0, None, 1.0)  # those of the arm


@dataclass(frozen=True)
class Search:
    """Random search of settings and length, with the same draws for every arm.

    Successive halving (Jamieson & Talwalkar 2016): every trial is trained to the shortest length, and the better half of the trials of a
    length is extended to the next one.
    """

    epochs: tuple[float, ...]  # lengths of trials, ascending; they replace the epochs of the table
    trials: int = 12
    seed: int = 0  # of the draws
    lr_factor: tuple[float, float] = (0.25, 4.0)  # drawn log-uniformly, as is the weight decay
    weight_decay: tuple[float, float] = (0.01, 1.0)
    crop: tuple[float, float] = (0.25, 1.5)  # drawn uniformly
    own_first: bool = False  # the first trial has the arm's own settings, the others the first draws

    def draws(self) -> list[Settings]:
        """Returns the settings of the trials, which depend on nothing but this search."""
        random = Random(self.seed)

        def log_uniform(low: float, high: float) -> float:
            return math.exp(random.uniform(math.log(low), math.log(high)))

        drawn = [
            Settings(log_uniform(*self.lr_factor), log_uniform(*self.weight_decay), random.uniform(*self.crop))
            for _ in range(self.trials)
        ]
        return [OWN, *drawn[:-1]] if self.own_first else drawn


@dataclass(frozen=True)
class Choice:
    """Settings and length of a run, such as the best ones of a search.

    Attributes:
        settings: What the search drew.
        epochs: The length.
        shortest: The shortest length of the search. Longer runs have its warm-up, as they were extended from it.
    """

    settings: Settings
    epochs: float
    shortest: float


def halved(trials: int, times: int) -> int:
    """Returns how many of the trials of the shortest length are extended `times` times."""
    return math.ceil(trials / 2**times)


def crops_matter(config: TrainConfig) -> bool:
    """Returns whether a run crops its images: one of a locked image encoder whose single view is the evaluation view does not."""
    return not (config.image_tuning == "locked" and config.feature_views == 1)


def with_settings(config: TrainConfig, settings: Settings) -> TrainConfig:
    """Returns the configuration of an arm with the settings of a trial, and a constant rate before the cool-down."""
    optimizer = _with_rates(config.optimizer, settings)
    roles = {name: _with_rates(role, settings) for name, role in config.optimizer.roles.items()}
    config = replace(config, optimizer=replace(optimizer, schedule="constant", roles=roles))
    if not crops_matter(config):
        return config
    views: dict[str, Any] = {}
    for name, view in vars(config.method_config).items():
        if isinstance(view, AugmentationPolicy) and view.crop_scale is not None:
            smallest, largest = view.crop_scale
            views[name] = replace(view, crop_scale=(min(smallest**settings.crop, largest), largest))
    return replace(config, method_config=replace(config.method_config, **views))


def _with_rates(optimizer: Optimizer, settings: Settings) -> Optimizer:
    """Multiplies the learning rates that are set, and replaces the weight decay if both are set."""
    changes = {name: value * settings.lr_factor for name in _RATES if (value := getattr(optimizer, name)) is not None}
    if None not in (optimizer.weight_decay, settings.weight_decay):
        changes["weight_decay"] = settings.weight_decay
    return replace(optimizer, **changes)


def best_of(scores: Sequence[float]) -> list[float]:
    """Returns the expected best score of k of the trials, for k = 1 to all (Dodge et al. 2019).

    It is exact: the i-th lowest of n scores is the best of k in C(i - 1, k - 1) of the C(n, k) subsets. Dodge et al. draw the k trials with
    replacement, which is biased downwards (Tang et al. 2020).
    """
    ordered, n = sorted(scores), len(scores)
    return [
        sum(math.comb(below, k - 1) * score for below, score in enumerate(ordered)) / math.comb(n, k)
        for k in range(1, n + 1)
    ]
