"""Recipes: named settings, one function a row of a paper's table, in the file of its method. Imports no torch."""

from __future__ import annotations

import difflib
import pkgutil
from collections.abc import Callable
from importlib import import_module

from coalign.config import TrainConfig
from coalign.errors import UserError

Recipe = Callable[[int], TrainConfig]  # number of training pairs -> settings


def recipes() -> dict[str, Recipe]:
    """Every recipe by name; a module of this package offers its own in `RECIPES`."""
    found: dict[str, Recipe] = {}
    for module in pkgutil.iter_modules(__path__):
        found.update(getattr(import_module(f"{__name__}.{module.name}"), "RECIPES", {}))
    return found


def recipe(name: str) -> Recipe:
    known = recipes()
    if name not in known:
        near = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {', '.join(near)}?" if near else f"there are {', '.join(sorted(known))}."
        raise UserError(f"There is no recipe named {name!r}; {hint}")
    return known[name]
