"""Does pre-training help a detector on scenes? For each run: Faster R-CNN with a pyramid on its tower, and on the same tower as it was
before training, with the same settings; their average precision on held-out scenes.

    python scripts/detection_transfer.py runs/uniclip-seed0 runs/uniclip-seed1 --scenes 128 --epochs 8 --out results/detection-scenes.json

As a control, once more on a tower that learnt in another detector. Takes about three minutes a detector, and ten for the control. The
towers must be ResNets, as those of `tiny` are.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import open_clip
import torch

from coalign import __version__
from coalign.data.detection import open_detection
from coalign.evaluation.detection import DetectionConfig, measure_detector, train_detector
from coalign.evaluation.metrics import over_runs
from coalign.networks.detector import build_detector
from coalign.run.model import Run, build_method, dual_encoder, load

TESTED = 200  # scenes


def measure(run: Run, tower: str, data: str, epochs: int, control: int = 0) -> dict[str, dict[str, float]]:
    """AP, AP50 and AP75 with intervals over images. tower: as trained by the run ("pre-trained"), as before ("random"), or from there
    trained in a detector of `control` other scenes ("by detection")."""
    method = run.method if tower == "pre-trained" else build_method(replace(run.config, pretrained=None), run.tokenizer)
    encoder = dual_encoder(method, run.tokenizer, run.config.context_length, run.path.name)
    assert encoder.modules is not None
    trunk, seed, config = encoder.modules()[0], run.config.seed, DetectionConfig(epochs=epochs)
    if tower == "by detection":
        others = open_detection(f"scenes:{control},seed=5,{data.partition(',')[2]}")
        train_detector(fresh(trunk, others, seed), others, train_part(others), config, seed=seed)
    source = open_detection(data)
    detector = fresh(trunk, source, seed)
    bad = train_detector(detector, source, train_part(source), config, seed=seed)
    assert source.splits is not None
    return measure_detector(detector, source, source.splits["test"][:TESTED], bad).to_json()["intervals"]


def fresh(trunk: nn.Module, source: DetectionSource, seed: int) -> nn.Module:
    """A detector on this very trunk, with heads that have learnt nothing."""
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
    parser.add_argument(
        "--control", type=int, default=512, help="scenes of the detector that the control's tower is from"
    )
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    rows = []
    for folder in args.runs:
        run = load(folder)
        data = f"scenes:{args.scenes},size={run.encoder().image_size}"
        for tower in ("pre-trained", "random"):
            intervals = measure(run, tower, data, args.epochs)
            row = {"run": folder.name, "seed": run.config.seed, "tower": tower, "intervals": intervals}
            rows.append(row)
            print(
                folder.name,
                tower,
                {name: round(x["value"], 4) for name, x in intervals.items()},
                flush=True,
            )
    # does a detector profit from what a tower has learnt at all? As well as can be: from another detector
    control = measure(load(args.runs[0]), "by detection", data, args.epochs, args.control)
    print("control", {name: round(x["value"], 4) for name, x in control.items()}, flush=True)
    differences = {
        name: [
            one["intervals"][name]["value"] - other["intervals"][name]["value"]
            for one, other in zip(rows[::2], rows[1::2])
        ]
        for name in rows[0]["intervals"]
    }
    summary = {
        name: {"mean": float(np.mean(values)), "over_seeds": over_runs(values)} for name, values in differences.items()
    }
    result = {
        "version": __version__,
        "task": "Faster R-CNN with a pyramid",
        "tested": TESTED,
        "data": data,
        "epochs": args.epochs,
        "rows": rows,
        "control": {"run": args.runs[0].name, "scenes": args.control, "intervals": control},
        "differences": summary,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name, found in summary.items():
        print(f"{name}: pre-trained minus random {100 * found['mean']:+.1f}, over runs {found['over_seeds']}")


if __name__ == "__main__":
    main()
