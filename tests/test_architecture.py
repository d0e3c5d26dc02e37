"""The rules of the house: who imports whom, who may know a method's name, and how long things may be."""

import ast
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from coalign.data.sources.base import Source
from coalign.methods import METHODS

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "coalign").rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))
METHOD_FILES = {f"methods/{name}/method.py" for name in METHODS}


def relative(path):
    return str(path.relative_to(ROOT / "src" / "coalign"))


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)


def test_imports_satisfy_the_contracts():
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
    assert length <= (300 if relative(path) in METHOD_FILES else 400)
    tree = ast.parse(text)
    assert not text or ast.get_docstring(tree), "a module starts with what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            docstring = node.body[0] if ast.get_docstring(node) else None
            documentation = docstring.end_lineno - docstring.lineno + 1 if docstring else 0
            assert node.end_lineno - node.lineno - documentation < 60, f"{node.name} is too long"


def probes(text, names):
    """The calls of getattr and hasattr on a source, or of one of the names, by line."""
    calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) and len(node.args) > 1]
    return [
        f"{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if ast.unparse(call.func) in ("getattr", "hasattr")
        and (ast.unparse(call.args[0]).endswith("source") or ast.unparse(call.args[1]).strip("'") in names)
    ]


def test_nobody_probes_what_a_source_can_do():
    """`Source` declares every capability with a default, so its callers use plain attributes."""
    capabilities = {name for name in vars(Source) if not name.startswith("_")} - Source.__abstractmethods__
    assert {"splits", "left_out", "unread", "image_path", "fingerprints", "stamp"} <= capabilities
    text = 'hasattr(pairs.source, name)\ngetattr(data, "splits", None)\ngetattr(method, "image")\ngetattr(source_config, name)'
    assert [found[:2] for found in probes(text, capabilities)] == ["1:", "2:"]
    found = {str(path): calls for path in SOURCES + TESTS if (calls := probes(path.read_text(), capabilities))}
    assert not found


# words in the names of tasks and metrics
NAMES = re.compile(
    r"retrieval|zero_?shot|foils|probe|image_to_text|text_to_image|median_rank|modality_gap|acc1|mean_per|\.r\d|^_?r$"
)
INSPECTING = {"startswith", "endswith", "removeprefix", "removesuffix", "partition", "rpartition", "replace", "isdigit"}


def guesses(text):
    """The calls and comparisons that read something off the name of a task or a metric, by line."""
    found = []
    for node in ast.walk(ast.parse(text)):
        words, asked = [], False
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in INSPECTING:
            words, asked = node.args, True
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.Eq | ast.In):
            words, asked = [node.left, *node.comparators], any(isinstance(each, ast.Name) for each in [node.left])
        constants = [leaf.value for word in words for leaf in ast.walk(word) if isinstance(leaf, ast.Constant)]
        if asked and any(isinstance(value, str) and NAMES.search(value) for value in constants):
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


def test_nobody_guesses_from_a_metrics_name():
    """A metric says what it is: its title, kind and chance. Tasks are looked up in their registry."""
    text = 'name.startswith("retrieval_")\nif metric == "median_rank": pass\nname.removesuffix(".r10")\nrow["foils"]\n"foils" in found'
    assert [found[:2] for found in guesses(text)] == ["1:", "2:", "3:"]
    rooms = ("evaluation", "workflows/evaluate", "workflows/train", "runs", "report", "experiments")
    paths = [path for path in SOURCES if relative(path).startswith(rooms)] + sorted((ROOT / "scripts").rglob("*.py"))
    assert len(paths) > 50
    found = {
        relative(path) if path in SOURCES else path.name: calls
        for path in paths
        if (calls := guesses(path.read_text()))
    }
    found.pop("golden.py", None)  # reads the results of any revision
    assert not found


def test_folders_have_few_entries():
    counts = Counter(str(path.parent.relative_to(ROOT)) for path in SOURCES if path.name != "__init__.py")
    assert len(counts) > 10
    assert not {folder: count for folder, count in counts.items() if count > 17}


@pytest.mark.parametrize("name", METHODS)
def test_a_papers_folder_holds_its_method_and_its_configuration(name):
    folder = ROOT / "src/coalign/methods" / name
    assert (folder / "__init__.py").read_text() == ""
    assert {"method.py", "config.py"} <= {path.name for path in folder.iterdir()}


def imported(text, module, is_module, is_package=False):
    """The modules that a module's text imports, wherever in it: of `from a import b` it is a.b where that is a module, else a."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = module.split(".")[: -node.level + is_package or None] if node.level else []
            origin = ".".join([*above, *filter(None, [node.module])])
            found |= {name if is_module(name := f"{origin}.{alias.name}") else origin for alias in node.names}
    return found


def test_nested_imports_are_found():
    text = "import a.b\nfrom a import c, value\nfrom . import e\nfrom .f import g\nfrom .. import h\ndef late():\n    import a.d\n"
    modules = {"a.c", "a.m.e", "a.h"}
    assert imported(text, "a.m.own", modules.__contains__) == {"a.b", "a.c", "a", "a.m.e", "a.m.f", "a.h", "a.d"}
    assert imported("from . import e", "a.m", modules.__contains__, is_package=True) == {"a.m.e"}


def test_no_two_modules_import_each_other():
    """Neither inside functions nor for types alone."""
    paths = {}
    for path in SOURCES:
        parts = path.relative_to(ROOT / "src").with_suffix("").parts
        paths[".".join(parts[:-1] if path.name == "__init__.py" else parts)] = path
    imports = {
        name: imported(path.read_text(), name, paths.__contains__, path.name == "__init__.py") & paths.keys()
        for name, path in paths.items()
    }
    assert sum(map(len, imports.values())) > 300
    pairs = [(one, other) for one, others in imports.items() for other in others if one < other]
    assert not [(one, other) for one, other in pairs if one in imports[other]]


def test_no_test_is_imported():
    """What several tests share is in tests/helpers."""
    found = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in TESTS
        for name in imported(path.read_text(), "tests", lambda name: name.rpartition(".")[2].startswith("test_"))
        if any(part.startswith("test_") for part in name.split("."))
    ]
    assert len(TESTS) > 100
    assert not found


LIGHT = ["types", "errors", "config", "optim", "cli.main", "methods", *(f"methods.{name}.config" for name in METHODS)]
LIGHT += ["version", "files", "formatting"]


def test_help_and_configuration_import_no_torch():
    """What is looked up without torch: the modules, every method's configuration, and every recipe's settings."""
    result = python(
        f"""
import importlib, sys
for name in {LIGHT!r}:
    importlib.import_module("coalign." + name)
    assert "torch" not in sys.modules, name
from coalign.methods import METHODS, config_class, recipes
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
    from coalign.methods import recipes

    for name in METHODS:
        assert recipes()[name](5000).method == name


def test_no_papers_class_is_used_outside_its_folder():
    """What only some methods can do is an optional member of `Method`."""
    classes = re.compile(rf"coalign\.methods\.({'|'.join(METHODS)})\.method\b")
    found = [
        f"{relative(path)}: {match.group()}"
        for path in SOURCES
        if path.parent.parent.name != "methods" and relative(path) != "methods/__init__.py"
        for match in classes.finditer(path.read_text())
    ]
    assert not found
