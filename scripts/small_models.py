"""Compares small models and their settings: trains with each candidate, and records retrieval on the held-out pairs and
processor time.

A candidate is a name or a JSON file as for `--model`, or `default`: the model that a recipe has for this size of data. Trials that the
output has already are not repeated, so the search can be interrupted and extended. All other settings are the defaults for the size of the
data. Single-threaded, so that processor time, which includes data loading, validation and the final evaluation, is comparable beside other
programs.

Run: python scripts/small_models.py DATA --models tiny FILE.json --epochs 60 --out results/small-models.json
     python scripts/small_models.py DATA --recipes clip oner --models default --lrs 0.002 0.004 --epochs 12 --out results/small-models.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

import coalign
from coalign.config import NOMINAL_PAIRS, TrainConfig
from coalign.files import write_json
from coalign.methods import recipe
from coalign.networks.towers.spec import model_config
from coalign.runs.folder import read_results

Trial = dict[str, Any]
IDENTITY = ("data", "recipe", "model", "lr", "epochs", "seed", "image_size")


def run_trial(
    data: str, name: str, model: str, lr: float, epochs: float, seed: int, image_size: int, test: list[str]
) -> Trial:
    """Trains and evaluates one model."""

    def config(num_pairs: int) -> TrainConfig:
        default = recipe(name)(num_pairs)
        optimizer = replace(default.optimizer, lr=lr)
        return replace(
            default,
            model=model,
            optimizer=optimizer,
            epochs=epochs,
            seed=seed,
            image_size=image_size,
            val_fraction=0.1,
            evals=1,
            workers=0,
            test_splits=tuple(test),
        )

    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time()
        coalign.train(data, Path(folder) / "run", config)
        seconds = time.process_time() - start
        results = read_results(Path(folder) / "run")
    parameters = sum(results["parameters"].values())
    metrics = {
        task: {name: metric["value"] for name, metric in values["metrics"].items() if metric["kind"] == "rate"}
        for task, values in results["tasks"].items()
    }
    counts = {task: values["metrics"]["image_to_text.r1"]["count"] for task, values in results["tasks"].items()}
    tower = {key: value for key, value in model_config(model)["vision_cfg"].items() if key != "image_size"}
    return {"tower": tower, "seconds": seconds, "parameters": parameters, "metrics": metrics, "images": counts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--recipes", nargs="+", default=["clip"])
    parser.add_argument("--models", nargs="+", default=["tiny"])
    parser.add_argument("--lrs", nargs="+", type=float, default=[2e-3])
    parser.add_argument("--epochs", nargs="+", type=float, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--image-size", type=int, default=48)
    parser.add_argument("--test-splits", nargs="*", default=[])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    trials: list[Trial] = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {tuple(trial[key] for key in IDENTITY) for trial in trials}
    axes = (args.seeds, args.epochs, args.data, args.recipes, args.lrs, args.models)
    for seed, epochs, data, name, lr, candidate in product(*axes):
        model = recipe(name)(NOMINAL_PAIRS).model if candidate == "default" else candidate
        values = (Path(data).stem, name, Path(model).stem, lr, epochs, seed, args.image_size)
        if values not in done:
            result = run_trial(data, name, model, lr, epochs, seed, args.image_size, args.test_splits)
            trials.append(dict(zip(IDENTITY, values)) | result)
            write_json(args.out, trials)
            print(json.dumps(trials[-1]))


if __name__ == "__main__":
    main()
