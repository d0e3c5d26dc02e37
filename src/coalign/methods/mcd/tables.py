"""MCD's ablation (its Table 5) and the table that trains it at small scale."""

from __future__ import annotations

from dataclasses import replace

from coalign.methods.mcd.config import MCDConfig
from coalign.methods.table import Arm, Table, chain
from coalign.methods.table_settings import NEW_CONCEPTS, Rows, paper_arms, tuned_arm

_CONTRAST_ONLY = MCDConfig(distill_positive=False, distill_negative=False, distill_noisy=False, progressive=False)
_WITH_MLM = {
    "mp-nce": _CONTRAST_ONLY,  # (a)
    # control, not in the paper: λ phases ṽ out, but no distillation replaces it
    "ramp-only": replace(_CONTRAST_ONLY, progressive=True),
    "positive": MCDConfig(distill_negative=False, distill_noisy=False),  # (c)
    "positive+negative": MCDConfig(distill_noisy=False),  # (d)
    "positive+negative+noisy": MCDConfig(),  # (e)
}
# Table 5; its row (b) is UniCLIP. The paper contradicts itself on masked language modeling, so every row exists with and without it.
TABLE_5 = _WITH_MLM | {f"{name}, no mlm": replace(config, mlm=False) for name, config in _WITH_MLM.items()}

_CONTRAST = {"distill_positive": False, "distill_negative": False, "distill_noisy": False, "progressive": False}
DISTILLATION: Rows = {
    "MP-NCE": (_CONTRAST, 39.6),
    "MP-NCE, ramp only": (_CONTRAST | {"progressive": True}, None),  # control, not in the paper
    "positive": ({"distill_negative": False, "distill_noisy": False}, 43.9),
    "positive, negative": ({"distill_noisy": False}, 44.3),
    "MCD": ({}, 44.7),
}
_MCD: dict[str, Arm] = {
    **paper_arms("mcd", DISTILLATION),
    "UniCLIP": tuned_arm("uniclip", paper=42.8),
    # the paper contradicts itself on masked language modeling (see TABLE_5)
    **paper_arms("mcd", {f"{name}, no MLM": ({**row, "mlm": False}, None) for name, (row, _) in DISTILLATION.items()}),
}


TABLES = {
    "mcd-emoji": Table(
        "MCD's distillation (its Table 5), on new concepts of emoji",
        _MCD,
        claims=(
            *chain("MP-NCE", "UniCLIP", "positive", "positive, negative", "MCD"),
            ("MP-NCE, ramp only", "MCD"),
            ("MCD, no MLM", "MCD"),
        ),
        paper_metric="ImageNet zero-shot top-1 after YFCC15M, MCD's Table 5",
        paper_recipe="{method}-yfcc15m",
        **NEW_CONCEPTS,
    ),
}
