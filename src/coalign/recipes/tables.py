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
from coalign.recipes.mct import CHANGES as MCT
from coalign.recipes.oner import CHANGES as ONER


@dataclass(frozen=True)
class Arm:
    """One row of a table: a recipe with changes to the method's settings."""

    recipe: str
    changes: Mapping[str, Any] = field(default_factory=dict)  # to the method's configuration
    epochs: float = 1.0  # times the table's
    image_lr: float | None = None  # peak learning rate of the image tower, where it was tuned for this arm
    train_fraction: float = 1.0  # of the training pairs


@dataclass(frozen=True)
class Table:
    """A sweep. Differences are to the first arm; every arm is trained with every seed."""

    title: str
    arms: Mapping[str, Arm]
    epochs: float
    batch_size: int | None = 128  # None: the recipe's
    image_size: int | None = 48
    val_fraction: float = 0.1
    evals: int = 5
    image_lr: float | None = None  # of the arms that have none of their own; None: the recipe's
    classes: tuple[str, ...] = ()  # of zero-shot and of the probe, looked for in the samples' labels and tags
    probe: bool = False
    order: tuple[str, ...] = ()  # the arms as the papers order them, the worst first: each step is a claim
    headlines: tuple[str, ...] = ("retrieval.image_to_text.r10",)  # the figures that the claims are about

    def config(self, arm: str, seed: int, num_pairs: int) -> TrainConfig:
        """The settings of one trial on that many training pairs."""
        row = self.arms[arm]
        config = recipe(row.recipe)(round(num_pairs / row.train_fraction))  # the model is that of all pairs
        image_lr = row.image_lr or self.image_lr
        roles = {"image": RoleConfig(lr=image_lr)} if image_lr else {}
        return replace(
            config,
            method_config=replace(config.method_config, **row.changes),
            epochs=self.epochs * row.epochs,
            batch_size=self.batch_size or config.batch_size,
            image_size=self.image_size or config.image_size,
            val_fraction=self.val_fraction,
            train_fraction=row.train_fraction,
            probe=self.probe,
            evals=self.evals,
            seed=seed,
            optimiser=replace(config.optimiser, roles={**config.optimiser.roles, **roles}),
        )


_TWO_TOWERS = ("clip", "slip", "declip", "uniclip", "mcd")
# What a step costs the processor, over CLIP's, with its data, on an idle core: at 48 pixels the medians of seven steps in turns, at 32
# pixels those of 29 steps one after the other.
STEP_COST = {
    "openclipart": {"slip": 2.1, "declip": 2.4, "uniclip": 2.6, "mcd": 2.1},
    "scenes": {"slip": 1.5, "declip": 1.7, "uniclip": 1.5, "mcd": 1.5},
}
# The better of 1e-3 and 3e-3 by the mean recall of `learning-rates-openclipart`; UniCLIP's two were equal.
_TUNED = {"clip": 1e-3, "slip": 3e-3, "declip": 3e-3, "uniclip": 1e-3, "mcd": 3e-3}


def _two_towers(arms: Mapping[str, Arm], step_cost: Mapping[str, float]) -> dict[str, Arm]:
    """Each method on as many pairs as CLIP, each on as much processor time, and CLIP on the views of another."""
    equal_time = {f"{name}, CLIP's time": replace(arms[name], epochs=1 / cost) for name, cost in step_cost.items()}
    # what DeCLIP's views alone do: a control
    control = {"clip, DeCLIP's views": replace(arms["clip"], changes={**arms["clip"].changes, "image_view": VIEW})}
    return {**arms, **equal_time, **control}


def _oner(clip_lr: float) -> dict[str, Arm]:
    """The rows of OneR's Table 1; masked modelling is in all of them, as in the paper."""
    rows = {
        "ITC": "1-itc",
        "ITC, two heads": "1-itc-two-heads",
        "ITC + XMC": "1-itc-xmc",
        "ITC + XMC + CIC": "1-itc-xmc-cic",
        "ITC + CMC": "1-itc-cmc",
    }
    return {"clip": Arm("clip", image_lr=clip_lr), **{name: Arm("oner", ONER[row]) for name, row in rows.items()}}


_QUEUE: dict[str, Any] = {"queue_size": 256}  # the recipe's share of these tables' batches of 128


def _mct(image_lr: float) -> dict[str, Arm]:
    """What §4.4 compares: terms, and heads of one size or two."""
    rows = {
        "J_ii": MCT["j_ii"],
        "J_ii + J_tag": MCT["j_ii+j_tag"],
        "all but J_tag": MCT["captions"],
        "all": MCT["all"],
        "all, unified heads": {"heads": "unified", "intra_dim": 256},
        "inter only": MCT["inter-only"],
    }
    return {
        "clip": Arm("clip", image_lr=image_lr),
        **{name: Arm("mct", changes | _QUEUE, image_lr=image_lr) for name, changes in rows.items()},
    }


_COLOURS = ("red", "pink", "brown", "gold", "green", "lime", "blue", "cyan")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
_ONE_OBJECT = tuple(f"{colour} {shape}" for shape in _SHAPES for colour in _COLOURS)  # of the scenes that show one
# Open Clip Art's tags, as `tag = class`; of two that a picture has, the first counts.
_CLIP_ART = (
    "flag", "card = playing card", "fruit", "dessert", "beverage = drink", "insect", "mammal", "bird", "fish", "flower", "tree",
    "people = person", "building", "boat", "clothing", "toy", "tool", "music = musical instrument", "sports = sport", "arrow",
    "roadsign = road sign", "weather", "map", "pattern",
)  # fmt: skip

TABLES = {
    "two-towers-openclipart": Table(
        "CLIP, SLIP, DeCLIP, UniCLIP and MCD on Open Clip Art, after as many pairs, and after as much processor time",
        _two_towers({name: Arm(name, image_lr=_TUNED[name]) for name in _TWO_TOWERS}, STEP_COST["openclipart"]),
        epochs=10,
        classes=_CLIP_ART,
        order=_TWO_TOWERS,
    ),
    "two-towers-scenes": Table(
        "CLIP, SLIP, DeCLIP, UniCLIP and MCD on scenes, after as many pairs, and after as much processor time",
        # Every run begins on a plateau, where nothing is told apart. Of what was tried with CLIP (temperatures, learning rates, moments,
        # decay, warm-up, batches of 16 to 128) a flat distribution at first is what shortens it most.
        _two_towers({name: Arm(name, {"temperature": 0.2}) for name in _TWO_TOWERS}, STEP_COST["scenes"]),
        epochs=12,
        image_size=32,
        image_lr=5e-3,
        evals=4,
        classes=_ONE_OBJECT,
        order=_TWO_TOWERS,
        headlines=("retrieval.image_to_text.r10", "foils.mean_per_kind"),
    ),
    "oner-openclipart": Table(
        "OneR's losses on Open Clip Art (its Tables 1 and 6), beside CLIP",
        _oner(_TUNED["clip"]),
        epochs=10,
        classes=_CLIP_ART,
        order=("ITC", "ITC, two heads", "ITC + XMC", "ITC + XMC + CIC", "ITC + CMC"),
    ),
    "oner-mct-scenes": Table(
        "OneR and MCT on scenes, beside CLIP",
        {
            "clip": Arm("clip", {"temperature": 0.2}, image_lr=5e-3),
            "oner": Arm("oner"),
            "mct": Arm("mct", _QUEUE, image_lr=5e-3),
        },
        epochs=12,
        image_size=32,
        evals=4,
        classes=_ONE_OBJECT,
        headlines=("retrieval.image_to_text.r10", "foils.mean_per_kind"),
    ),
    "mct-openclipart": Table(
        "MCT's terms and heads on Open Clip Art (its §4.4), beside CLIP",
        _mct(_TUNED["clip"]),
        epochs=10,
        classes=_CLIP_ART,
        probe=True,
        order=("J_ii", "J_ii + J_tag", "all"),
        headlines=("probe.acc1",),
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
