"""Tables of experiments: arms that differ in one thing and share every other setting. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

from coalign.config import DETECT, DataConfig, TrainConfig
from coalign.methods import recipe, recipes
from coalign.methods.search import Choice, Search

PAPER_PAIRS = 1_000_000  # placeholder: the papers' recipes do not depend on the number of pairs


@dataclass(frozen=True)
class Arm:
    """One row of a table: a recipe, with changes to the method's configuration."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the method's configuration
    epochs: float = 1.0  # multiplies the table's epochs, which count the full training split
    batch: float = 1.0  # multiplies the table's batch size
    # settings and length that another table's search chose; its epochs replace the table's
    choice: Choice | None = None
    train_fraction: float = 1.0  # fraction of the training pairs to train on
    unpaired_captions: bool = False  # also train on the captions of the remaining pairs, without their images
    paper: float | None = None  # the value the paper reports for this row (see `Table.paper_metric`)
    # settings of a run that starts from the pretrained encoders of `experiments.tables.pretrained_towers`, such as image_tuning, or None
    # for an encoder that starts from scratch; the others are the defaults of such runs. Empty: from scratch
    start: Mapping[str, Any] = field(default_factory=dict)
    # name of an arm of the same recipe: with its settings and this arm's `changes`, its weights are re-evaluated; nothing is trained
    weights_of: str = ""

    @property
    def sample_fraction(self) -> float:
        """Fraction of the training samples in one epoch, with or without their images."""
        return 1.0 if self.unpaired_captions else self.train_fraction


@dataclass(frozen=True)
class Table:
    """A sweep over arms. Every arm is trained with every seed, unless it evaluates another arm's weights; differences are relative to the
    first arm."""

    title: str
    arms: Mapping[str, Arm]
    epochs: float
    search: Search | None = None  # chooses settings and epochs on the held-out pairs; None: they are the table's
    note: str = ""  # how the settings were chosen
    batch_size: int | None = 128  # None: the recipe's
    image_size: int | None = 48  # None: the recipe's
    val_fraction: float = 0.1
    val_by: str | None = None  # hold out values of this column
    test_fraction: float = 0.0  # if the data has no test split
    evals: int = 5
    precision: Literal["auto", "fp32"] = "fp32"  # not the machine's fastest: trials of several machines are compared
    data: str = ""  # the data that it was made for, in words; it has the column `val_by` and `test_splits`
    reading: DataConfig = DETECT  # how the data is read
    classes: tuple[str, ...] = ()  # of zero-shot classification and the probe, matched against labels and tags
    probe: bool = False
    context_length: int | None = None  # None: the recipe's
    skip_data_checks: bool = False
    caption_safe_views: bool = False
    test_splits: tuple[str, ...] = ()  # evaluated at the end in addition to the held-out pairs
    # (lower, higher): the second arm is better, according to the paper or to the purpose of a control
    claims: tuple[tuple[str, str], ...] = ()
    # the metrics that decide the claims; see `parts`
    headline_metrics: tuple[str, ...] = ("retrieval.image_to_text.r10",)
    paper_metric: str = ""  # what the arms' `paper` values measure, in %, and where the paper reports them
    paper_recipe: str = ""  # name of the paper's recipe, with {method} for an arm's recipe; "": there is no such paper
    paper_task: str = "zeroshot:imagenet"  # the paper's evaluation task

    @property
    def retrieval_tasks(self) -> dict[str, str]:
        """Retrieval on the held-out pairs and on the test splits: task in the results of a trial -> its split."""
        return {"retrieval": "held out", **{f"retrieval_{split}": split for split in self.test_splits}}

    def whole(self, arm: str) -> str:
        """Returns the name of the same arm on all pairs; the arm itself if there is none."""
        on_all = replace(self.arms[arm], train_fraction=1.0)
        return next((name for name, other in self.arms.items() if other == on_all), arm)

    def config(self, arm: str, seed: int, num_pairs: int) -> TrainConfig:
        """Returns the settings of one trial on `num_pairs` training pairs, without `classes` and `probe` (see `Trial.config`)."""
        row = self.arms[arm]
        if row.weights_of:
            base = self.config(row.weights_of, seed, num_pairs)
            return replace(base, method_config=replace(base.method_config, **row.changes))
        all_pairs = round(num_pairs / row.sample_fraction)
        config = recipe(row.recipe)(all_pairs)  # arms on a fraction of the pairs use the model for all pairs
        batch_size = round((self.batch_size or config.batch_size) * row.batch)
        epochs = self.epochs * row.epochs
        if row.train_fraction < 1:  # the same number of steps as on all pairs; incomplete batches are dropped
            steps = max(1, all_pairs // (self.batch_size or config.batch_size))
            epochs *= steps / row.batch / max(1, num_pairs // batch_size)
        return replace(
            config,
            method_config=replace(config.method_config, **row.changes),
            epochs=epochs,
            batch_size=batch_size,
            image_size=self.image_size or config.image_size,
            context_length=self.context_length or config.context_length,
            reading=self.reading,
            skip_data_checks=self.skip_data_checks,
            caption_safe_views=self.caption_safe_views,
            val_fraction=self.val_fraction,
            val_by=self.val_by,
            test_fraction=self.test_fraction,
            train_fraction=row.train_fraction,
            unpaired_captions=row.unpaired_captions,
            test_splits=self.test_splits,
            evals=self.evals,
            precision=self.precision,
            seed=seed,
        )

    def paper_config(self, arm: str, seed: int) -> tuple[str, TrainConfig] | None:
        """Returns the name and the settings of an arm's recipe at the paper's scale, or None if it has none or is not trained."""
        row = self.arms[arm]
        name = self.paper_recipe.format(method=row.recipe)
        if name not in recipes() or row.weights_of:
            return None
        config = recipe(name)(PAPER_PAIRS)
        return name, replace(
            config,
            method_config=replace(config.method_config, **row.changes),
            epochs=config.epochs * row.epochs / row.train_fraction,
            batch_size=round(config.batch_size * row.batch),
            train_fraction=row.train_fraction,
            seed=seed,
            reading=self.reading,
        )


def chain(*arms: str) -> tuple[tuple[str, str], ...]:
    """Returns the claims that order `arms` from worst to best: one per adjacent pair."""
    return tuple(pairwise(arms))


def fraction_name(arm: str, fraction: float) -> str:
    """Returns the name of an arm that trains on a fraction of the pairs."""
    return arm if fraction == 1 else f"{arm}, {100 * fraction:g} %"


def by_fraction(arms: Mapping[str, Arm], fractions: Sequence[float] = (1.0, 0.5, 0.25)) -> dict[str, Arm]:
    """Returns each arm on fractions of the pairs."""
    return {
        fraction_name(name, fraction): replace(arm, train_fraction=fraction)
        for fraction in fractions
        for name, arm in arms.items()
    }


def parts(metric: str) -> tuple[str, ...]:
    """Returns the metrics whose mean a headline metric is: of "retrieval_test.r10", both directions; of any other, itself."""
    if not re.fullmatch(r"\w+\.r[0-9]+", metric):
        return (metric,)
    task, name = metric.split(".")
    return tuple(f"{task}.{direction}.{name}" for direction in ("image_to_text", "text_to_image"))
