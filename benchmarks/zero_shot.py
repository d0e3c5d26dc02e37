"""Zero-shot evaluation of open_clip's ViT-B/32 with ImageNet's 80 templates: ours compared with CLIP_benchmark, in float32 on the CPU.

The weights are random (nothing is downloaded) and the images are synthetic JPEGs of 500 × 375 pixels; neither affects the time.
CLIP_benchmark's side is its own `zero_shot_classifier` and `run_classification` on a loader with open_clip's transform. Ours is `evaluate`
with the same transform, which encodes texts without padding. RATIO is their CPU time over ours, in total and for texts and images; the
accuracies must be equal.

Run: pip install "coalign[bench]"; python benchmarks/zero_shot.py [--images 2000] [--classes 100] [--threads 1]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import open_clip
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from coalign.config import DataConfig
from coalign.data.text.prompts import templates
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate

MODEL, TARGET = "ViT-B-32", 1.5


def write_images(folder: Path, images: int, classes: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(images):
        path = folder / f"class_{number % classes:03d}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


def theirs(folder: Path, weights: str) -> tuple[float, dict[str, float]]:
    from clip_benchmark.metrics import zeroshot_classification as peer

    model, _, transform = open_clip.create_model_and_transforms(MODEL, pretrained=weights)
    model.eval()
    data = ImageFolder(str(folder), transform)
    names = [name.replace("_", " ") for name in data.classes]
    prompts = [template.replace("{}", "{c}") for template in templates("imagenet")]
    times = {}
    start = time.process_time()
    classifier = peer.zero_shot_classifier(model, open_clip.get_tokenizer(MODEL), names, prompts, "cpu", amp=False)
    times["texts"] = time.process_time() - start
    start = time.process_time()
    logits, target = peer.run_classification(model, classifier, DataLoader(data, 64), "cpu", amp=False)
    times["images"] = time.process_time() - start
    return float((logits.argmax(1) == target).float().mean()), times


def ours(folder: Path, weights: str) -> tuple[float, dict[str, float]]:
    """Calls of the text encoder are timed separately; all other time is counted as images."""
    from coalign.workflows.evaluate.eval_model import open_eval_model

    encoder = open_eval_model(f"open_clip:{MODEL}:{weights}").encoder
    times = {"texts": 0.0, "images": 0.0}

    def timed(encode: Callable) -> Callable:
        def call(texts: list[str]) -> torch.Tensor:
            start = time.process_time()
            embeds = encode(texts)
            times["texts"] += time.process_time() - start
            return embeds

        return call

    encoder.encode_text = timed(encoder.encode_text)
    start = time.process_time()
    task = f"zeroshot:{folder}"
    result = evaluate(encoder, [task], EvalConfig(reading=DataConfig(prompts=("imagenet",))))[task]
    times["images"] = time.process_time() - start - times["texts"]
    return result["metrics"]["acc1"]["value"], times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as temporary:
        folder, weights = Path(temporary) / "images", str(Path(temporary) / "weights.safetensors")
        write_images(folder, args.images, args.classes)
        torch.manual_seed(0)
        model = open_clip.create_model(MODEL)
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, weights)
        del model
        (accuracy, times), (their_accuracy, their_times) = ours(folder, weights), theirs(folder, weights)
    print(
        f"{args.images:,} images, {args.classes} classes, 80 templates, {args.threads} thread(s); accuracy {accuracy} | {their_accuracy}"
    )
    for part in ("texts", "images"):
        print(f"  {part}: {their_times[part] / times[part]:.2f}")
    print(f"  RATIO {sum(their_times.values()) / sum(times.values()):.2f} (one run of each; target at least {TARGET})")


if __name__ == "__main__":
    main()
