"""The commands that train a table's arms as their paper did, for machines that can."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coalign.config import TrainConfig, flatten, to_json
from coalign.errors import UserError
from coalign.recipes import recipe
from coalign.recipes.sweep import PAPER_PAIRS, Table
from coalign.run.model import write_file

HEAD = """#!/bin/sh
# {name} at the paper's scale; its column: {paper}. Stopped, it goes on where it was.
# GPUS: processes on this machine. DATA_ROOT: the folder with ImageNet, for the evaluation.
set -e
: "${{GPUS:=8}}" "${{DATA_ROOT:?is the folder with ImageNet in it}}"
"""


def write_launch(path: Path, name: str, sweep: Table, arms: list[str], data: str, seeds: int) -> list[str]:
    """Writes the shell script `path`, and returns the arms it leaves out, which have no recipe at the paper's scale."""
    without = [arm for arm in arms if sweep.paper_config(arm, 0) is None]
    chosen = [arm for arm in arms if arm not in without]
    if not chosen:
        raise UserError(f"The table {name} has no commands at the scale of a paper; run it with --scale cpu.")
    text = HEAD.format(name=name, paper=sweep.paper)
    text += "".join(f"\n{line}" for line in _lines(sweep, chosen, data, path.parent, seeds)) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text)
        temporary.chmod(0o755)

    write_file(path, write)
    return without


def _lines(sweep: Table, arms: list[str], data: str, out: Path, seeds: int) -> Iterator[str]:
    folders = []
    for seed in range(seeds):
        for arm in arms:
            found = sweep.paper_config(arm, seed)
            assert found is not None
            folder = out / run_name(arm, seed)
            folders.append(shlex.quote(str(folder)))
            figure = sweep.arms[arm].paper
            yield f"# {arm}, seed {seed}" + ("" if figure is None else f"; the paper: {figure}")
            words = ["train", "--recipe", found[0], "--data", data, "--out", str(folder), *options(*found)]
            yield f'torchrun --nproc-per-node "$GPUS" -m coalign.cli {shlex.join([*words, "--resume", "auto"])}'
            words = ["eval", str(folder), "--tasks", sweep.paper_task, "--json", str(folder / "paper.json")]
            yield f'coalign {shlex.join(words)} --data-root "$DATA_ROOT" --device cuda'
    if len(folders) > 1:
        yield f"coalign compare {' '.join(folders)} --report {shlex.quote(str(out / 'table.html'))}"


def run_name(arm: str, seed: int) -> str:
    """The folder of one arm's run with one seed."""
    return f"{arm.replace(' ', '-').replace(',', '').replace(chr(39), '')}-seed{seed}"


def options(name: str, config: TrainConfig) -> list[str]:
    """The options of `coalign train` that turn the settings of the recipe `name` into these."""
    was, now = (flatten(to_json(each)) for each in (recipe(name)(PAPER_PAIRS), config))
    words: list[str] = []
    for key, value in now.items():
        if value != was.get(key):
            words += _option(key.removeprefix("method_config.").removeprefix("optimiser."), value)
    return words


def _option(key: str, value: Any) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        *outer, last = flag.split(".")
        return ["--" + ".".join([*outer, last if value else f"no-{last}"])]
    return [f"--{flag}", *(map(str, value) if isinstance(value, (list, tuple)) else [str(value)])]
