"""Every command and snippet of README.md and the documentation runs, page by page, on small data.

Commands run as written, except that models, epochs, batches and minutes are small (`page_folder.small`). Blocks that cannot run here are
marked on their page with the reason; test_pages.py checks these too.
"""

import os
import re
import shutil
import subprocess
import sys
from itertools import pairwise

import pytest
from helpers.page_folder import small, with_options, write_folder
from helpers.pages import PAGES, ROOT, blocks, coalign_words

from coalign.cli.main import main
from coalign.experiments.benchmark import plan as benchmark_plan

RUNS = {
    "runs/clip": ["--recipe", "clip", "--data", "photos"],
    "runs/mcd": ["--recipe", "mcd", "--data", "photos"],
    "runs/oner": ["--recipe", "oner", "--data", "photos"],
    "runs/filip": ["--recipe", "filip", "--data", "photos"],
    "runs/vit": ["--recipe", "clip", "--data", "photos", "--model", "small-vit.json"],  # the file in export.md
}
# programs that set up the environment or run the tests; their lines are checked in test_pages.py
NOT_RUN = {"make", "pip", "python3", "source", "git"}


def runs_here(block):
    """Whether a block has anything to run."""
    return block.not_run is None and (
        block.kind == "python" or any(words[0].rpartition("/")[2] not in NOT_RUN for words in block.commands())
    )


RUN = [page for page in PAGES if any(map(runs_here, blocks(page)))]


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """The data and finished runs."""
    root = write_folder(tmp_path_factory.mktemp("pages"))
    before = os.getcwd()
    os.chdir(root)
    try:
        for out, options in RUNS.items():
            assert main(small(["train", *options, "--out", out])) == 0
    finally:
        os.chdir(before)
    return root


def trained_in(block):
    """The folders of the runs that a block trains."""
    if block.kind == "python":
        return re.findall(r"coalign\.train\([^,]+, \"([^\"]+)\"", block.code)
    lines = filter(None, map(coalign_words, block.commands()))
    return [words[words.index("--out") + 1] for words in lines if words[0] == "train" and "--out" in words]


@pytest.fixture
def folder(template, tmp_path, request, monkeypatch):
    """A copy of the template without the runs that the page trains itself."""
    page = request.getfixturevalue("page")
    trained = {run for block in blocks(page) if runs_here(block) for run in trained_in(block)}
    text = "\n".join(block.code for block in blocks(page))
    root = tmp_path / "work"
    shutil.copytree(template, root, ignore=shutil.ignore_patterns("runs"))
    for name in RUNS:
        if name in text and name not in trained:
            shutil.copytree(template / name, root / name)
    monkeypatch.chdir(root)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(benchmark_plan, "MOST", benchmark_plan.FEWEST)
    return root


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=[page.relative_to(ROOT).as_posix() for page in RUN])
def test_page_runs(folder, page, capsys):
    names = {"__name__": "page"}
    for block in filter(runs_here, blocks(page)):
        if block.kind == "python":
            exec(compile(block.code, block.name, "exec"), names)
            continue
        for words in block.commands():
            where = f"{block.name}: {' '.join(words)}"
            assert run(words) == 0, f"{where}\n{capsys.readouterr().err}"
            missing = [path for path in outputs(words) if not (folder / path).exists()]
            assert not missing, where


def outputs(words):
    """The files and folders that a command is told to write."""
    if coalign_words(words) is None or "--dry-run" in words:
        return []
    return [path for option, path in pairwise(words) if option in ("--out", "--report", "--json")]


def run(words):
    """Runs a command and returns its exit code."""
    program = words[0].rpartition("/")[2]
    if program in NOT_RUN:
        return 0
    arguments = coalign_words(words)
    if arguments is None:
        return subprocess.run([sys.executable, str(ROOT / words[1]), *words[2:]], check=False).returncode
    if program == "torchrun":
        # the small model's BatchNorm has groups of 16, in each of two processes
        options = {"--batch-size": "32"} if arguments[0] == "train" else {}
        arguments = with_options(small(arguments), options)
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc-per-node",
            "2",
            "--standalone",
            "-m",
            "coalign",
        ]
        return subprocess.run([*launcher, *arguments], check=False).returncode
    try:
        return main(small(arguments))
    except SystemExit as error:  # --help
        return error.code or 0
