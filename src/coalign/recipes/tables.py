"""Tables of experiments: arms that differ in what they test and share everything else, small enough for two cores. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.optim import RoleConfig
from coalign.recipes import recipe
from coalign.recipes.declip import VIEW


@dataclass(frozen=True)
class Arm:
    """One row of a table: a recipe with changes to the method's settings."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the method's configuration
    epochs: float = 1.0  # times the table's
    image_lr: float | None = None  # peak learning rate of the image tower, where it was tuned for this arm


@dataclass(frozen=True)
class Table:
    """A sweep. Differences are to the first arm; every arm is trained with every seed."""

    title: str
    arms: Mapping[str, Arm]
    epochs: float
    batch_size: int = 128
    image_size: int = 48
    val_fraction: float = 0.1
    evals: int = 5
    image_lr: float = 2e-3
    classes: tuple[str, ...] = ()  # zero-shot classes, looked for in the held-out samples' labels and tags
    order: tuple[str, ...] = ()  # the arms as the papers order them, the worst first: each step is a claim
    headline: str = "retrieval.image_to_text.r10"  # the figure that the claims are about

    def config(self, arm: str, seed: int, num_pairs: int) -> TrainConfig:
        """The settings of one trial on that many training pairs."""
        row = self.arms[arm]
        config = recipe(row.recipe)(num_pairs)
        image = RoleConfig(lr=row.image_lr or self.image_lr)
        return replace(
            config,
            method_config=replace(config.method_config, **row.changes),
            epochs=self.epochs * row.epochs,
            batch_size=self.batch_size,
            image_size=self.image_size,
            val_fraction=self.val_fraction,
            evals=self.evals,
            seed=seed,
            optimiser=replace(config.optimiser, roles={**config.optimiser.roles, "image": image}),
        )


_TWO_TOWERS = ("clip", "slip", "declip", "uniclip", "mcd")
# What a step costs the processor, over CLIP's, at this scale with its data: medians of seven steps in turns on an idle core.
STEP_COST = {"clip": 1.0, "slip": 2.1, "declip": 2.4, "uniclip": 2.6, "mcd": 2.1}
# The better of 1e-3 and 3e-3 by the mean recall of `learning-rates-openclipart`; UniCLIP's two were equal.
_TUNED = {"clip": 1e-3, "slip": 3e-3, "declip": 3e-3, "uniclip": 1e-3, "mcd": 3e-3}


def _two_towers(image_lr: Mapping[str, float]) -> dict[str, Arm]:
    """Each method on as many pairs as CLIP, each on as much processor time, and CLIP on the views of another."""
    equal_pairs = {name: Arm(name, image_lr=image_lr.get(name)) for name in _TWO_TOWERS}
    equal_time = {
        f"{name}, CLIP's time": replace(equal_pairs[name], epochs=1 / STEP_COST[name]) for name in _TWO_TOWERS[1:]
    }
    # what DeCLIP's views alone do: a control
    control = {"clip, DeCLIP's views": replace(equal_pairs["clip"], changes={"image_view": VIEW})}
    return equal_pairs | equal_time | control


_COLOURS = ("red", "pink", "brown", "gold", "green", "lime", "blue", "cyan")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
# Open Clip Art's tags, as `tag = class`; of two that a picture has, the first counts.
_CLIP_ART = (
    "flag", "card = playing card", "fruit", "dessert", "beverage = drink", "insect", "mammal", "bird", "fish", "flower", "tree",
    "people = person", "building", "boat", "clothing", "toy", "tool", "music = musical instrument", "sports = sport", "arrow",
    "roadsign = road sign", "weather", "map", "pattern",
)  # fmt: skip

TABLES = {
    "two-towers-openclipart": Table(
        "CLIP, SLIP, DeCLIP, UniCLIP and MCD on Open Clip Art, after as many pairs, and after as much processor time",
        _two_towers(_TUNED),
        epochs=10,
        classes=_CLIP_ART,
        order=_TWO_TOWERS,
    ),
    "two-towers-scenes": Table(
        "CLIP, SLIP, DeCLIP, UniCLIP and MCD on scenes, after as many pairs, and after as much processor time",
        _two_towers({}),
        epochs=8,
        batch_size=64,  # on a plateau at the beginning it is the number of steps that counts
        image_size=32,
        image_lr=1e-3,
        evals=2,
        classes=tuple(f"{colour} {shape}" for shape in _SHAPES for colour in _COLOURS),  # of the pictures of one object
        order=_TWO_TOWERS,
        headline="foils.mean_per_kind",
    ),
    "learning-rates-openclipart": Table(
        "The image tower's learning rate, for each method, on the training pairs of Open Clip Art alone",
        {f"{name}, {lr:g}": Arm(name, image_lr=lr) for name in _TWO_TOWERS for lr in (1e-3, 3e-3)},
        epochs=6,
        val_fraction=0.2,  # the split is a stable hash: of data without the tenth that the other table holds out, the next tenth
    ),
}


def table(name: str) -> Table:
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(TABLES)}."
        raise UserError(f"There is no table named {name!r}; {hint}")
    return TABLES[name]
