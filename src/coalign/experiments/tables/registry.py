"""The tables that span papers, small enough for two cores, and the lookup of every table. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from coalign.errors import UserError
from coalign.methods import METHODS
from coalign.methods.table import Arm, Table, by_fraction
from coalign.methods.table_settings import CONCEPTS_DATA, NEW_CONCEPTS, SEARCH, TEST, VENDORS_DATA, tuned_arm

_COLORS = ("red", "pink", "brown", "gold", "green", "lime", "blue", "cyan")
_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond")
ONE_OBJECT = tuple(f"{color} {shape}" for shape in _SHAPES for color in _COLORS)  # of scenes with one object

_LOCKED: dict[str, Any] = {"image_tuning": "locked", "text_tuning": "locked"}
_STARTS = {
    "locked": Arm("clip", start=_LOCKED),
    "locked, 160 pixels": Arm("clip", start={**_LOCKED, "image_size": 160}),
    "locked, GLU": Arm("clip", start={**_LOCKED, "head": "glu"}),
    "locked, 2 views": Arm("clip", start={**_LOCKED, "feature_views": 2}),
    "locked, 4 views": Arm("clip", start={**_LOCKED, "feature_views": 4}),
    "last:1": Arm("clip", start={"image_tuning": "last:1", "text_tuning": "last:1", "image_size": 128}),
    "full after heads": Arm("clip", start={"head_epochs": 5.0, "image_size": 128}),
    "uniclip, locked, 4 views": Arm("uniclip", start={**_LOCKED, "feature_views": 4}),
    "mcd, locked, 4 views": Arm("mcd", {"mlm": False}, start={**_LOCKED, "feature_views": 4}),
}


def _pretrained_towers(pairs: str, starts: Collection[str], **settings: Any) -> Table:
    """Default runs from scratch, and runs that start from pretrained encoders."""
    scratch = {name: Arm(name) for name in ("clip", "uniclip", "mcd")}
    if not any(_STARTS[name].recipe != "clip" for name in starts):
        scratch = {"clip": scratch["clip"]}
    return Table(
        f"Pretrained encoders on {pairs}, compared with training from scratch",
        {**scratch, **{name: _STARTS[name] for name in starts}},
        note="These are the settings of the arms named as a method, from scratch. The others start from EfficientNet-Lite0, trained on "
        "ImageNet, and the sentence encoder all-MiniLM-L6-v2, with the defaults of such runs: 30 epochs and 224 pixels if the encoders are "
        "locked, else 10 epochs and, for speed, 128 pixels. Of locked encoders, one view is computed, unless the name says more. A "
        "trial of other rates, weight decays and lengths on the held-out pairs left the defaults as they were. The times of locked arms "
        "are without the pass that computes their features: with it, and with the evaluation, they took 0.74 (224 pixels) and 0.40 (160 "
        "pixels) of the time from scratch on Open Clip Art, on one core. On emoji, times are of the fastest seed.",
        epochs=30,
        batch_size=None,
        image_size=None,
        evals=1,
        claims=tuple(("clip", name) for name in starts if _STARTS[name].recipe == "clip"),
        **settings,
    )


# arms of the headline; `locked` starts from pretrained encoders, the others from scratch
HEADLINE = {name: Arm(name) for name in ("clip", "clip-strong", "uniclip", "mcd")} | {"locked": _STARTS["locked"]}
OTHER_METHODS = ("filip", "slip", "declip", "oner", "mct")  # beside the headline, on all pairs


def _paper_tables() -> dict[str, Table]:
    """The `TABLES` of every paper that has a tables.py."""
    tables: dict[str, Table] = {}
    for name in METHODS:
        module = f"coalign.methods.{name}.tables"
        if find_spec(module) is not None:
            tables.update(import_module(module).TABLES)
    return tables


TABLES: dict[str, Table] = {
    "pretrained-openclipart": _pretrained_towers("Open Clip Art", ("locked", "locked, 160 pixels", "locked, GLU")),
    "pretrained-emoji": _pretrained_towers(
        "emoji of one vendor, evaluated on another's",
        [name for name in _STARTS if name != "locked, 160 pixels"],
        test_splits=("test",),
        data=VENDORS_DATA,
        headline_metrics=("retrieval.image_to_text.r10", "retrieval_test.image_to_text.r10"),
    ),
    "pretrained-emoji-concepts": _pretrained_towers(
        "emoji, evaluated on emoji that are in no training pair",
        ("locked", "locked, GLU"),
        val_by="concept",
        test_splits=("test",),
        data=CONCEPTS_DATA,
        headline_metrics=("retrieval.image_to_text.r10", "retrieval_test.image_to_text.r10"),
    ),
    "headline-emoji-concepts": Table(
        "Methods and a head on locked encoders, each with its best settings, on new concepts of emoji, by number of pairs",
        by_fraction(HEADLINE, (1.0, 0.5, 0.25, 0.125)) | {name: Arm(name) for name in OTHER_METHODS},
        search=SEARCH,
        claims=(  # of results/plan.json
            ("clip", "uniclip"),
            ("clip", "clip-strong"),
            ("clip-strong", "uniclip"),
            ("clip-strong", "mcd"),
            ("clip", "mcd, 50 %"),
            ("mcd", "locked"),
            ("clip", "locked, 12.5 %"),
        ),
        **NEW_CONCEPTS | {"evals": 4},
    ),
    "emoji-vendor": Table(
        "Methods with the settings chosen on new concepts, on emoji of one vendor, evaluated on another's",
        {name: tuned_arm(name) for name in ("clip", "clip-strong", "uniclip", "mcd")},
        claims=(("clip", "uniclip"), ("uniclip", "mcd"), ("clip", "clip-strong"), ("clip-strong", "mcd")),
        data=VENDORS_DATA,
        **TEST,
    ),
    "style-shift": Table(
        "Methods with the settings chosen on emoji, on two styles of Open Clip Art, evaluated on the same concepts in other styles",
        {name: tuned_arm(name) for name in ("clip", "uniclip", "mcd")},
        claims=(("clip", "uniclip"),),
        data="style-shift.jsonl of `coalign data openclipart`",
        **TEST,
    ),
    "scenes": Table(
        "CLIP, UniCLIP and MCD on simple scenes, by kind of fact",
        {name: Arm(name) for name in ("clip", "uniclip", "mcd")},
        epochs=30,
        image_size=32,
        evals=2,
        classes=ONE_OBJECT,
        claims=(("clip", "uniclip"), ("clip", "mcd")),
        test_splits=("combinations", "shifted"),
        data="scenes:8192:simple",
        headline_metrics=("retrieval.r10", "retrieval_shifted.r10", "foils.mean_per_kind"),
    ),
    **_paper_tables(),
}


def table(name: str) -> Table:
    if name not in TABLES:
        near = difflib.get_close_matches(name, TABLES, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(TABLES)}."
        raise UserError(f"There is no table named {name!r}; {hint}")
    return TABLES[name]
