"""`import coalign`: the public names, imported when they are first used."""

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import coalign

FUNCTIONS = ("train", "evaluate", "load", "open_data", "compare", "benchmark", "recipe")


def test_importing_the_package_imports_neither_torch_nor_the_functions_modules():
    code = "import sys, coalign; dir(coalign); sys.exit(any(n in sys.modules for n in ('torch', 'numpy', 'coalign.workflows')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", [name for name in coalign.__all__ if name != "__version__"])
def test_a_public_name_is_the_documented_object(name):
    value = getattr(coalign, name)
    assert getattr(coalign, name) is value
    assert name in dir(coalign)
    assert value.__module__.startswith("coalign.")
    assert (value.__doc__ or "").strip()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_public_function_is_typed_and_says_what_it_raises(name):
    function = getattr(coalign, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    assert "Raises UserError" in function.__doc__


def test_editors_see_the_same_names_as_the_interpreter():
    """What is imported for type checkers only is what `__getattr__` returns."""
    tree = ast.parse(Path(coalign.__file__).read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    typed = {alias.asname or alias.name: (node.module, alias.name) for node in block.body for alias in node.names}
    assert typed == coalign._PUBLIC
    assert {*typed, "__version__"} == set(coalign.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'evalute'"):
        coalign.evalute  # noqa: B018
    with pytest.raises(ImportError):
        from coalign import nothing  # noqa: F401
