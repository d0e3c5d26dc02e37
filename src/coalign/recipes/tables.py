"""The tables of experiments, small enough for two cores: comparisons of methods, and the papers' ablations. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from coalign.errors import UserError
from coalign.recipes.ablation_tables import ABLATION_TABLES, STYLES, TUNED, TWO_TOWERS
from coalign.recipes.declip import VIEW
from coalign.recipes.mct import CHANGES as MCT
from coalign.recipes.oner import CHANGES as ONER
from coalign.recipes.scene_tables import FLAT, ONE_OBJECT, SCENE_TABLES
from coalign.recipes.sweep import QUEUE, Arm, Table, by_fraction, chain

# ImageNet zero-shot top-1 of ViT-B/32 on YFCC15M: UniCLIP's Table 1 and MCD's
_YFCC = {"clip": 31.3, "slip": 38.3, "declip": 41.2, "uniclip": 42.8, "mcd": 44.7}
_IMAGENET_YFCC = "ImageNet zero-shot top-1 after YFCC15M, MCD's Table 1"
# What a step costs the processor, over CLIP's, with its data, on an idle core: at 48 pixels the medians of seven steps in turns, at 32
# pixels those of 29 steps one after the other.
STEP_COST = {
    "openclipart": {"slip": 2.1, "declip": 2.4, "uniclip": 2.6, "mcd": 2.1},
    "scenes": {"slip": 1.5, "declip": 1.7, "uniclip": 1.5, "mcd": 1.5},
}


def _two_towers(arms: Mapping[str, Arm], step_cost: Mapping[str, float]) -> dict[str, Arm]:
    """Each method on as many pairs as CLIP, each on as much processor time, and CLIP on the views of another."""
    equal_time = {
        f"{name}, CLIP's time": replace(arms[name], epochs=1 / cost, paper=None) for name, cost in step_cost.items()
    }
    # what DeCLIP's views alone do: a control
    control = {
        "clip, DeCLIP's views": replace(arms["clip"], paper=None, changes={**arms["clip"].changes, "image_view": VIEW})
    }
    return {**arms, **equal_time, **control}


def _oner(clip_lr: float) -> dict[str, Arm]:
    """The rows of OneR's Table 1; masked modelling is in all of them, as in the paper."""
    rows = {
        "ITC": ("1-itc", 1.65),
        "ITC, two heads": ("1-itc-two-heads", 17.46),
        "ITC + XMC": ("1-itc-xmc", 22.12),
        "ITC + XMC + CIC": ("1-itc-xmc-cic", 22.86),
        "ITC + CMC": ("1-itc-cmc", 23.70),
    }
    arms = {name: Arm("oner", ONER[row], paper=figure) for name, (row, figure) in rows.items()}
    return {"clip": Arm("clip", image_lr=clip_lr), **arms}


def _mct(image_lr: float) -> dict[str, Arm]:
    """What §4.4 compares: terms, and heads of one size or two."""
    rows: dict[str, tuple[dict[str, Any], float | None]] = {
        "J_ii": (MCT["j_ii"], 49.3),
        "J_ii + J_tag": (MCT["j_ii+j_tag"], 50.2),
        "all but J_tag": (MCT["captions"], 54.9),
        "all": (MCT["all"], 55.3),
        "all, unified heads": ({"heads": "unified", "intra_dim": 256, "inter_dim": 256}, None),
        "inter only": (MCT["inter-only"], None),
    }
    arms = {name: Arm("mct", changes, image_lr=image_lr, paper=figure) for name, (changes, figure) in rows.items()}
    return {"clip": Arm("clip", image_lr=image_lr), **arms}


def _mct_heads(image_lr: float) -> dict[str, Arm]:
    """Heads of one for all terms, or one for each, of equal sizes, and the method's own sizes; without tags, as in the paper."""
    figures = {"unified": (49.6, 50.2, 52.3), "distinct": (53.6, 53.8, 53.9)}
    rows = {
        f"{heads}, {dim}": Arm("mct", MCT[f"{heads}-{dim}"], image_lr=image_lr, paper=figure)
        for heads, of_heads in figures.items()
        for dim, figure in zip((128, 1024, 1152), of_heads)
    }
    return {"distinct, of two sizes": Arm("mct", MCT["captions"], image_lr=image_lr, paper=54.9), **rows}


# Open Clip Art's tags, as `tag = class`; of two that a picture has, the first counts.
_CLIP_ART = (
    "flag", "card = playing card", "fruit", "dessert", "beverage = drink", "insect", "mammal", "bird", "fish", "flower", "tree",
    "people = person", "building", "boat", "clothing", "toy", "tool", "music = musical instrument", "sports = sport", "arrow",
    "roadsign = road sign", "weather", "map", "pattern",
)  # fmt: skip

TABLES = {
    "two-towers-openclipart": Table(
        "CLIP, SLIP, DeCLIP, UniCLIP and MCD on Open Clip Art, after as many pairs, and after as much processor time",
        _two_towers(
            {name: Arm(name, image_lr=TUNED[name], paper=_YFCC[name]) for name in TWO_TOWERS}, STEP_COST["openclipart"]
        ),
        epochs=10,
        classes=_CLIP_ART,
        claims=chain(*TWO_TOWERS),
        paper=_IMAGENET_YFCC,
        paper_recipe="{method}-yfcc15m",
    ),
    "two-towers-scenes": Table(
        "CLIP, SLIP, DeCLIP, UniCLIP and MCD on scenes, after as many pairs, and after as much processor time",
        _two_towers({name: Arm(name, paper=_YFCC[name]) for name in TWO_TOWERS}, STEP_COST["scenes"]),
        small=dict.fromkeys(TWO_TOWERS, FLAT),
        epochs=12,
        image_size=32,
        image_lr=5e-3,
        evals=4,
        classes=ONE_OBJECT,
        claims=chain(*TWO_TOWERS),
        paper=_IMAGENET_YFCC,
        paper_recipe="{method}-yfcc15m",
        headlines=("retrieval.image_to_text.r10", "foils.mean_per_kind"),
    ),
    "oner-openclipart": Table(
        "OneR's losses on Open Clip Art (its Tables 1 and 6), beside CLIP",
        _oner(TUNED["clip"]),
        epochs=10,
        classes=_CLIP_ART,
        claims=chain("ITC", "ITC, two heads", "ITC + XMC", "ITC + XMC + CIC", "ITC + CMC"),
        paper="ImageNet zero-shot top-1 after CC3M, OneR's Table 1",
        paper_recipe="{method}-cc3m",
    ),
    "oner-mct-scenes": Table(
        "OneR and MCT on scenes, beside CLIP",
        {
            "clip": Arm("clip", image_lr=5e-3),
            "oner": Arm("oner"),
            "mct": Arm("mct", image_lr=5e-3),
        },
        small={"clip": FLAT} | QUEUE,
        epochs=12,
        image_size=32,
        evals=4,
        classes=ONE_OBJECT,
        headlines=("retrieval.image_to_text.r10", "foils.mean_per_kind"),
    ),
    "mct-openclipart": Table(
        "MCT's terms and heads on Open Clip Art (its §4.4), beside CLIP",
        _mct(TUNED["clip"]),
        epochs=10,
        classes=_CLIP_ART,
        probe=True,
        claims=chain("J_ii", "J_ii + J_tag", "all"),
        paper="ImageNet linear probe after COCO, MCT's Table 1",
        paper_recipe="{method}-coco",
        paper_task="probe-mct:imagenet",
        small=QUEUE,
        headlines=("probe.acc1",),
    ),
    "mct-heads-openclipart": Table(
        "MCT's heads (its §4.4) on Open Clip Art",
        _mct_heads(TUNED["clip"]),
        epochs=10,
        classes=_CLIP_ART,
        probe=True,
        small=QUEUE,
        claims=(
            *chain(
                "unified, 128", "unified, 1024", "unified, 1152", "distinct, 128", "distinct, 1024", "distinct, 1152"
            ),
            ("distinct, 1152", "distinct, of two sizes"),
        ),
        paper="ImageNet linear probe after COCO, MCT's §4.4",
        paper_recipe="{method}-coco",
        paper_task="probe-mct:imagenet",
        headlines=("probe.acc1",),
    ),
    "style-shift-openclipart": Table(
        "All seven methods, trained on two styles of Open Clip Art and asked about the same concepts as others drew them",
        {
            **{
                name: Arm(name, image_lr=TUNED.get(name), paper=_YFCC.get(name))
                for name in (*TWO_TOWERS, "oner", "mct")
            },
            "clip, DeCLIP's views": Arm(
                "clip", {"image_view": VIEW}, image_lr=TUNED["clip"]
            ),  # what views alone do: a control
        },
        small=QUEUE,
        claims=(*chain(*TWO_TOWERS), *(("clip, DeCLIP's views", name) for name in TWO_TOWERS[1:])),
        paper=_IMAGENET_YFCC,
        paper_recipe="{method}-yfcc15m",
        **STYLES,
    ),
    "fractions-openclipart": Table(
        "All seven methods on all, half and a quarter of the pairs, in two styles of Open Clip Art, in as many steps",
        by_fraction({name: Arm(name, image_lr=TUNED.get(name)) for name in (*TWO_TOWERS, "oner", "mct")}),
        small=QUEUE,
        **STYLES,
    ),
    **ABLATION_TABLES,
    **SCENE_TABLES,
    "learning-rates-openclipart": Table(
        "The image tower's learning rate, for each method, on the training pairs of Open Clip Art alone",
        {f"{name}, {lr:g}": Arm(name, image_lr=lr) for name in TWO_TOWERS for lr in (1e-3, 3e-3)},
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
