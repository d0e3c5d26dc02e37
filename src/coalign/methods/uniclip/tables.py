"""UniCLIP's ablations: every row of its Tables 4a, 4b, 5 and 6, and tables that train them at small scale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from coalign.methods.table import Table, chain
from coalign.methods.table_settings import NEW_CONCEPTS, Rows, paper_arms
from coalign.methods.uniclip.config import SMALL

CC3M = "ImageNet zero-shot top-1 after CC3M"
_VIEWS: dict[str, tuple[Literal["weak", "strong"], ...]] = {
    "3-weak": ("weak", "weak", "weak"),
    "1-weak-2-strong": ("weak", "strong", "strong"),
    "3-strong": ("strong", "strong", "strong"),
}
_PLAIN: dict[str, Any] = {"augmentation_embedding": False}
_CHANGES: dict[str, dict[str, Any]] = {
    **{f"4a-plain-{head}": {**_PLAIN, "image_head": head} for head in ("mlp-3", "mlp-6", "residual-1", "residual-3")},
    **{f"4a-aware-{head}": {"image_head": head} for head in ("linear", "mlp-3", "mlp-6", "residual-1", "residual-3")},
    **{f"4b-plain-{name}": {**_PLAIN, "image_head": "residual-1", "views": views} for name, views in _VIEWS.items()},
    **{f"4b-aware-{name}": {"views": views} for name, views in _VIEWS.items()},
    "5-shared-unified": {"domain_similarity": False},
    "5-domain-separated": {"unified_supervision": False},
    "5-domain-unified": {},
    **{
        f"6-{loss}": {"loss": loss}
        for loss in ("mil-nce", "supcon", "mp-nce-no-trivial", "mp-nce-unweighted", "mp-nce")
    },
}
# Every row of Tables 4a, 4b, 5 and 6, for small data. "aware" heads take the augmentation embedding, "plain" heads do not.
ABLATIONS = {name: replace(SMALL, **changes) for name, changes in _CHANGES.items()}

_LOSSES: Rows = {
    "UniCLIP": ({}, 27.84),
    "MIL-NCE": ({"loss": "mil-nce"}, 22.23),
    "SupCon": ({"loss": "supcon"}, 23.04),
    "MP-NCE without trivial pairs": ({"loss": "mp-nce-no-trivial"}, 24.60),
    "MP-NCE without weights": ({"loss": "mp-nce-unweighted"}, 26.41),
    "shared similarity": ({"domain_similarity": False}, 25.51),
    "separated supervision": ({"unified_supervision": False}, 26.59),
}
_NO_EMBEDDING = {
    "augmentation_embedding": False,
    "image_head": "residual-1",
}  # the head of Table 4b's rows without embedding
_WEAK, _STRONG = {"views": ("weak",) * 3}, {"views": ("strong",) * 3}
VIEWS: Rows = {
    "UniCLIP": ({}, 27.84),
    "another view's parameters": ({"foreign_parameters": True}, None),  # control, not in the paper
    "3 weak views": (_WEAK, 23.40),
    "3 strong views": (_STRONG, 26.43),
    "no embedding": (_NO_EMBEDDING, 24.76),
    "no embedding, 3 weak views": (_NO_EMBEDDING | _WEAK, 24.49),
    "no embedding, 3 strong views": (_NO_EMBEDDING | _STRONG, 22.60),
}
_HEADS: Rows = {
    "UniCLIP": ({}, 27.84),
    **{
        name: ({"image_head": name}, value)
        for name, value in (("linear", 24.68), ("mlp-3", 24.54), ("mlp-6", 24.15), ("residual-1", 27.67))
    },
    **{
        f"{name}, no embedding": ({"image_head": name, "augmentation_embedding": False}, value)
        for name, value in (("mlp-3", 24.01), ("mlp-6", 23.62), ("residual-1", 24.76), ("residual-3", 24.46))
    },
}  # fmt: skip


TABLES = {
    "uniclip-losses-emoji": Table(
        "UniCLIP's loss, similarity and supervision (its Tables 6 and 5), on new concepts of emoji",
        paper_arms("uniclip", _LOSSES),
        claims=(
            *chain("MIL-NCE", "SupCon", "MP-NCE without trivial pairs", "MP-NCE without weights", "UniCLIP"),
            *chain("shared similarity", "separated supervision", "UniCLIP"),
        ),
        paper_metric=f"{CC3M}, UniCLIP's Tables 5 and 6",
        paper_recipe="{method}-cc3m",
        **NEW_CONCEPTS,
    ),
    "uniclip-views-emoji": Table(
        "UniCLIP's views, with and without the augmentation embedding (its Table 4b), on new concepts of emoji",
        paper_arms("uniclip", VIEWS),
        claims=(
            ("no embedding", "UniCLIP"),
            ("another view's parameters", "UniCLIP"),
            ("3 strong views", "UniCLIP"),
            ("3 weak views", "UniCLIP"),
            ("no embedding, 3 strong views", "3 strong views"),
            ("3 weak views", "no embedding, 3 weak views"),
        ),
        paper_metric=f"{CC3M}, UniCLIP's Table 4b",
        paper_recipe="{method}-cc3m",
        **NEW_CONCEPTS,
    ),
    "uniclip-heads-emoji": Table(
        "UniCLIP's image head, with and without the augmentation embedding (its Table 4a), on new concepts of emoji",
        paper_arms("uniclip", _HEADS),
        claims=(
            *chain("mlp-6", "mlp-3", "linear", "residual-1", "UniCLIP"),
            *((f"{head}, no embedding", head) for head in ("mlp-3", "mlp-6", "residual-1")),
            ("residual-3, no embedding", "UniCLIP"),
        ),
        paper_metric=f"{CC3M}, UniCLIP's Table 4a",
        paper_recipe="{method}-cc3m",
        **NEW_CONCEPTS,
    ),
}
