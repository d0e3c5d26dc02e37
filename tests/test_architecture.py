"""The rules of the house: who imports whom, who may know a method's name, and how long things may be."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from coalign.methods import METHODS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "coalign").rglob("*.py"))


def relative(path):
    return str(path.relative_to(ROOT / "src" / "coalign"))


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_imports_keep_to_the_contracts():
    result = python("from importlinter.cli import lint_imports_command; lint_imports_command()")
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"[1-9]\d* kept, 0 broken", result.stdout)


def test_training_names_no_method():
    names = re.compile(rf"\b({'|'.join(METHODS)})\b", re.IGNORECASE)
    assert names.search("as in CLIP")
    found = [
        f"{relative(path)}:{number}: {line.strip()}"
        for path in (ROOT / "src/coalign/training").rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if names.search(line)
    ]
    assert not found


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_sizes_and_docstrings(path):
    text = path.read_text()
    length = len(text.splitlines())
    assert length <= (300 if path.parent.name == "methods" else 400)
    tree = ast.parse(text)
    assert not text or ast.get_docstring(tree), "a module starts with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} is too long"


LIGHT = ["types", "errors", "config", "optim", "cli", "recipes", "methods", *(f"recipes.{name}" for name in METHODS)]


def test_help_and_configuration_import_no_torch():
    """What is looked up without torch: the modules, every method's configuration, and every recipe's settings."""
    result = python(
        f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("coalign." + name)
    assert "torch" not in sys.modules, name
from coalign.methods import METHODS, config_class
from coalign.recipes import recipes
for name in METHODS:
    config_class(name)()
for make in recipes().values():
    make(5000)
heavy = [name for name in ("torch", "torchvision", "open_clip", "timm", "sklearn", "matplotlib") if name in sys.modules]
assert not heavy, heavy
"""
    )
    assert result.returncode == 0, result.stderr


def test_every_method_has_a_recipe_of_its_name():
    from coalign.recipes import recipes

    for name in METHODS:
        assert recipes()[name](5000).method == name
