"""Training on features of frozen encoders that are computed once, compared with running the encoders in every step.

CLIP with new heads on EfficientNet-Lite0 at 224 pixels (1280 features) and a text Transformer of MiniLM's size (384 features), both frozen;
random weights, which do not change the time. Both sides are `coalign`'s trainer and loader on one thread, timed by the processor, so that
other programs hardly affect it: a whole epoch of synthetic features, and a few steps of the encoders on drawn pictures. The time of 30
epochs is extrapolated from the measured ones; no such run is made. The pass that computes the features once is timed by itself.

Run: python benchmarks/feature_cache.py [--head glu] [--rows 100000] [--batch-size 256] [--steps 3] [--epochs 3]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lines import line

from coalign.config import TrainConfig
from coalign.data.loading.cached_views import CachedViews, to_bits
from coalign.data.loading.feature_file import FeatureFile
from coalign.data.scenes.source import Scenes
from coalign.data.sources.base import Source
from coalign.data.text.tokenizer import load_tokenizer
from coalign.methods import recipe
from coalign.networks.tuning import Tuning
from coalign.runs.run import build_method
from coalign.training.distributed import World
from coalign.training.trainer import Trainer
from coalign.types import Record
from coalign.workflows.train.batches import pair_loader
from coalign.workflows.train.caches.features import RunFeatures

MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"timm_model_name": "efficientnet_lite0", "image_size": 224},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 384, "heads": 12, "layers": 6},
}
WORLD = World(0, 1, torch.device("cpu"))
CHUNK = 10_000  # rows that are written at a time
FASTER = {"linear": 200, "glu": 30}  # per epoch, at least
MINUTES = {"linear": 10, "glu": 60}  # of 30 epochs of 100,000 pairs on two cores, at most
EPOCHS, PAIRS = 30, 100_000


class Rows(Source):
    """Pairs without images, whose features are in a file."""

    name = "rows"

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def record(self, index: int) -> Record:
        return Record(str(index), (f"caption {index}",))

    def image(self, index: int) -> bytes:
        raise AssertionError("a cached run opens no image")


def run(
    folder: Path, config: TrainConfig, source: Source, epochs: int, synthetic: bool
) -> tuple[list[float], list[FeatureFile], float]:
    """Trains. Returns the processor time per pair of each epoch, the files of features, and the time per pair of computing them."""
    tokenizer = load_tokenizer("clip")
    method = build_method(config, tokenizer)
    for tower in (method.image, method.text):
        tower.starts["trunk"] = "weights"  # type: ignore[operator,index]
    tuning = Tuning(method, config)
    features = RunFeatures(method, config, tokenizer, folder, WORLD)
    indices = np.arange(config.batch_size if not synthetic else len(source))
    cached = features.views("train", source, indices, {})
    files = [views.file for views in (cached.images, cached.texts) if views is not None]
    start = time.process_time()
    if synthetic:
        fill(cached)
    else:
        from rich.console import Console

        features.compute(Console(quiet=True), config.workers or 0)
    computing = (time.process_time() - start) / len(indices)
    loader = pair_loader(method, config, source, indices, tokenizer, WORLD, config.batch_size, {}, cached=cached)
    steps, marks = loader.steps_per_epoch, []

    def batches(first: int, stop: int) -> Iterator[Any]:
        for number, batch in enumerate(loader.batches(first, stop)):
            if number % steps == 0:
                marks.append(time.process_time())
            yield batch

    trainer = Trainer(
        method, config, WORLD, folder,
        batches=batches, num_pairs=len(indices), total_steps=epochs * steps, save_checkpoints=False, tuning=tuning,
    )  # fmt: skip
    trainer.fit()
    marks.append(time.process_time())
    return (np.diff(marks) / (steps * config.batch_size)).tolist(), files, computing


def fill(cached: CachedViews) -> None:
    """Writes random features."""
    for views in (cached.images, cached.texts):
        assert views is not None
        file, generator = views.file, torch.Generator().manual_seed(0)
        file.prepare({})
        for first in range(0, file.rows, CHUNK):
            count = min(CHUNK, file.rows - first)
            features = to_bits(torch.randn(count, 1, file.width, generator=generator))
            params = np.zeros((count, 1, file.num_params), np.float32) if file.num_params else None
            file.write(first, features, params, np.zeros(count, bool))


def measure(options: argparse.Namespace, model: dict[str, Any]) -> dict[str, Any]:
    """Returns the processor time per pair of each epoch, cached and not, and of the pass, and the files' bytes over two per feature."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "model.json").write_text(json.dumps(model))
        config = replace(
            recipe("clip")(PAIRS), model=str(folder / "model.json"), tokenizer="clip", head=options.head,
            batch_size=options.batch_size, workers=0, evals=0, precision="fp32",
            image_size=None, context_length=model["text_cfg"]["context_length"], batch_norm_group=options.batch_size,
            image_tuning="locked", text_tuning="locked",
        )  # fmt: skip
        torch.set_num_threads(1)
        cached, files, _ = run(folder / "cached", config, Rows(options.rows), options.epochs, synthetic=True)
        pictures = Scenes(options.batch_size, size=model["vision_cfg"]["image_size"])
        small = replace(config, feature_views=0)
        uncached, _, _ = run(folder / "uncached", small, pictures, options.steps + 1, synthetic=False)
        *_, computing = run(folder / "pass", config, pictures, 1, synthetic=False)
        numbers = sum(2 * file.width for file in files) * options.rows
        size = sum(file.path.stat().st_size for file in files) / numbers
    return {"cached": cached, "uncached": uncached[1:], "computing": computing, "size": size}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head", choices=list(FASTER), default="linear")
    parser.add_argument("--rows", type=int, default=PAIRS)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3)
    report(parser.parse_args(), MODEL)


def report(options: argparse.Namespace, model: dict[str, Any]) -> None:
    times = measure(options, model)
    slow, head = float(np.median(times["uncached"])), options.head
    line(
        f"Uncached over cached, {head} heads, per pair",
        [slow / each for each in times["cached"]],
        at_least=FASTER[head],
    )
    minutes = [each * PAIRS * EPOCHS / 60 / 2 for each in times["cached"]]
    line(
        f"{EPOCHS} epochs of {PAIRS:,} pairs on two cores over {MINUTES[head]} minutes, {head} heads",
        [each / MINUTES[head] for each in minutes],
        at_most=1,
        more=f"extrapolated from {options.epochs} epochs of {options.rows:,} rows on one thread, as if two cores halved the time",
    )
    line("The pass over an uncached epoch", [times["computing"] / slow])
    line("Files over two bytes per feature", [times["size"]], at_most=1.05)


if __name__ == "__main__":
    main()
