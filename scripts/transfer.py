"""Measures how a table's image encoders transfer to data that they were not trained on: zero-shot, linear probe and k-NN accuracy.

    python scripts/transfer.py runs/headline --data openclipart=data/openclipart --out results/transfer-emoji.json

RUNS is the folder of a finished `coalign reproduce`; all arms on all pairs and all seeds count, or those of --arms. As a control, the
encoders of the first arm are also evaluated before their training. The data, each half for the probe and k-NN to learn from, half
evaluated:

- openclipart: drawings with one of 24 tags, such as flag or fruit, as `coalign data openclipart` writes them
- emoji: drawings by another vendor in eight categories, as `coalign data emoji` writes them
- digits: scikit-learn's handwritten digits, always
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import coalign
from coalign.config import DataConfig
from coalign.errors import UserError
from coalign.evaluation.metrics import over_runs
from coalign.files import read_rows, write_json
from coalign.methods.table_settings import CLIP_ART_CLASSES
from coalign.runs.run import build_method, dual_encoder
from coalign.types import DualEncoder
from coalign.version import __version__

TASKS = ("zeroshot", "probe", "knn")
METRIC = "mean_per_class_recall"
UNTRAINED = "untrained"  # the control
PROMPT = "{}"  # captions of drawings are bare names
_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

Labeled = Iterator[tuple[Path, str]]  # image, class


def openclipart(folder: Path, _: Path) -> Labeled:
    """The drawings with one of the classes among their tags, of which the first counts."""
    names = {tag: name or tag for tag, _, name in (entry.partition(" = ") for entry in CLIP_ART_CLASSES)}
    for row in read_rows(folder / "metadata.jsonl"):
        if found := [names[tag] for tag in row["tags"] if tag in names]:
            yield folder / row["image"], found[0]


def emoji(folder: Path, _: Path) -> Labeled:
    """The test drawings, by their category."""
    for row in read_rows(folder / "metadata.jsonl"):
        if row["split"] == "test" and row["category"] not in ("", "component"):
            yield folder / row["image"], row["category"]


def digits(_: Path, work: Path) -> Labeled:
    """8 × 8 pixels, four times as large."""
    from sklearn.datasets import load_digits

    data = load_digits()
    for number, (pixels, target) in enumerate(zip(data.images, data.target)):
        path = work / f"{number}.png"
        large = np.kron(255 - pixels / 16 * 255, np.ones((4, 4))).round().astype(np.uint8)
        Image.fromarray(large).convert("RGB").save(path)
        yield path, _NUMBERS[target]


SOURCES: dict[str, Callable[[Path, Path], Labeled]] = {"openclipart": openclipart, "emoji": emoji, "digits": digits}


def write_table(name: str, folder: Path, work: Path) -> Path:
    """Writes the labeled images as a table in which every other one is the test split."""
    work.mkdir()
    samples = sorted((str(path.resolve()), label) for path, label in SOURCES[name](folder, work))
    rows = [
        {"image": path, "captions": [label], "label": label, "split": ("train", "test")[number % 2]}
        for number, (path, label) in enumerate(samples)
    ]
    table = work / f"{name}.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return table


def encoders(runs: Path, chosen: Sequence[str]) -> Iterator[tuple[str, int, DualEncoder]]:
    """Yields arm, seed and encoder: of every finished run of the chosen arms on all pairs, and of the first arm's runs before training.

    Without chosen arms, of all arms.
    """
    arms = json.loads((runs / "table.json").read_text())
    whole = [group for group in arms["groups"] if arms["arms"][group["name"]]["train_fraction"] == 1]
    if unknown := set(chosen) - {group["name"] for group in whole}:
        raise UserError(f"{runs} has no finished runs of {', '.join(sorted(unknown))} on all pairs.")
    whole = [group for group in whole if not chosen or group["name"] in chosen]
    for number, group in enumerate(whole):
        for folder, seed in zip(group["runs"], group["seeds"]):
            run = coalign.load(runs / folder)
            yield group["name"], seed, run.encoder()
            if number == 0:
                method = build_method(run.config, run.tokenizer, run.path)
                yield UNTRAINED, seed, dual_encoder(method, run.tokenizer, run.path.name)


def measure(encoder: DualEncoder, tables: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Returns the accuracies, as task:data -> a metric as in results.json."""
    config = coalign.EvalConfig(label="label", reading=replace(DataConfig(), prompts=(PROMPT,)))
    found = {}
    for task in TASKS:
        for name, table in tables.items():
            results = coalign.evaluate(encoder, [f"{task}:{table}"], config)
            found[f"{task}:{name}"] = next(iter(results.values()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="the folder of the table")
    parser.add_argument("--data", nargs="*", default=[], metavar="NAME=FOLDER", help=f"{', '.join(SOURCES)}")
    parser.add_argument("--arms", nargs="*", default=[], help="only these arms")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    folders = {"digits": Path()} | {
        name: Path(path) for name, _, path in (each.partition("=") for each in options.data)
    }
    values: dict[str, dict[str, list[float]]] = {}
    seeds: dict[str, list[int]] = {}
    data: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        tables = {name: write_table(name, folder, Path(temporary) / name) for name, folder in folders.items()}
        for arm, seed, encoder in encoders(options.runs, options.arms):
            seeds.setdefault(arm, []).append(seed)
            for task, result in measure(encoder, tables).items():
                metric = result["metrics"][METRIC]
                values.setdefault(arm, {}).setdefault(task, []).append(metric["value"])
                data.setdefault(task, {"samples": result["samples"], "chance": metric["chance"]})
            print(arm, seed, {task: round(100 * of_seed[-1], 1) for task, of_seed in values[arm].items()}, flush=True)
    arms = {
        arm: {
            "seeds": seeds[arm],
            "accuracies": {
                task: {"mean": float(np.mean(each)), "over_seeds": over_runs(each), "values": each}
                for task, each in by_task.items()
            },
        }
        for arm, by_task in values.items()
    }
    table = json.loads((options.runs / "table.json").read_text())["table"]
    write_json(options.out, {"table": table, "version": __version__, "tasks": data, "arms": arms}, indent=1)


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError, KeyError) as error:
        sys.exit(str(error))
