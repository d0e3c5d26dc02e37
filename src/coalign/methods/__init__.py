"""The registry: the only list of methods. Each entry maps a name to (module:class, module:config class)."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.methods.defaults import START, fit_to_start

if TYPE_CHECKING:
    from coalign.method import Method

METHODS = {
    "clip": ("coalign.methods.clip.method:CLIP", "coalign.methods.clip.config:CLIPConfig"),
    "slip": ("coalign.methods.slip.method:SLIP", "coalign.methods.slip.config:SLIPConfig"),
    "declip": ("coalign.methods.declip.method:DeCLIP", "coalign.methods.declip.config:DeCLIPConfig"),
    "uniclip": ("coalign.methods.uniclip.method:UniCLIP", "coalign.methods.uniclip.config:UniCLIPConfig"),
    "mcd": ("coalign.methods.mcd.method:MCD", "coalign.methods.mcd.config:MCDConfig"),
    "oner": ("coalign.methods.oner.method:OneR", "coalign.methods.oner.config:OneRConfig"),
    "mct": ("coalign.methods.mct.method:MCT", "coalign.methods.mct.config:MCTConfig"),
    "filip": ("coalign.methods.filip.method:FILIP", "coalign.methods.filip.config:FILIPConfig"),
}


def method_class(name: str) -> type[Method]:
    """Returns a method's class. Raises UserError for an unknown name."""
    return _import(_entry(name)[0])


def config_class(name: str) -> type[Any]:
    """Returns a method's configuration class without importing torch. Raises UserError for an unknown name."""
    return _import(_entry(name)[1])


def _entry(name: str) -> tuple[str, str]:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {near[0]}?" if near else f"available methods: {', '.join(METHODS)}."
        raise UserError(f"Unknown method {name!r}; {hint}")
    return METHODS[name]


def _import(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)


Recipe = Callable[[int], TrainConfig]  # number of training pairs -> settings


def recipes() -> dict[str, Recipe]:
    """Returns all recipes by name: the `RECIPES` of every method's config.py."""
    registered: dict[str, Recipe] = {}
    for _, config in METHODS.values():
        registered.update(import_module(config.split(":")[0]).RECIPES)
    return registered


def recipe(name: str, **settings: Any) -> Recipe:
    """Returns a recipe by name.

    Args:
        name: Such as "clip" or "uniclip-yfcc15m". `coalign recipes` lists all.
        settings: Fields of `TrainConfig` to change. With pretrained weights, the defaults of the others change too, to those of
            fine-tuning.

    Returns:
        A function from the number of training pairs to a `TrainConfig`. Change single settings with `dataclasses.replace`.

    Raises:
        UserError: There is no recipe or setting of this name.

    Example:
        ```python
        config = coalign.recipe("clip")(10_000)
        print(config.model, config.batch_size, config.epochs)
        locked = coalign.recipe("clip", model="ViT-B-32", pretrained="openai", image_tuning="locked")
        ```
    """
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"available recipes: {', '.join(sorted(known))}."
        raise UserError(f"Unknown recipe {name!r}; {hint}")
    if unknown := sorted(set(settings) - {field.name for field in fields(TrainConfig)}):
        raise UserError(f"TrainConfig has no setting {unknown[0]!r}.")
    if not settings:
        return known[name]

    def changed(num_pairs: int) -> TrainConfig:
        config = replace(known[name](num_pairs), **settings)
        return replace(fit_to_start(config), **settings) if set(settings) & set(START) else config

    return changed
