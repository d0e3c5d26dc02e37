"""Settings shared by the tables that train on two CPU cores: those that the search chose, splits, classes. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from coalign.methods.search import Choice, Search
from coalign.methods.table import Arm

SEARCH = Search(epochs=(20, 40, 80))  # of `headline-emoji-concepts`
# Trial and epochs that it chose for a recipe on all pairs. Other tables take them, so that every method has its own best settings; a recipe
# without an entry keeps its defaults and the epochs of the table.
CHOSEN: Mapping[str, tuple[int, float]] = {"clip": (6, 40), "mcd": (6, 40), "uniclip": (9, 20)}
# Tables evaluated on drawings that differ in kind from those trained on.
TEST: dict[str, Any] = {
    "epochs": 40,
    "evals": 2,
    "caption_safe_views": True,
    "test_splits": ("test",),
    "headline_metrics": ("retrieval_test.r10", "retrieval_test.r1"),
}
# files that `coalign data` writes
VENDORS_DATA, CONCEPTS_DATA = (f"{name}.jsonl of `coalign data emoji`" for name in ("metadata", "concepts"))
NEW_CONCEPTS = TEST | {"val_by": "concept", "data": CONCEPTS_DATA}  # emoji that are in no training pair
# Tags of Open Clip Art, as `tag` or `tag = class name`. If an image has several, its first tag counts.
CLIP_ART_CLASSES = (
    "flag", "card = playing card", "fruit", "dessert", "beverage = drink", "insect", "mammal", "bird", "fish", "flower", "tree",
    "people = person", "building", "boat", "clothing", "toy", "tool", "music = musical instrument", "sports = sport", "arrow",
    "roadsign = road sign", "weather", "map", "pattern",
)  # fmt: skip

# arm name -> changes to the configuration, the paper's value
Rows = Mapping[str, tuple[Mapping[str, Any], float | None]]


def chosen(recipe: str) -> Choice | None:
    """Returns the settings and the length that the search chose for a recipe, None if there is no search of it."""
    if recipe not in CHOSEN:
        return None
    number, epochs = CHOSEN[recipe]
    return Choice(SEARCH.draws()[number - 1], epochs, SEARCH.epochs[0])


def tuned_arm(recipe: str, changes: Mapping[str, Any] | None = None, **settings: Any) -> Arm:
    """Returns an arm with the settings that the search chose for its recipe."""
    return Arm(recipe, changes or {}, choice=chosen(recipe), **settings)


def paper_arms(recipe: str, rows: Rows) -> dict[str, Arm]:
    """Returns the rows of a paper's table as arms of a recipe."""
    return {name: tuned_arm(recipe, changes, paper=value) for name, (changes, value) in rows.items()}
