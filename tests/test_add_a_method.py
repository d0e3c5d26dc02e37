"""The example of docs/add-a-method.md, created word for word in a copy of the package."""

import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from coalign.method import Method

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/add-a-method.md").read_text()
BLOCKS = re.findall(r"^(?:`([\w/]+\.py)`\n\n)?```(python|bash)\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = [shlex.split(line) for _, kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
FILES = {path: code for path, kind, code in BLOCKS if kind == "python" and path}
INTERFACE, REGISTRY_LINE, SIMILARITY = [code for path, kind, code in BLOCKS if kind == "python" and not path]
IMPORTS = """from typing import NamedTuple

import torch
from torch import Tensor

from coalign.method import Method


"""
METHOD = Path("src/coalign/methods/cyclip")


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the repository with the example's folder, files and registry line."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in ("src", "tests", "pyproject.toml"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, root / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, root / name)
    assert f"Create `{METHOD}/` with an empty `__init__.py`" in TEXT
    (root / METHOD).mkdir()
    (root / METHOD / "__init__.py").touch()
    assert set(FILES) == {f"{METHOD}/config.py", f"{METHOD}/method.py", "tests/methods/test_cyclip.py"}
    for path, code in FILES.items():
        assert not (root / path).exists()
        (root / path).write_text(code)
    (root / METHOD / "similarity.py").write_text(IMPORTS + SIMILARITY)
    registry = root / "src/coalign/methods/__init__.py"
    registry.write_text(registry.read_text().replace("METHODS = {\n", "METHODS = {\n" + REGISTRY_LINE))
    return root


def run(root, *words):
    environment = {**os.environ, "PYTHONPATH": str(root / "src")}
    process = subprocess.run(
        [sys.executable, *words], cwd=root, env=environment, capture_output=True, text=True, timeout=600
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-4000:]
    return process.stdout


def run_tests(root, selected):
    """Runs the page's pytest command on the selected tests. Returns how many passed."""
    (command,) = [words[1:] for words in COMMANDS if "pytest" in words]
    output = run(root, *command, "-k", selected, "-p", "no:cacheprovider")
    assert "skipped" not in output
    return int(re.search(r"(\d+) passed", output)[1])


def test_the_interface_is_that_of_the_code():
    signatures = re.findall(r"^def (\w+)(\(.*) \.\.\.$", INTERFACE, re.MULTILINE)
    assert [name for name, _ in signatures] == ["encode", "objective", "after_step"]
    for name, signature in signatures:
        assert signature == f"{inspect.signature(getattr(Method, name))}:".replace("'", "")


@pytest.mark.slow
def test_its_tests_and_the_step_on_slices_pass(copy):
    where = run(copy, "-c", "import coalign; print(coalign.__file__)")
    assert where.startswith(str(copy))
    assert run_tests(copy, "cyclip") == 4  # its two tests, and slices with two models


@pytest.mark.slow
def test_the_step_on_two_processes_passes(copy):
    assert run_tests(copy, "two_processes") == 1


@pytest.mark.slow
def test_its_recipe_trains(copy, tmp_path):
    (command,) = [words[1:] for words in COMMANDS if "train" in words]
    (tmp_path / "images").mkdir()
    noise = np.random.default_rng(0)
    for number in range(40):
        name = f"thing {chr(97 + number // 10)}{chr(97 + number % 10)}.png"
        Image.fromarray(noise.integers(256, size=(64, 64, 3), dtype=np.uint8)).save(tmp_path / "images" / name)
    small = ["--data", tmp_path / "images", "--out", tmp_path / "run", "--epochs", "1", "--workers", "0"]
    output = run(copy, "-m", "coalign", *command, *map(str, small))
    assert "cyclip with " in output
    assert (tmp_path / "run/last/manifest.json").exists()
    assert (tmp_path / "run/report.html").exists()


def test_its_similarity_ignores_padding():
    names = {}
    exec(IMPORTS + SIMILARITY, names)
    g = torch.Generator().manual_seed(0)
    images, texts = (
        names["TokenEmbeds"](
            torch.randn(len(lengths), 4, 3, dtype=torch.float64, generator=g),
            torch.arange(4) < torch.tensor(lengths)[:, None],
        )
        for lengths in ([4, 1, 2], [3, 2])
    )
    similarity = names["TokenWise"].similarity(None, images, texts)
    for i, (image, image_valid) in enumerate(zip(*images)):
        for j, (text, text_valid) in enumerate(zip(*texts)):
            largest = [max(float(word @ patch) for patch in image[image_valid]) for word in text[text_valid]]
            assert similarity[i, j].item() == pytest.approx(sum(largest) / len(largest))


def test_the_example_is_formatted(copy):
    files = [*FILES, f"{METHOD}/similarity.py"]
    assert run(copy, "-m", "ruff", "check", *files) == "All checks passed!\n"
    assert "already formatted" in run(copy, "-m", "ruff", "format", "--check", *files)


@pytest.mark.slow
def test_the_example_type_checks(copy):
    output = run(copy, "-m", "mypy", str(METHOD))
    assert output.startswith("Success: no issues found")
