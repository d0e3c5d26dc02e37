"""Image views that keep what captions name: without hue shifts if they name colors, without flips if they name sides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from coalign.config import TrainConfig
from coalign.types import AugmentationPolicy

NAMED = 0.05  # fraction of the captions that name a color, or a side, from which views are changed
# a hue shift turns one of these into another; black, white and gray stay
COLORS = (
    "red", "orange", "yellow", "green", "blue", "purple", "violet", "pink", "brown", "cyan", "turquoise", "magenta", "beige", "golden",
    "teal", "maroon",
)  # fmt: skip
SIDES = ("left", "right", "leftmost", "rightmost", "leftward", "rightward")


def with_safe_views(config: TrainConfig, captions: Sequence[str]) -> tuple[TrainConfig, str | None]:
    """Returns the configuration with views that fit the captions, if `caption_safe_views` is set, and a sentence on what changed.

    Only options that have the method's default are changed. The result depends on the captions alone, so that a resumed run
    gets the same one.
    """
    if not config.caption_safe_views:
        return config, None
    colors, sides = _fraction(captions, COLORS), _fraction(captions, SIDES)
    changes: dict[str, AugmentationPolicy] = {}
    lines = []
    for what, fraction, option in (("colors", colors, "hue"), ("sides", sides, "flip_p")):
        if fraction < NAMED:
            continue
        views = _default_views(config.method_config, option)
        for name in views:
            changes[name] = replace(changes.get(name, getattr(config.method_config, name)), **{option: 0.0})
        if views:
            lines.append((f"{fraction:.0%} name {what}", "hue shifts" if option == "hue" else "flips"))
    if not changes:
        return config, None
    line = (
        f"Of the sampled captions, {' and '.join(found for found, _ in lines)}, so {' and '.join(off for _, off in lines)} of "
        f"{' and '.join(sorted(changes))} are off; --no-caption-safe-views keeps them."
    )
    return replace(config, method_config=replace(config.method_config, **changes)), line


def _default_views(method_config: Any, option: str) -> list[str]:
    """Returns the image views that the method loads, and whose option is set, as the method has it by default."""
    default, unused = type(method_config)(), getattr(method_config, "unused_views", ())
    return [
        name
        for name, policy in vars(method_config).items()
        if isinstance(policy, AugmentationPolicy)
        and getattr(policy, option)
        and getattr(policy, option) == getattr(getattr(default, name), option)
        and name not in unused
    ]


def _fraction(captions: Sequence[str], words: Sequence[str]) -> float:
    """Returns the fraction of the captions that contain a word."""
    pattern = re.compile(rf"\b({'|'.join(words)})\b", re.IGNORECASE)
    return sum(pattern.search(caption) is not None for caption in captions) / max(1, len(captions))
