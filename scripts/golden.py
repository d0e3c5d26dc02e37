"""Checks that a refactoring changed no number: `python scripts/golden.py BASE` trains every method with the code of the
git revision BASE and with this tree's, and compares losses, gradient norms, evaluation and weights bit for bit."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

METHODS = ("clip", "slip", "declip", "uniclip", "mcd", "oner", "mct")
TRAIN, VAL, BATCH, STEPS, EVALS = 96, 32, 16, 12, 3
OPTIONS: dict[str, Any] = {
    "--image-size": 32, "--batch-size": BATCH, "--epochs": BATCH * STEPS / TRAIN, "--evals": EVALS,
    "--precision": "fp32", "--seed": 1, "--workers": 0,
}  # fmt: skip
# Options of a method that only newer trees have, with the value that does what older trees do.
NEWER_OPTIONS = {"oner": {"--similarity": "projector"}}
# Options, and files of a run, that two trees may spell differently: add the new spelling to the old one.
SPELLINGS = {
    "--workers": ("--workers",),
    "metrics": ("metrics.jsonl",),
    "results": ("results.json",),
    "weights": ("last/model.safetensors",),
}
FIXED = {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0", "MPLBACKEND": "agg"}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")

# Words in the names of numbers that differ between two runs of the same code.
NOT_COMPARED = re.compile(r"(^|[_./])(seconds?|time|wait|speed|memory|version|date)([_./]|$)")
# Kind of a logged number by its name, the first that fits.
KINDS = {"evaluation": r"^(val|eval)", "grad norm": r"grad", "loss": r"loss", "other": r""}
FINAL = re.compile(r"retrieval|recall")  # what a final evaluation must have measured
MAX_LINES = 8  # printed of a method's differences of one kind

Values = dict[str, tuple[str, ...]]  # name -> numbers as printed in the file


class Number(str):
    """A number as a JSON file prints it."""


@dataclass
class Tree:
    """One version of the code, and the folder of its runs."""

    root: Path
    runs: Path

    def start(self, name: str, *args: object) -> subprocess.Popen[bytes]:
        """The command line, by its entry point in pyproject.toml; what it prints goes to NAME.log."""
        scripts = tomllib.loads((self.root / "pyproject.toml").read_text())["project"]["scripts"]
        module, function = scripts["coalign"].split(":")
        src = str(self.root / "src")
        # an installed copy must not run in the tree's place
        code = f"import sys, {module} as m; assert m.__file__.startswith({src!r}), m.__file__; sys.exit(m.{function}())"
        self.runs.mkdir(exist_ok=True)
        env = os.environ | ONE_THREAD | FIXED | {"PYTHONPATH": src, "XDG_CACHE_HOME": str(self.runs / "cache")}
        command = [sys.executable, "-c", code, *map(str, args)]
        with open(self.runs / f"{name}.log", "wb") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, cwd=self.runs, env=env)

    def train(self, method: str, data: Path) -> subprocess.Popen[bytes]:
        options = {"--recipe": method, "--data": data, "--out": self.runs / method, **OPTIONS}
        newer = NEWER_OPTIONS.get(method, {})
        known = self.known_options(method) if newer or any(len(SPELLINGS.get(name, ())) > 1 for name in options) else ()
        options |= {name: value for name, value in newer.items() if name in known}
        words: list[object] = []
        for name, value in options.items():
            spellings = SPELLINGS.get(name, (name,))
            words += [next((each for each in spellings if each in known), spellings[0]), value]
        return self.start(method, "train", *words)

    def known_options(self, method: str) -> set[str]:
        """The options of `train` for a method, by the tree's help."""
        self.start("help", "train", "--recipe", method, "--help").wait()
        return set(re.findall(r"--[\w.-]+", (self.runs / "help.log").read_text()))

    def file(self, method: str, what: str) -> bytes:
        paths = [self.runs / method / name for name in SPELLINGS[what]]
        return next((path.read_bytes() for path in paths if path.exists()), b"")

    def read(self, method: str) -> dict[str, Values]:
        """Kind -> what the method's run left of it."""
        found = logged(self.file(method, "metrics"))
        results = read_json(self.file(method, "results") or b"{}")
        found["final"] = {name: (value,) for name, value in leaves(results)}
        found["weights"] = tensors(self.file(method, "weights"))
        return found


def read_json(text: bytes) -> Any:
    return json.loads(text, parse_float=Number, parse_int=Number, parse_constant=Number)


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """The numbers of a nested value that are compared, by their paths."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(item, f"{name}.{key}" if name else str(key))
    elif (value is None or isinstance(value, Number)) and not NOT_COMPARED.search(name):
        yield name, str(value)


def logged(lines: bytes) -> dict[str, Values]:
    """The series of the metrics log, by kind."""
    series: dict[str, list[str]] = defaultdict(list)
    for line in lines.splitlines():
        for name, value in leaves(read_json(line)):
            series[name].append(value)
    found: dict[str, Values] = {kind: {} for kind in KINDS}
    for name, values in series.items():
        found[next(kind for kind, words in KINDS.items() if re.search(words, name))][name] = tuple(values)
    return found


def tensors(content: bytes) -> Values:
    """Type, shape and hash of each tensor in a safetensors file, read without either tree's code."""
    start = 8 + int.from_bytes(content[:8], "little")
    found: Values = {}
    for name, entry in json.loads(content[8:start] or b"{}").items():
        if name != "__metadata__":
            first, stop = (start + offset for offset in entry["data_offsets"])
            digest = hashlib.sha256(content[first:stop]).hexdigest()
            found[name] = (f"{entry['dtype']}{entry['shape']} {digest}",)
    return found


def lacking(found: dict[str, Values]) -> list[str]:
    """What a run did not leave behind though without it equality would prove nothing."""
    lines = []
    for kind, least in (("loss", STEPS), ("grad norm", STEPS), ("evaluation", EVALS)):
        if not any(len(values) >= least and len(set(values) - {"None"}) > 1 for values in found[kind].values()):
            lines.append(f"no {kind} of {least} steps")
    if not any(FINAL.search(name) and values != ("None",) for name, values in found["final"].items()):
        lines.append("no final evaluation")
    return lines if found["weights"] else [*lines, "no weights"]


def differences(kind: str, old: Values, new: Values) -> tuple[list[str], list[str]]:
    """A line for each value that differs, and the names that only the new run has where these are no difference.

    A name that both runs have must keep its values, so that two swapped ones are found. What was renamed needs an equal: final numbers
    under any name, as duplicates may have been merged; series and weights one each, series under a new name.
    """
    gone = {name: values for name, values in old.items() if new.get(name) != values}
    come = {name: values for name, values in new.items() if old.get(name) != values}
    for name, values in list(gone.items()):
        if kind == "final":
            if name not in new and values in new.values():
                del gone[name]
            continue
        any_name = kind == "weights"
        equals = [n for n, v in come.items() if v == values and (any_name or (n not in old and name not in new))]
        if equals:
            del gone[name], come[equals[0]]
    lines = [f"{name}: {difference(gone[name], come[name])}" for name in gone if name in come]
    lines += [f"{name}: only old, {' '.join(values)[:60]}" for name, values in gone.items() if name not in come]
    only_new = [name for name in come if name not in old]
    if kind != "weights":
        return lines, only_new
    return lines + [f"{name}: only new, {' '.join(come[name])[:60]}" for name in come if name not in gone], []


def difference(old: tuple[str, ...], new: tuple[str, ...]) -> str:
    places = [(n, a, b) for n, (a, b) in enumerate(zip_longest(old, new), 1) if a != b]
    number, before, after = places[0]
    where = f" at {number} of {len(old)}, {len(places)} differ" if len(old) > 1 else ""
    return f"old {str(before)[:40]}, new {str(after)[:40]}{where}"


def compare(method: str, old: dict[str, Values], new: dict[str, Values]) -> bool:
    """Prints how a method's two runs compare; True if nothing differs."""
    lines = [f"{side}: {lack}" for side, run in (("old", old), ("new", new)) for lack in lacking(run)]
    notes = []
    for kind in old:
        found, only_new = differences(kind, old[kind], new[kind])
        lines += [f"{kind:10}  {line}" for line in found[:MAX_LINES]]
        lines += [f"{kind:10}  and {len(found) - MAX_LINES} more"] if len(found) > MAX_LINES else []
        shown = ", ".join([*only_new[:2], *(["…"] if len(only_new) > 2 else [])])
        notes += [f"{kind:10}  {len(only_new)} only new, no difference: {shown}"] if only_new else []
    sizes = "  ".join(f"{kind} {len(v)} × {max(map(len, v.values()), default=0)}" for kind, v in old.items())
    verdict = f"{method:8}  {'DIFFERS' if lines else 'equal'}    {sizes}"
    print(verdict, *lines, *notes, sep=f"\n{method:8}    ", flush=True)
    return not lines


def check(method: str, trees: dict[str, Tree], data: Path) -> bool:
    """Runs a method in both trees side by side, and compares."""
    running: dict[str, subprocess.Popen[bytes]] = {}
    try:
        running |= {side: tree.train(method, data) for side, tree in trees.items()}
        failed = [side for side, process in running.items() if process.wait()]
    finally:
        for process in running.values():
            process.kill()
            process.wait()
    for side in failed:
        tail = (trees[side].runs / f"{method}.log").read_text(errors="replace").splitlines()[-15:]
        print(f"{method:8}  FAILED in the {side} tree:", *tail, sep="\n    ", flush=True)
    return not failed and compare(method, *(tree.read(method) for tree in trees.values()))


def draw(folder: Path) -> None:
    """Shapes as PNG and JPEG of several sizes, with two captions and four tags each, in a table with its own split."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    colors = ("red", "green", "blue", "yellow", "purple", "orange")
    rows = []
    for number in range(TRAIN + VAL):
        color, ground = map(str, rng.choice(colors, 2, replace=False))
        shape, radius = str(rng.choice(["ellipse", "rectangle"])), int(rng.integers(10, 30))
        width, height = map(int, rng.integers(64, 112, 2))
        noise = Image.fromarray(rng.integers(0, 96, (height, width, 3), dtype=np.uint8))
        picture = Image.blend(noise, Image.new("RGB", noise.size, ground), 0.6)
        box = (width // 2 - radius, height // 2 - radius, width // 2 + radius, height // 2 + radius)
        getattr(ImageDraw.Draw(picture), shape)(box, fill=color)
        name = f"{number:03}.{'png' if number % 2 else 'jpg'}"
        picture.save(folder / name)
        size = "large" if radius > 20 else "small"
        captions = [f"a {size} {color} {shape} on {ground}", f"the {shape} is {color}"]
        tags = [color, shape, size, f"{ground} ground"]  # so many that MCT finds a few pictures that share them all
        split = "train" if number < TRAIN else "val"
        rows.append({"image": name, "captions": captions, "tags": tags, "split": split})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@contextmanager
def worktree(repository: Path, revision: str, folder: Path) -> Iterator[Path]:
    """The revision checked out in `folder`, which goes away again whatever happens."""
    git = ("git", "-C", str(repository), "worktree")
    try:
        if subprocess.run([*git, "add", "--quiet", "--detach", str(folder), revision]).returncode:
            sys.exit(f"{revision} could not be checked out")
        yield folder
    finally:
        subprocess.run([*git, "remove", "--force", str(folder)], stderr=subprocess.DEVNULL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("base", help="git revision that this tree is compared with")
    base = parser.parse_args().base
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda which, _: sys.exit(128 + which))  # by way of every `finally`, without a traceback
    here, began = Path(__file__).resolve().parents[1], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="golden-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        draw(folder / "data")
        with worktree(here, base, folder / "base") as there:
            trees = {"old": Tree(there, folder / "old"), "new": Tree(here, folder / "new")}
            equal = [check(method, trees, folder / "data") for method in METHODS]
    print(f"{sum(equal)} of {len(METHODS)} methods equal to {base}, {time.monotonic() - began:.0f} s")
    return 0 if all(equal) else 1


if __name__ == "__main__":
    sys.exit(main())
