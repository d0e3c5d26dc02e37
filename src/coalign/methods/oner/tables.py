"""OneR's ablations (its Tables 1, 4, 6 and 7) and the tables that train them at small scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coalign.methods.oner.config import SMALL
from coalign.methods.table import Arm, Table, chain
from coalign.methods.table_settings import NEW_CONCEPTS, Rows, paper_arms, tuned_arm
from coalign.types import STRONG

CC3M = "ImageNet zero-shot top-1 after CC3M"
CHANGES: dict[str, dict[str, Any]] = {
    "1-itc": {"losses": ("itc",)},
    "1-itc-two-heads": {"losses": ("itc",), "heads": "two"},
    "1-itc-xmc": {"losses": ("itc", "xmc")},
    "1-itc-xmc-cic": {"losses": ("itc", "xmc", "cic")},
    "1-itc-cmc": {},
    "7-no-mim": {"mim": False},
    "7-no-mim-no-mlm": {"mim": False, "mlm": False},
    "e-strong-augmentation": {"image_view": STRONG},
    "e-no-teacher": {"teacher": "none"},
}
# Every row of Table 1 (and Table 6, which has the same rows), Table 7, and the two claims of Appendix E, for small data.
ABLATIONS = {name: replace(SMALL, **changes) for name, changes in CHANGES.items()}


# The rows of Table 1, from worst to best. All include masked modeling, as in the paper.
_TABLE_1 = {
    "ITC": ("1-itc", 1.65),
    "ITC, two heads": ("1-itc-two-heads", 17.46),
    "ITC + XMC": ("1-itc-xmc", 22.12),
    "ITC + XMC + CIC": ("1-itc-xmc-cic", 22.86),
    "ITC + CMC": ("1-itc-cmc", 23.70),
}
_BY_PROJECTOR = {name: f"{name}, by projector" for name in _TABLE_1}


def _oner() -> dict[str, Arm]:
    """Returns CLIP and the rows of OneR's Table 1, each evaluated by the trained similarity and by the projector alone."""
    arms = {name: tuned_arm("oner", CHANGES[row], paper=value) for name, (row, value) in _TABLE_1.items()}
    anew = {
        _BY_PROJECTOR[name]: Arm("oner", {"similarity": "projector"}, paper=value, weights_of=name)
        for name, (_, value) in _TABLE_1.items()
    }
    return {"clip": tuned_arm("clip"), **arms, **anew}


# Both train for the same number of steps on half of the pairs. With the captions of the other half, the batch is twice as large, so that
# it contains the same number of pairs on average.
_HALF: dict[str, Any] = {"train_fraction": 0.5, "epochs": 0.5}
_AND_TEXTS: dict[str, Any] = {"train_fraction": 0.5, "unpaired_captions": True, "batch": 2}
_TRANSFER = {
    "OneR": tuned_arm("oner", **_HALF, paper=6.49),
    "OneR, more captions": tuned_arm("oner", **_AND_TEXTS, paper=8.54),
    "ITC, two heads": tuned_arm("oner", CHANGES["1-itc-two-heads"], **_HALF, paper=7.28),
    "ITC, two heads, more captions": tuned_arm("oner", CHANGES["1-itc-two-heads"], **_AND_TEXTS, paper=8.59),
}

_MASKING: Rows = {
    "OneR": ({}, 23.70),
    "OneR without MIM": ({"mim": False}, 23.4),
    "OneR without MIM and MLM": ({"mim": False, "mlm": False}, 22.9),
}


TABLES = {
    "oner-emoji": Table(
        "OneR's losses (its Tables 1 and 6) and CLIP, on new concepts of emoji",
        _oner(),
        claims=(*chain(*_TABLE_1), *chain(*_BY_PROJECTOR.values())),
        note='The rows "by projector" evaluate the same weights by the projector\'s output alone.',
        paper_metric=f"{CC3M}, OneR's Table 1",
        paper_recipe="{method}-cc3m",
        **NEW_CONCEPTS,
    ),
    "oner-masking-emoji": Table(
        "OneR's masked modeling (its Table 7), on new concepts of emoji",
        paper_arms("oner", _MASKING),
        claims=chain("OneR without MIM and MLM", "OneR without MIM", "OneR"),
        paper_metric=f"{CC3M}, OneR's Table 7",
        paper_recipe="{method}-cc3m",
        **NEW_CONCEPTS,
    ),
    "oner-transfer-emoji": Table(
        "OneR with additional captions without images (its Table 4), on half of the pairs, on new concepts of emoji",
        _TRANSFER,
        claims=tuple((name, f"{name}, more captions") for name in ("OneR", "ITC, two heads")),
        note='"More captions" adds the captions of the other half, also to the tokenizer\'s training data; they count as pairs seen.',
        paper_metric="ImageNet zero-shot top-1 after SBU, or SBU with the captions of CC3M, OneR's Table 4",
        **NEW_CONCEPTS,
    ),
}
