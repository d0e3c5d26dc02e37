"""Finished runs without training: folders that hold what `compare` reads."""

import json
from dataclasses import replace

import numpy as np

from coalign.config import TrainConfig
from coalign.evaluation.metrics import measure
from coalign.evaluation.probes.accuracy import accuracies
from coalign.methods import recipe
from coalign.metric import Outcome
from coalign.runs.folder import SavedConfig, write_config
from coalign.runs.outcomes import write_outcomes

CAPTIONS = np.array([1, 3, 2, 1, 1, 2] * 20)  # of each held-out image
CHANCE = {"r1": 0.01, "r5": 0.05, "r10": 0.1, "median_rank": 50.0}


def ranks_like(level, seed, size):
    """Whole ranks, the lower the better the level."""
    return np.ceil(np.random.default_rng(seed).exponential(level, size))


def write_run(
    folder, level=10.0, seed=0, items=None, method="clip", zero_shot=False, data="photos", look_alikes=0, **settings
):
    """A run whose ranks are drawn around `level`; its first images have look-alikes in training. Returns its folder."""
    folder.mkdir(parents=True)
    config: TrainConfig = replace(recipe(method)(5000), seed=seed, workers=seed + 1, **settings)
    write_config(folder, SavedConfig(data, config, 5000, len(CAPTIONS)))
    images = np.arange(len(CAPTIONS))
    metrics, arrows = [], {"image_to_text": "Image → text", "text_to_image": "Text → image"}
    for side, clusters in (("image_to_text", images), ("text_to_image", images.repeat(CAPTIONS))):
        ranks = ranks_like(level, [seed, len(clusters)], len(clusters))
        for k in (1, 5, 10):
            outcome = Outcome((ranks <= k).astype(float), clusters)
            metrics.append(measure(f"{side}.r{k}", f"{arrows[side]} R@{k}", outcome, CHANCE[f"r{k}"]))
        outcome = Outcome(ranks, clusters, "median")
        title = f"{arrows[side]} median rank"
        metrics.append(measure(f"{side}.median_rank", title, outcome, CHANCE["median_rank"]))
    counts = {"images": len(CAPTIONS), "captions": int(CAPTIONS.sum()), "distinct_captions": int(CAPTIONS.sum())}
    by_task, hashes = {"retrieval": metrics}, {"retrieval": images + 1000 if items is None else items}
    if look_alikes:
        outcome = Outcome(
            (ranks_like(level, [seed], len(images)) <= 10).astype(float)[look_alikes:], images[look_alikes:]
        )
        task = "retrieval_without_look_alikes"
        by_task[task] = [measure("image_to_text.r10", "Without look-alikes", outcome, CHANCE["r10"])]
        hashes[task] = images[look_alikes:] + 1000
    if zero_shot:
        classes = images % 5
        correct = (np.random.default_rng(seed).random(len(images)) < 0.1 * classes).astype(float)
        by_task["zeroshot"], hashes["zeroshot"] = accuracies("Zero-shot", correct, classes, 5), images
    write_outcomes(folder, by_task, hashes)
    tasks = {task: {"metrics": {m.name: m.to_json() for m in found}, **counts} for task, found in by_task.items()}
    results = {
        "run": {"step": 60, "seconds": 100.0 + seed, "cpu_seconds": 90.0, "ended": "finished"},
        "parameters": {"image": 700, "text": 300},
        "tasks": tasks,
    }
    (folder / "results.json").write_text(json.dumps(results))
    rows = []
    for step in range(60):
        rows.append({"step": step, "loss": 3.0, "seconds": 1.5 * (step + 1)})
        if step % 20 == 19:
            values = {
                f"val/{side}_r{k}": step / 100 + k / 1000
                for side in ("image_to_text", "text_to_image")
                for k in (1, 5, 10)
            }
            values["val/mean_recall"] = sum(values.values()) / len(values)
            rows.append({"step": step, "val/loss": 2.0 if step < 40 else None, **values})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
