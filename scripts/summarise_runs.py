"""Sums up runs that differ in their seed alone, for results/: python scripts/summarise_runs.py runs/seed* --out results/NAME.json

Each run's metrics keep their bootstrap interval over the held-out items; "over_seeds" has the mean over runs and its 95 % t-interval,
which says how much a new seed would move the figure on the same held-out items.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from coalign import __version__

DIRECTIONS = ("image_to_text", "text_to_image")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--data", default=None, help="name of the data to store instead of its path")
    options = parser.parse_args()
    configs = [json.loads((run / "config.json").read_text()) for run in options.runs]
    results = [json.loads((run / "results.json").read_text()) for run in options.runs]
    seeds = [config["config"].pop("seed") for config in configs]
    if len(set(seeds)) < len(seeds) or any(config["config"] != configs[0]["config"] for config in configs):
        raise SystemExit("The runs must have the same configuration and different seeds.")
    for config in configs:
        config["data"] = options.data or config["data"]
    retrieval = [result["retrieval"] for result in results]
    summary = {
        "coalign": __version__,
        **configs[0],
        "seeds": seeds,
        "held_out": {name: retrieval[0][name] for name in ("images", "captions", "distinct_captions")},
        "over_seeds": {
            side: {name: _over_seeds(retrieval, side, name) for name in retrieval[0][side]} for side in DIRECTIONS
        },
        "runs": [
            {"seed": seed, "run": result["run"], **{side: one[side] for side in DIRECTIONS}}
            for seed, result, one in zip(seeds, results, retrieval)
        ],
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(summary, indent=1) + "\n")
    for side in DIRECTIONS:
        for name, entry in summary["over_seeds"][side].items():
            scale = 1 if name == "median_rank" else 100
            value, low, high, chance = (scale * entry[key] for key in ("mean", "low", "high", "chance"))
            print(f"{side} {name}: {value:.1f} ({low:.1f} to {high:.1f} over seeds), chance {chance:.2f}")


def _over_seeds(retrieval: list[dict[str, Any]], side: str, name: str) -> dict[str, float]:
    values = np.array([result[side][name]["value"] for result in retrieval])
    half = (
        stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
        if len(values) > 1
        else float("nan")
    )
    mean = float(values.mean())
    return {"mean": mean, "low": mean - half, "high": mean + half, "chance": retrieval[0][side][name]["chance"]}


if __name__ == "__main__":
    main()
