"""The tables on scenes that start from an image tower which has learnt tags. Imports no torch.

From scratch every run on scenes begins on a plateau, where nothing is told apart, and at a small scale ends there.
"""

from __future__ import annotations

from typing import Any

from coalign.recipes.ablation_tables import DISTILLATION, TWO_TOWERS, VIEWS, Rows
from coalign.recipes.sweep import QUEUE, Arm, Table, by_fraction

# Of what was tried with CLIP against the plateau (temperatures, learning rates, moments, decay, warm-up, batches of 16 to 128) a flat
# distribution at first is what shortens it most.
FLAT = {"temperature": 0.2}
_COLOURS = ("red", "pink", "brown", "gold", "green", "lime", "blue", "cyan")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
ONE_OBJECT = tuple(f"{colour} {shape}" for shape in _SHAPES for colour in _COLOURS)  # of the scenes that show one

_START: dict[str, Any] = {
    "tag_scenes": 16_384,
    "epochs": 8,
    "image_size": 32,
    "evals": 2,
    "classes": ONE_OBJECT,
    "test_splits": ("combinations", "shifted"),
    "headlines": ("retrieval.image_to_text.r10", "retrieval_shifted.image_to_text.r10", "foils.mean_per_kind"),
}


def _arms(recipe: str, rows: Rows) -> dict[str, Arm]:
    return {name: Arm(recipe, changes) for name, (changes, _) in rows.items()}


_UNICLIP = {
    name: row
    for name, row in VIEWS.items()
    if name not in ("no embedding, 3 weak views", "no embedding, 3 strong views")
}

SCENE_TABLES = {
    "views-scenes": Table(
        "UniCLIP's views and MCD's distillation on scenes, from a tower that has learnt tags: what is known of which facts",
        {
            "clip": Arm("clip"),
            **_arms("uniclip", _UNICLIP),
            "1 weak view": Arm("uniclip", {"views": ("weak",)}),
            **_arms("mcd", DISTILLATION),
        },
        claims=(
            *((name, "UniCLIP") for name in _UNICLIP if name != "UniCLIP"),
            *((name, "MCD") for name in DISTILLATION if name != "MCD"),
            ("UniCLIP", "1 weak view"),  # a control: no image is compared with another view of itself
            ("clip", "UniCLIP"),
            ("clip", "MCD"),
        ),
        remark="The temperature, 0.2, and the image tower's learning rate were chosen by CLIP alone, which favours CLIP: with the papers' "
        "0.07, as in `fractions-scenes`, CLIP does as well, and UniCLIP better.",
        small=dict.fromkeys(TWO_TOWERS, FLAT),
        **_START,
    ),
    "fractions-scenes": Table(
        "Six methods on all, half and a quarter of the pairs of scenes, in as many steps, from a tower that has learnt tags",
        by_fraction({name: Arm(name) for name in (*TWO_TOWERS, "mct")}),
        remark="The image tower's learning rate was chosen by CLIP alone, of two, which favours CLIP.",
        small=QUEUE,
        **_START,
    ),
}
