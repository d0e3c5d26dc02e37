"""DeCLIP's ablation (its Table 4) at small scale."""

from __future__ import annotations

from coalign.methods.table import Arm, Table, chain
from coalign.methods.table_settings import NEW_CONCEPTS, paper_arms, tuned_arm

_OFF = {"multi_view": False, "image_ss": False, "text_ss": False, "neighbors": False}
_DECLIP: dict[str, Arm] = {
    **paper_arms(
        "declip",
        {
            "CLIP": (_OFF, 20.6),  # on DeCLIP's image view, like every arm of this table
            "CLIP + MVS": (_OFF | {"multi_view": True}, 24.8),
            "CLIP + MVS + SS": ({"neighbors": False}, 25.4),
            "DeCLIP": ({}, 27.2),
            "DeCLIP, random neighbors": ({"neighbor_random": True}, None),  # control
        },
    ),
    "CLIP, twice the epochs": tuned_arm("declip", _OFF, epochs=2, paper=21.7),
    "CLIP, twice the batch": tuned_arm("declip", _OFF, batch=2, paper=22.3),
}


TABLES = {
    "declip-emoji": Table(
        "DeCLIP's supervision (its Table 4), and CLIP with twice the epochs or batch size, on new concepts of emoji",
        _DECLIP,
        claims=(
            *chain("CLIP", "CLIP + MVS", "CLIP + MVS + SS", "DeCLIP"),
            *(
                (name, "DeCLIP")
                for name in ("DeCLIP, random neighbors", "CLIP, twice the epochs", "CLIP, twice the batch")
            ),
        ),
        paper_metric="ImageNet zero-shot top-1 after CC3M, DeCLIP's Table 4 and Figure 7",
        paper_recipe="{method}-cc3m",
        **NEW_CONCEPTS,
    ),
}
