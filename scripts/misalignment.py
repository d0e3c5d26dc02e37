"""What do runs on scenes know of the harm that augmentation does to captions? On scenes, what a view broke is counted.

Broken facts: of each scene one strong view after another is drawn; the share of its caption's facts that the view broke is set against how
much further from the caption the view lies than the whole picture, D(view, t) / D(picture, t). Spearman's rank correlation: 1 if the model
tells exactly what was broken, 0 if it does not know. (MCD's claim; D is the Euclidean distance of normalised embeddings.)

Swapped captions: a tenth of the pairs of other scenes have each other's captions; the area under the ROC curve of finding them by D.

Flipped pictures, for UniCLIP, whose head is told how a view was made: "left" or "right", for a picture as it is, for the same flipped and
said to be so, and flipped without a word. A head that has understood says of the second what it said of the first, and of the third the
contrary.

    python scripts/misalignment.py runs/views/clip-seed0 runs/views/uniclip-seed0 … --out results/misalignment-scenes.json

Runs of one arm, of several seeds, become one row.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from coalign import __version__
from coalign.data.image_views import make_views
from coalign.data.randomness import generator
from coalign.data.scenes import Scenes
from coalign.evaluation import metrics
from coalign.evaluation.embed import embed_texts
from coalign.methods.uniclip import UniCLIP
from coalign.recipes.tables import TABLES
from coalign.run.launch import run_name
from coalign.run.model import Run, load
from coalign.types import EVALUATION, STRONG, AugmentationParams, Foil

SCENES, VIEWS, BATCH = 500, 4, 250
# the name of a run's folder -> the table's name of its arm
ARMS = {run_name(arm, 0).rpartition("-seed")[0]: arm for table in TABLES.values() for arm in table.arms}
FLIPPED = AugmentationParams(flipped=1.0)


def embed(run: Run, pixels: Tensor, params: Sequence[AugmentationParams] | None = None) -> Tensor:
    """Normalised embeddings; with `params`, of a method that looks at them, as of views that were made so."""
    method = run.method.eval()
    with torch.no_grad():
        pieces = []
        for start in range(0, len(pixels), BATCH):
            batch = pixels[start : start + BATCH]
            if params is not None and isinstance(method, UniCLIP):
                vectors = torch.tensor([p.vector() for p in params[start : start + BATCH]])
                pieces.append(method.project_image(method.image(batch), vectors))
            else:
                pieces.append(method.encode_image(batch))
    return torch.cat(pieces).float()


def whole(source: Scenes, indices: Sequence[int], size: int, flip: bool = False) -> Tensor:
    """The pictures, in the evaluation view."""
    pictures = [source.image(index)[:, ::-1] if flip else source.image(index) for index in indices]
    nothing = partial(generator, 0, 0, 0, 0)
    return torch.stack(
        [make_views(np.ascontiguousarray(p), {"v": EVALUATION}, nothing, size)["v"][0] for p in pictures]
    )


def broken_facts(run: Run, source: Scenes) -> float:
    """Spearman's correlation over all scenes and views."""
    indices, size = source.splits["test"][:SCENES].tolist(), run.encoder().image_size
    texts = embed_texts(run.encoder(), [source.record(index).captions[0] for index in indices])
    before = (embed(run, whole(source, indices, size)) - texts).norm(dim=1)
    ratios, shares = [], []
    for number in range(VIEWS):
        draws = [partial(generator, 0, number, index, 0) for index in indices]
        made = [make_views(source.image(i), {"v": STRONG}, draw, size)["v"] for i, draw in zip(indices, draws)]
        params = [drawn for _, drawn in made]
        after = (embed(run, torch.stack([pixels for pixels, _ in made]), params) - texts).norm(dim=1)
        ratios.append((after / before).numpy())
        truths = [source.truth_after_view(index, drawn)[0] for index, drawn in zip(indices, params)]
        shares.append([1 - np.mean(truth) for truth in truths])
    return float(spearmanr(np.concatenate(ratios), np.concatenate(shares)).statistic)


def swapped_captions(run: Run) -> float:
    """The area under the ROC curve, by ranks."""
    source = Scenes(2000, seed=9, swap=0.1, split="train")
    indices = list(range(len(source)))
    records = [source.record(index) for index in indices]
    texts = embed_texts(run.encoder(), [record.captions[0] for record in records])
    distances = (embed(run, whole(source, indices, run.encoder().image_size)) - texts).norm(dim=1).numpy()
    swapped = np.array([bool(record.facts["swapped"]) for record in records])
    ranks, positives = rankdata(distances), int(swapped.sum())
    below = ranks[swapped].sum() - positives * (positives + 1) / 2
    return float(below / (positives * (len(ranks) - positives)))


def is_of_sides(foil: Foil) -> bool:
    """Whether "left" stands against "right", and nothing else."""
    return foil.how == "replace" and re.sub(r"\b(left|right)\b", "", foil.true) == re.sub(
        r"\b(left|right)\b", "", foil.false
    )


def flips(run: Run, source: Scenes) -> dict[str, float]:
    """How often the caption that is true of the picture as it is wins over the one with left and right exchanged."""
    foils = [foil for foil in source.foil_items("test", "side") if is_of_sides(foil)]
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


def measure(folders: Sequence[Path], say: Callable[[str], None]) -> dict[str, Any]:
    source = Scenes(8)
    found: dict[str, dict[str, list[float]]] = {}
    for folder in folders:
        run = load(folder)
        figures = {"broken facts": broken_facts(run, source), "swapped captions": swapped_captions(run)}
        if isinstance(run.method, UniCLIP):
            figures |= flips(run, source)
        name = folder.name.partition("-seed")[0]
        row = found.setdefault(ARMS.get(name, name), {})
        for name, value in figures.items():
            row.setdefault(name, []).append(value)
        say(f"{folder.name}: {', '.join(f'{name} {value:.3f}' for name, value in figures.items())}")
    return {arm: {name: summary(values) for name, values in row.items()} for arm, row in found.items()}


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
