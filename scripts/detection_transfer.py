"""Measures whether pretraining helps a detector on scenes: average precision of Faster R-CNN with FPN on held-out scenes.

For each run, one detector is trained on its image encoder, and one on the same encoder with random weights, with the same settings. As a
control, one more is trained on an image encoder pretrained in another detector. Takes about three minutes per detector, and ten for the
control. The image encoders must be ResNets, such as `tiny`'s.

    python scripts/detection_transfer.py runs/uniclip-seed0 runs/uniclip-seed1 --scenes 128 --epochs 8 --out results/detection-scenes.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import nn

from coalign.data.sources.benchmarks.detection import DetectionSource, open_detection
from coalign.evaluation.finetune.detection import DetectionConfig, evaluate_detector, train_detector
from coalign.evaluation.metrics import over_runs
from coalign.networks.detector import build_detector
from coalign.runs.run import Run, build_method, dual_encoder, load
from coalign.version import __version__

NUM_TEST = 200  # scenes


def measure(run: Run, tower: str, data: str, epochs: int, control: int = 0) -> dict[str, Any]:
    """Returns AP, AP50 and AP75 by name, with intervals over images, as `Metric.to_json`.

    tower: the image encoder, as trained by the run ("pretrained"), randomly initialized ("random"), or randomly initialized and then
    trained in a detector on `control` other scenes ("detection").
    """
    method = run.method if tower == "pretrained" else build_method(run.config, run.tokenizer, run.path)
    encoder = dual_encoder(method, run.tokenizer, run.path.name)
    assert encoder.modules is not None
    trunk, seed, config = encoder.modules()[0], run.config.seed, DetectionConfig(epochs=epochs)
    if tower == "detection":
        others = open_detection(f"scenes:{control}:hard,seed=5,{data.partition(',')[2]}")
        train_detector(fresh(trunk, others, seed), others, train_part(others), config, seed=seed)
    source = open_detection(data)
    detector = fresh(trunk, source, seed)
    bad = train_detector(detector, source, train_part(source), config, seed=seed)
    assert source.splits is not None
    metrics = evaluate_detector(detector, source, source.splits["test"][:NUM_TEST], bad)
    return {metric.name: metric.to_json() for metric in metrics}


def fresh(trunk: nn.Module, source: DetectionSource, seed: int) -> nn.Module:
    """Returns a detector on the given trunk, with randomly initialized heads."""
    torch.manual_seed(seed)
    return build_detector(
        trunk, "fpn", False, len(source.classnames), source.side, source.regions,
        open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD,
    )  # fmt: skip


def train_part(source: DetectionSource) -> np.ndarray:
    assert source.splits is not None
    return source.splits["train"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--scenes", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--control", type=int, default=512, help="training scenes of the control's first detector")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for folder in args.runs:
        run = load(folder)
        data = f"scenes:{args.scenes}:hard,size={run.encoder().image_size}"
        for tower in ("pretrained", "random"):
            metrics = measure(run, tower, data, args.epochs)
            rows.append({"run": folder.name, "seed": run.config.seed, "tower": tower, "metrics": metrics})
            print(
                folder.name,
                tower,
                {name: round(x["value"], 4) for name, x in metrics.items()},
                flush=True,
            )
    # upper bound: whether a detector benefits from any pretraining at all
    control = measure(load(args.runs[0]), "detection", data, args.epochs, args.control)
    print("control", {name: round(x["value"], 4) for name, x in control.items()}, flush=True)
    differences = {
        name: [
            pretrained["metrics"][name]["value"] - random["metrics"][name]["value"]
            for pretrained, random in zip(rows[::2], rows[1::2])
        ]
        for name in rows[0]["metrics"]
    }
    summary = {
        name: {"mean": float(np.mean(values)), "over_seeds": over_runs(values)} for name, values in differences.items()
    }
    result = {
        "version": __version__,
        "task": "Faster R-CNN with FPN",
        "tested": NUM_TEST,
        "data": data,
        "epochs": args.epochs,
        "rows": rows,
        "control": {"run": args.runs[0].name, "scenes": args.control, "metrics": control},
        "differences": summary,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, difference in summary.items():
        print(
            f"{name}: pretrained minus random {100 * difference['mean']:+.1f}, 95 % CI over runs {difference['over_seeds']}"
        )


if __name__ == "__main__":
    main()
