"""`import coalign`: the public names, imported when they are first used."""

import ast
import inspect
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny

import coalign

PAGE = (Path(__file__).parents[1] / "docs/api.md").read_text()
FUNCTIONS = (
    "train",
    "evaluate",
    "load",
    "load_images",
    "open_data",
    "compare",
    "benchmark",
    "recipe",
    "interpolate",
    "embed",
)


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
def test_a_public_function_is_typed_and_documented(name):
    function = getattr(coalign, name)
    signature = inspect.signature(function)
    assert signature.return_annotation is not inspect.Signature.empty
    assert all(p.annotation is not inspect.Parameter.empty for p in signature.parameters.values())
    sections = re.findall(r"^ {4}(\w+):\n", function.__doc__, re.MULTILINE)
    assert sections == ["Args", "Returns", "Raises", "Example"]
    args = function.__doc__.partition("Args:\n")[2].partition("Returns:\n")[0]
    assert re.findall(r"^ {8}(\w+): ", args, re.MULTILINE) == list(signature.parameters)
    assert re.search(r"Raises:\n {8}UserError: ", function.__doc__)


@pytest.mark.slow
def test_the_examples_of_docstrings_run(monkeypatch, tmp_path):
    """In one folder, in this order, with tiny models; the benchmark's call is only checked against its signature."""
    for paper in ("clip", "mcd"):
        module = import_module(f"coalign.methods.{paper}.config")
        monkeypatch.setattr(module, "default_config", partial(small, module.default_config, tmp_path))
    monkeypatch.chdir(tmp_path)
    tiny.write_pairs(tmp_path / "photos", 64)
    for number, name in enumerate(("cat.jpg", "dog.jpg")):
        shutil.copy(sorted((tmp_path / "photos").rglob("*.png"))[number], tmp_path / name)
    signature = inspect.signature(coalign.benchmark)
    names = {
        "my_image_function": lambda pixels: pixels.float().mean((2, 3)),
        "my_text_function": lambda texts: torch.ones(len(texts), 3),
    }
    for name in (
        "train",
        "load",
        "load_images",
        "evaluate",
        "embed",
        "compare",
        "interpolate",
        "open_data",
        "recipe",
        "DualEncoder",
        "benchmark",
    ):
        example = re.search(r"```python\n(.*?)```", inspect.getdoc(getattr(coalign, name)), re.DOTALL)[1]
        if name == "interpolate":  # between a run and one that could have started from it
            shutil.copytree(tmp_path / "runs/clip", tmp_path / "runs/more")
        if name == "benchmark":
            monkeypatch.setattr(
                coalign, name, lambda *args, **options: SimpleNamespace(advice=signature.bind(*args, **options))
            )
        exec(compile(dedent(example), name, "exec"), {"coalign": coalign, **names})
    assert list(tmp_path.rglob("report.html"))  # of the run that the others load


def small(original, folder, *args):
    model = str(tiny.write_model(folder / "model"))
    options = {"batch_size": 16, "epochs": 1, "workers": 0, "evals": 1, "val_fraction": 0.25}  # enough pairs for R@10
    return replace(original(*args), model=model, context_length=12, **options)


def test_the_page_documents_every_public_name():
    documented = set(re.findall(r"^::: coalign\.(\w+)$", PAGE, re.MULTILINE))
    assert documented == set(coalign.__all__) - {"__version__"}


@pytest.mark.parametrize("name", re.findall(r"^::: (coalign\.\w+\.\S+)$", PAGE, re.MULTILINE))
def test_a_documented_type_exists_and_describes_its_fields(name):
    module, _, attribute = name.rpartition(".")
    value = getattr(import_module(module), attribute)
    text = value.__doc__.partition("Attributes:\n")[2]
    fields = getattr(value, "__dataclass_fields__", {})
    assert set(re.findall(r"^ {8}(\w+): ", text, re.MULTILINE)) >= set(fields)


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
