"""The registry: the one place that lists the methods. A line is name -> (its file and class, its configuration)."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import TYPE_CHECKING, Any

from coalign.errors import UserError

if TYPE_CHECKING:
    from coalign.method import Method

METHODS = {
    "clip": ("coalign.methods.clip:CLIP", "coalign.recipes.clip:CLIPConfig"),
    "slip": ("coalign.methods.slip:SLIP", "coalign.recipes.slip:SLIPConfig"),
    "declip": ("coalign.methods.declip:DeCLIP", "coalign.recipes.declip:DeCLIPConfig"),
    "uniclip": ("coalign.methods.uniclip:UniCLIP", "coalign.recipes.uniclip:UniCLIPConfig"),
    "mcd": ("coalign.methods.mcd:MCD", "coalign.recipes.mcd:MCDConfig"),
    "oner": ("coalign.methods.oner:OneR", "coalign.recipes.oner:OneRConfig"),
    "mct": ("coalign.methods.mct:MCT", "coalign.recipes.mct:MCTConfig"),
}


def method_class(name: str) -> type[Method]:
    return _import(_entry(name)[0])


def config_class(name: str) -> type[Any]:
    """The method's Config, without importing torch."""
    return _import(_entry(name)[1])


def _entry(name: str) -> tuple[str, str]:
    if name not in METHODS:
        near = difflib.get_close_matches(name, METHODS, 1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(METHODS)}."
        raise UserError(f"There is no method named {name!r}; {hint}")
    return METHODS[name]


def _import(path: str) -> Any:
    module, name = path.split(":")
    return getattr(import_module(module), name)
