"""Small methods with frozen parts."""

from helpers.builders import build_method
from helpers.steps import MODELS

from coalign.config import TrainConfig
from coalign.networks.towers.spec import Tower
from coalign.networks.tuning import Tuning


def pretrained(name, folder, model="transformer", parts=("trunk",), **changes):
    """A method whose towers count as pretrained, with random weights."""
    method = build_method(name, folder, MODELS[model] if isinstance(model, str) else model, **changes)
    for tower in (getattr(method, role, None) for role in ("image", "text")):
        if isinstance(tower, Tower):
            tower.starts |= dict.fromkeys(parts, "weights")
    return method


def tuned(name, folder, model="transformer", parts=("trunk",), settings=None, **tuning):
    """Returns a method and its tuning; `tuning` are fields of `TrainConfig`."""
    method = pretrained(name, folder, model, parts)
    return method, Tuning(method, TrainConfig(name, method.config, **(settings or {}), **tuning))
