"""What a table of experiments is: arms that differ in what they test and share everything else. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from coalign.config import TrainConfig
from coalign.optim import RoleConfig
from coalign.recipes import recipe, recipes

QUEUE: dict[str, dict[str, Any]] = {"mct": {"queue_size": 256}}  # the recipe's share of the tables' batches of 128
PAPER_PAIRS = 1_000_000  # the papers' own recipes do not depend on the number of pairs


@dataclass(frozen=True)
class Arm:
    """One row of a table: a recipe with changes to the method's settings."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the method's configuration
    epochs: float = 1.0  # times the table's, of all pairs: an arm on fewer sees them so much more often
    batch: float = 1.0  # times the table's batch size
    image_lr: float | None = None  # peak learning rate of the image tower, where it was tuned for this arm
    train_fraction: float = 1.0  # of the training pairs
    rest_as_texts: bool = False  # the others are trained on by their captions alone
    paper: float | None = None  # what the paper reports of this row, in the table's `paper`

    @property
    def share(self) -> float:
        """Of the training samples, what an epoch has, with or without their images."""
        return 1.0 if self.rest_as_texts else self.train_fraction


@dataclass(frozen=True)
class Table:
    """A sweep. Differences are to the first arm; every arm is trained with every seed."""

    title: str
    arms: Mapping[str, Arm]
    epochs: float
    remark: str = ""  # what to know of how the settings were chosen
    batch_size: int | None = 128  # None: the recipe's
    image_size: int | None = 48
    val_fraction: float = 0.1
    evals: int = 5
    image_lr: float | None = None  # of the arms that have none of their own; None: the recipe's
    classes: tuple[str, ...] = ()  # of zero-shot and of the probe, looked for in the samples' labels and tags
    probe: bool = False
    # recipe -> further changes to its method's configuration, which only this scale needs
    small: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    tag_scenes: int = (
        0  # where not 0, every arm starts from an image tower that has learnt the tags of so many other scenes
    )
    test_splits: tuple[str, ...] = ()  # of the data, evaluated at the end beside the held-out pairs
    # (lower, higher): by the paper, or by what a control is for, the second arm is better
    claims: tuple[tuple[str, str], ...] = ()
    headlines: tuple[str, ...] = ("retrieval.image_to_text.r10",)  # the figures that the claims are about
    paper: str = ""  # what the arms' `paper` is a figure of, in per cent, and where it is printed
    paper_recipe: str = ""  # of the paper's own runs, where {method} is an arm's recipe; "": the table is ours alone
    paper_task: str = "zeroshot:imagenet"  # what the paper evaluates by

    def config(self, arm: str, seed: int, num_pairs: int) -> TrainConfig:
        """The settings of one trial on that many training pairs."""
        row = self.arms[arm]
        all_pairs = round(num_pairs / row.share)
        config = recipe(row.recipe)(all_pairs)  # the model is that of all pairs
        batch_size = round((self.batch_size or config.batch_size) * row.batch)
        epochs = self.epochs * row.epochs
        if row.train_fraction < 1:  # as many steps as on all pairs; an epoch's last incomplete batch is no step
            epochs *= all_pairs // (self.batch_size or config.batch_size) / row.batch / max(1, num_pairs // batch_size)
        image_lr = row.image_lr or self.image_lr
        roles = {"image": RoleConfig(lr=image_lr)} if image_lr else {}
        return replace(
            config,
            method_config=replace(config.method_config, **{**self.small.get(row.recipe, {}), **row.changes}),
            epochs=epochs,
            batch_size=batch_size,
            image_size=self.image_size or config.image_size,
            val_fraction=self.val_fraction,
            train_fraction=row.train_fraction,
            rest_as_texts=row.rest_as_texts,
            test_splits=self.test_splits,
            probe=self.probe,
            evals=self.evals,
            seed=seed,
            optimiser=replace(config.optimiser, roles={**config.optimiser.roles, **roles}),
        )

    def paper_config(self, arm: str, seed: int) -> tuple[str, TrainConfig] | None:
        """The paper's recipe for an arm, by name, and its settings at that scale; None where there is no such recipe."""
        row = self.arms[arm]
        name = self.paper_recipe.format(method=row.recipe)
        if name not in recipes():
            return None
        config = recipe(name)(PAPER_PAIRS)
        return name, replace(
            config,
            method_config=replace(config.method_config, **row.changes),
            epochs=config.epochs * row.epochs / row.train_fraction,
            batch_size=round(config.batch_size * row.batch),
            train_fraction=row.train_fraction,
            seed=seed,
        )


def chain(*arms: str) -> tuple[tuple[str, str], ...]:
    """The claims of an order, the worst first: each step is one."""
    return tuple(pairwise(arms))


def fraction_name(arm: str, fraction: float) -> str:
    """Of an arm on a share of the pairs."""
    return arm if fraction == 1 else f"{arm}, {100 * fraction:g} %"


def by_fraction(arms: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms on all, half and a quarter of the pairs."""
    return {
        fraction_name(name, share): replace(arm, train_fraction=share)
        for share in (1.0, 0.5, 0.25)
        for name, arm in arms.items()
    }
