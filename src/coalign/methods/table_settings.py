"""Settings shared by the tables that train on two CPU cores: learning rates, splits, classes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coalign.methods.table import Arm

TWO_TOWERS = ("clip", "slip", "declip", "uniclip", "mcd")
# The better of 1e-3 and 3e-3 by mean recall in `learning-rates-openclipart`; UniCLIP's two were equal. Found with the previous
# `tiny`, a narrow ResNet-18.
TUNED_LR = {"clip": 1e-3, "slip": 3e-3, "declip": 3e-3, "uniclip": 1e-3, "mcd": 3e-3}
# The queue size the small recipe would derive for the tables' batches of 128.
SMALL_QUEUE: dict[str, dict[str, Any]] = {"mct": {"queue_size": 256}}
# Tables that train on two styles of Open Clip Art (`style-shift.jsonl`) and are also evaluated on the same concepts in other styles.
STYLE_SHIFT: dict[str, Any] = {
    "epochs": 24,
    "test_splits": ("test",),
    "headline_metrics": ("retrieval.image_to_text.r10", "retrieval_test.image_to_text.r10"),
}
# Tags of Open Clip Art, as `tag` or `tag = class name`. If an image has several, its first tag counts.
CLIP_ART_CLASSES = (
    "flag", "card = playing card", "fruit", "dessert", "beverage = drink", "insect", "mammal", "bird", "fish", "flower", "tree",
    "people = person", "building", "boat", "clothing", "toy", "tool", "music = musical instrument", "sports = sport", "arrow",
    "roadsign = road sign", "weather", "map", "pattern",
)  # fmt: skip

# arm name -> changes to the configuration, the paper's value
Rows = Mapping[str, tuple[Mapping[str, Any], float | None]]


def paper_arms(recipe: str, rows: Rows) -> dict[str, Arm]:
    """Returns the rows of a paper's table as arms of a recipe, with the image tower's tuned learning rate."""
    return {
        name: Arm(recipe, changes, image_lr=TUNED_LR.get(recipe), paper=value)
        for name, (changes, value) in rows.items()
    }
