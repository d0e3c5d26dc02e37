"""A shell script of the commands that train a table's arms at the paper's scale."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from coalign.config import TrainConfig, flatten, to_json
from coalign.errors import UserError
from coalign.files import write_atomically
from coalign.methods import recipe
from coalign.methods.defaults import START, with_start
from coalign.methods.table import PAPER_PAIRS, Table

HEAD = """#!/bin/sh
# {name} at the paper's scale; compared with {paper}. If interrupted, run it again to resume.
# GPUS: processes on this machine. DATA_ROOT: folder that holds ImageNet, for evaluation.
set -e
: "${{GPUS:=8}}" "${{DATA_ROOT:?must name the folder that holds ImageNet}}"
"""


def write_launch(path: Path, name: str, sweep: Table, arms: list[str], data: str, seeds: int) -> list[str]:
    """Writes the shell script `path`. Returns the omitted arms, which have no recipe at the paper's scale."""
    without = [arm for arm in arms if sweep.paper_config(arm, 0) is None]
    included = [arm for arm in arms if arm not in without]
    if not included:
        raise UserError(f"The table {name} has no recipes at the paper's scale; run it with --scale cpu.")
    text = HEAD.format(name=name, paper=sweep.paper_metric)
    text += "".join(f"\n{line}" for line in _lines(sweep, included, data, path.parent, seeds)) + "\n"

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")
        temporary.chmod(0o755)

    write_atomically(path, write)
    return without


def _lines(sweep: Table, arms: list[str], data: str, out: Path, seeds: int) -> Iterator[str]:
    folders = []
    for seed in range(seeds):
        for arm in arms:
            found = sweep.paper_config(arm, seed)
            assert found is not None
            folder = out / run_name(arm, seed)
            folders.append(shlex.quote(str(folder)))
            value = sweep.arms[arm].paper
            yield f"# {arm}, seed {seed}" + ("" if value is None else f"; the paper reports {value}")
            words = ["train", "--recipe", found[0], "--data", data, "--out", str(folder), *options(*found)]
            yield f'torchrun --nproc-per-node "$GPUS" -m coalign {shlex.join([*words, "--resume", "auto"])}'
            words = ["eval", str(folder), "--tasks", sweep.paper_task, "--json", str(folder / "paper.json")]
            yield f'coalign {shlex.join(words)} --data-root "$DATA_ROOT" --device cuda'
    if len(folders) > 1:
        yield f"coalign compare {' '.join(folders)} --report {shlex.quote(str(out / 'table.html'))}"


def run_name(arm: str, seed: int) -> str:
    """Folder name of one arm trained with one seed."""
    return f"{arm_name(arm)}-seed{seed}"


def arm_name(arm: str) -> str:
    """Name of an arm in names of files."""
    return arm.replace(" ", "-").replace(",", "").replace("'", "")


def options(
    name: str,
    config: TrainConfig,
    num_pairs: int = PAPER_PAIRS,
    most_pairs: int | None = None,
    text: Callable[[Any], str] = str,
) -> list[str]:
    """The options of `coalign train` that change the recipe `name` for `num_pairs` to `most_pairs` training pairs to `config`.

    most_pairs: None: `num_pairs`. text: of a value.
    """
    was, of_most = (_defaults(name, config, number) for number in (num_pairs, most_pairs or num_pairs))
    words: list[str] = []
    for key, value in flatten(to_json(config)).items():
        if value != was.get(key) or value != of_most.get(key, value):  # without a role, it has no options either
            name = key.removeprefix("method_config.").removeprefix("optimizer.").removeprefix("reading.")
            words += _option(name, value, text)
    return words


def _defaults(name: str, config: TrainConfig, num_pairs: int) -> dict[str, Any]:
    """The default settings of a run that starts as `config` does; those that say how it starts are the recipe's own."""
    default = recipe(name)(num_pairs)
    return flatten(to_json(with_start(default, config))) | {each: getattr(default, each) for each in START}


def _option(key: str, value: Any, text: Callable[[Any], str]) -> list[str]:
    flag = key.replace("_", "-")
    if isinstance(value, bool):
        *outer, last = flag.split(".")
        return ["--" + ".".join([*outer, last if value else f"no-{last}"])]
    return [f"--{flag}", *map(text, value if isinstance(value, (list, tuple)) else [value])]
