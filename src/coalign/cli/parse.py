"""Parses options from signatures and dataclasses with tyro, and prints its errors in one line."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Annotated, Any

import tyro
from tyro.conf import arg
from tyro.constructors import ConstructorRegistry, PrimitiveConstructorSpec, PrimitiveTypeInfo

from coalign.config import DataConfig
from coalign.errors import UserError

REGISTRY = ConstructorRegistry()
Reading = Annotated[DataConfig, arg(name="")]  # --image-column and the other options of how data is read


@REGISTRY.primitive_rule
def _text(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """Shows strings as TEXT in help."""
    if info.type is not str:
        return None
    return PrimitiveConstructorSpec(
        nargs=1,
        metavar="TEXT",
        instance_from_str=lambda args: args[0],
        is_instance=lambda instance: isinstance(instance, str),
        str_from_instance=lambda instance: [instance],
    )


@dataclass(frozen=True)
class Command:
    """A command of the command line."""

    summary: str  # the sentence in `coalign --help`
    # Arguments -> the work, which returns an exit code (None is 0). Raises UserError for invalid arguments.
    parse: Callable[[list[str]], Callable[[], int | None]]


def command(function: Callable[..., None], name: str) -> Command:
    """Returns the command of a function. Its options come from the signature, its help from the docstring."""

    # the function runs after parsing, so that its output to stderr is not mistaken for a parser error
    @wraps(function)
    def deferred(*args: Any, **options: Any) -> Callable[[], None]:
        return lambda: function(*args, **options)

    return Command(first_sentence(function), lambda args: parse(deferred, args, name))


def first_sentence(documented: Any) -> str:
    """Returns the first sentence of a docstring in one line."""
    paragraph = " ".join(inspect.cleandoc(documented.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=\.)\s", paragraph)[0]


def parse(target: Any, args: list[str], name: str, **options: Any) -> Any:
    """Calls `tyro.cli`. Raises UserError, with tyro's message in one line, for invalid arguments."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(target, args=args, prog=f"coalign {name}", registry=REGISTRY, **options)
    except SystemExit as error:
        if not error.code:
            raise
        # tyro prints a box, whose top line is a title
        lines = [line for line in errors.getvalue().splitlines() if not line.startswith("\u256d")]
        words = " ".join(re.sub(r"[\u2500-\u257f]", " ", " ".join(lines)).split())
        words = re.split(r"For full helptext|Argument helptext", words)[0].strip()
        raise UserError(f"{words} (see `coalign {name} --help`)") from None
