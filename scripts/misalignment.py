"""Measures whether models trained on simple scenes detect that an augmentation makes a caption wrong. The broken facts are known there.

Broken facts: Spearman's rank correlation, over strong views of scenes, between D(view, t) / D(image, t) and the fraction of the caption's
facts that the view breaks. D is the Euclidean distance of normalized embeddings. MCD claims a positive correlation; 0 means no relation.
For UniCLIP, whose head takes the augmentation parameters, also with the parameters of another image's view: if nothing changes, the head
does not use them.

Swapped captions: the area under the ROC curve of detecting, by D, the 10 % of pairs whose captions are swapped.

Flipped images, for UniCLIP: accuracy of choosing between "left" and "right" for the original
image, for the flipped image with the flip in its parameters, and for the flipped image without. A head that uses the parameters correctly
makes the same choice in the first two cases, and the opposite one in the third.

    python scripts/misalignment.py runs/scenes/clip-seed0 runs/scenes/uniclip-seed0 … --out results/misalignment-scenes.json

Runs of one arm that differ in their seed become one row.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from coalign.data.images.views import NUM_DRAWS, make_view
from coalign.data.scenes.source import Scenes
from coalign.evaluation import metrics
from coalign.evaluation.embed import embed_texts
from coalign.experiments.tables.launch_script import run_name
from coalign.experiments.tables.registry import TABLES
from coalign.methods.uniclip.method import UniCLIP
from coalign.randomness import Draws
from coalign.runs.run import Run, load
from coalign.types import STRONG, AugmentationParams, Foil
from coalign.version import __version__

SCENES, VIEWS, BATCH = 500, 4, 250
# name of a run's folder, without its seed -> name of the arm in its table
ARMS = {run_name(arm, 0).rpartition("-seed")[0]: arm for table in TABLES.values() for arm in table.arms}
FLIPPED = AugmentationParams(flipped=1.0)


def embed(run: Run, pixels: Tensor, params: Sequence[AugmentationParams] | None = None) -> Tensor:
    """Returns normalized embeddings. `params`: the augmentation parameters of the views, for UniCLIP's head."""
    method = run.method.eval()
    with torch.no_grad():
        pieces = []
        for start in range(0, len(pixels), BATCH):
            batch = pixels[start : start + BATCH]
            if params is not None and isinstance(method, UniCLIP):
                vectors = torch.tensor([p.vector() for p in params[start : start + BATCH]])
                pieces.append(method.project_image(method.image(batch).pooled, vectors))
            else:
                pieces.append(method.encode_image(batch))
    return torch.cat(pieces).float()


def whole(source: Scenes, indices: Sequence[int], size: int, flip: bool = False) -> Tensor:
    """Returns the full images in the evaluation view."""
    images = [source.image(index)[:, ::-1] if flip else source.image(index) for index in indices]
    return torch.stack([make_view(np.ascontiguousarray(image), size)[0] for image in images])


def broken_facts(run: Run, source: Scenes, shuffled: bool = False) -> float:
    """Spearman's correlation over all scenes and views. `shuffled`: the head takes the parameters of another image's view."""
    indices, size = source.splits["test"][:SCENES].tolist(), run.encoder().image_size
    texts = embed_texts(run.encoder(), [source.record(index).captions[0] for index in indices])
    before = (embed(run, whole(source, indices, size)) - texts).norm(dim=1)
    ratios, shares = [], []
    for number in range(VIEWS):
        draws = Draws(0, number, np.array(indices)).uniform("view", NUM_DRAWS)
        views = [make_view(source.image(i), size, STRONG, draw) for i, draw in zip(indices, draws)]
        params = [drawn for _, drawn in views]
        taken = params[1:] + params[:1] if shuffled else params
        after = (embed(run, torch.stack([pixels for pixels, _ in views]), taken) - texts).norm(dim=1)
        ratios.append((after / before).numpy())
        truths = [source.truth_after_view(index, drawn)[0] for index, drawn in zip(indices, params)]
        shares.append([1 - np.mean(truth) for truth in truths])
    return float(spearmanr(np.concatenate(ratios), np.concatenate(shares)).statistic)


def swapped_captions(run: Run) -> float:
    """Area under the ROC curve, from ranks."""
    source = Scenes(2000, level="simple", seed=9, swap=0.1, split="train")
    indices = list(range(len(source)))
    records = [source.record(index) for index in indices]
    texts = embed_texts(run.encoder(), [record.captions[0] for record in records])
    distances = (embed(run, whole(source, indices, run.encoder().image_size)) - texts).norm(dim=1).numpy()
    swapped = np.array([bool(record.facts["swapped"]) for record in records])
    ranks, positives = rankdata(distances), int(swapped.sum())
    below = ranks[swapped].sum() - positives * (positives + 1) / 2
    return float(below / (positives * (len(ranks) - positives)))


def swaps_sides(foil: Foil) -> bool:
    """Whether the foil differs from the caption only in "left" and "right"."""
    return foil.how == "replace" and re.sub(r"\b(left|right)\b", "", foil.true) == re.sub(
        r"\b(left|right)\b", "", foil.false
    )


def flips(run: Run, source: Scenes) -> dict[str, float]:
    """Accuracy of choosing the caption that is true of the original image over the one with left and right swapped."""
    foils = [foil for foil in source.foil_items("test", "side") if swaps_sides(foil)]
    indices, size = [foil.index for foil in foils], run.encoder().image_size
    difference = embed_texts(run.encoder(), [f.true for f in foils]) - embed_texts(
        run.encoder(), [f.false for f in foils]
    )
    flipped = whole(source, indices, size, flip=True)
    embeds = {
        "as it is": embed(run, whole(source, indices, size)),
        "flipped, and said so": embed(run, flipped, [FLIPPED] * len(foils)),
        "flipped, without a word": embed(run, flipped),
    }
    return {name: float(((image * difference).sum(1) > 0).double().mean()) for name, image in embeds.items()}


def summary(values: Sequence[float]) -> dict[str, Any]:
    return {"mean": float(np.mean(values)), "over_seeds": metrics.over_runs(values), "runs": list(values)}


def measure(folders: Sequence[Path], log: Callable[[str], None]) -> dict[str, Any]:
    source = Scenes(8, level="simple")
    rows: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        run = load(folder)
        scores = {"broken facts": broken_facts(run, source), "swapped captions": swapped_captions(run)}
        if isinstance(run.method, UniCLIP):
            scores |= {
                "broken facts, another view's parameters": broken_facts(run, source, shuffled=True),
                **flips(run, source),
            }
        name = folder.name.partition("-seed")[0]
        row = rows.setdefault(ARMS.get(name, name), {})
        for name, value in scores.items():
            row.setdefault(name, []).append(value)
        log(f"{folder.name}: {', '.join(f'{name} {value:.3f}' for name, value in scores.items())}")
    return {arm: {name: summary(values) for name, values in row.items()} for arm, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = measure(options.runs, lambda line: print(line, flush=True))
    values = {"version": __version__, "scenes": SCENES, "views": VIEWS, "rows": rows}
    text = json.dumps(values, indent=1) + "\n"
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
