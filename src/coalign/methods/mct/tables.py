"""MCT's ablations (its §4.4) and the tables that train them at small scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from coalign.methods.mct.config import MCTConfig
from coalign.methods.table import Arm, Table, chain
from coalign.methods.table_settings import CLIP_ART_CLASSES, tuned_arm

_WITHOUT_TAGS: dict[str, Any] = {"j_tag": False}
_INTRA_OFF: dict[str, Any] = {"j_ii": False, "j_tag": False, "j_cc": False}
_TEXT_OFF: dict[str, Any] = {"j_cc": False, "j_ic": False, "j_ci": False}
# §4.4, as changes to any MCTConfig. The comments give the paper's linear ImageNet accuracy or its R@1 of both retrieval directions.
CHANGES: dict[str, dict[str, Any]] = {
    "j_ii": _TEXT_OFF | _WITHOUT_TAGS,  # 49.3, MoCo-v2
    "j_ii+j_tag": _TEXT_OFF,  # 50.2
    "captions": _WITHOUT_TAGS,  # 54.9; 24.1 and 18.6
    "all": {},  # 55.3
    "inter-only": _INTRA_OFF,  # 13.2 and 9.5
    **{
        f"{heads}-{dim}": _WITHOUT_TAGS | {"heads": heads, "intra_dim": dim, "inter_dim": dim}
        for heads in ("unified", "distinct")  # 49.6, 50.2 and 52.3; 53.6, 53.8 and 53.9
        for dim in (128, 1024, 1152)
    },
}
ABLATIONS = {name: replace(MCTConfig(), **changes) for name, changes in CHANGES.items()}


def _mct() -> dict[str, Arm]:
    """Returns CLIP and the terms of §4.4, with distinct or unified heads."""
    rows: dict[str, tuple[dict[str, Any], float | None]] = {
        "J_ii": (CHANGES["j_ii"], 49.3),
        "J_ii + J_tag": (CHANGES["j_ii+j_tag"], 50.2),
        "all but J_tag": (CHANGES["captions"], 54.9),
        "all": (CHANGES["all"], 55.3),
        "all, unified heads": ({"heads": "unified", "intra_dim": 256, "inter_dim": 256}, None),
        "inter only": (CHANGES["inter-only"], None),
    }
    arms = {name: tuned_arm("mct", changes, paper=value) for name, (changes, value) in rows.items()}
    return {"clip": tuned_arm("clip"), **arms}


def _mct_heads() -> dict[str, Arm]:
    """Returns the heads of §4.4: unified or distinct heads of one size, and the method's two sizes. Without tags, as in the paper."""
    paper_values = {"unified": (49.6, 50.2, 52.3), "distinct": (53.6, 53.8, 53.9)}
    rows = {
        f"{heads}, {dim}": tuned_arm("mct", CHANGES[f"{heads}-{dim}"], paper=value)
        for heads, values in paper_values.items()
        for dim, value in zip((128, 1024, 1152), values)
    }
    return {"distinct, of two sizes": tuned_arm("mct", CHANGES["captions"], paper=54.9), **rows}


TABLES = {
    "mct-openclipart": Table(
        "MCT's terms and heads (its §4.4) and CLIP, on Open Clip Art",
        _mct(),
        epochs=40,
        evals=2,
        caption_safe_views=True,
        classes=CLIP_ART_CLASSES,
        probe=True,
        claims=chain("J_ii", "J_ii + J_tag", "all"),
        paper_metric="ImageNet linear probe after COCO, MCT's Table 1",
        paper_recipe="{method}-coco",
        paper_task="probe-mct:imagenet",
        headline_metrics=("probe.acc1",),
    ),
    "mct-heads-openclipart": Table(
        "MCT's heads (its §4.4), on Open Clip Art",
        _mct_heads(),
        epochs=40,
        evals=2,
        caption_safe_views=True,
        classes=CLIP_ART_CLASSES,
        probe=True,
        claims=(
            *chain(
                "unified, 128", "unified, 1024", "unified, 1152", "distinct, 128", "distinct, 1024", "distinct, 1152"
            ),
            ("distinct, 1152", "distinct, of two sizes"),
        ),
        paper_metric="ImageNet linear probe after COCO, MCT's §4.4",
        paper_recipe="{method}-coco",
        paper_task="probe-mct:imagenet",
        headline_metrics=("probe.acc1",),
    ),
}
