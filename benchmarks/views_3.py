"""Image views per second on one core: decoding, one weak and two strong 224-pixel views of 500 × 375 JPEGs.

Ours (`make_views`, with recorded parameters and uint8 output) is compared with SLIP's pipeline as described in its paper and code, written
with torchvision and Pillow, with normalized float output. Both run in one process and one thread, on the same files, alternating. CPU time
is measured, so that other programs hardly affect it. Two more rows: the speed-up by `--image-cache` from the second epoch on, and by
`--device-views` on top of it in a loader process (the GPU's work is not counted). The photos are synthetic: smooth noise at several scales,
edges, and grain.

Run: python benchmarks/views_3.py [--images 48] [--repeats 9]
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from lines import line
from PIL import Image, ImageDraw, ImageFilter
from torchvision import transforms

from coalign.data.images.cache import ImageCache
from coalign.data.images.decode import open_image
from coalign.data.images.views import AnyImage, make_views
from coalign.randomness import Draws
from coalign.types import STRONG, WEAK

SIZE = 224
count = 0  # of calls, which make different views
POLICIES = {"base": WEAK, "first": STRONG, "second": STRONG}


def photograph(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Returns a JPEG of quality 90 with smooth regions, texture and edges, like a photo."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3), np.float32)
    for cell in (3, 8, 25, 80, 250):
        coarse = rng.normal(0, 1.2 * cell**0.6, (height // cell + 2, width // cell + 2, 3)).astype(np.float32)
        channels = [Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        pixels += np.stack([np.asarray(channel) for channel in channels], axis=-1)
    pixels += rng.normal(0, 3, (height, width, 1))
    image = Image.fromarray(np.clip(128 + pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        x, y, w, h = (int(rng.integers(0, limit)) for limit in (width, height, width // 3, height // 3))
        color = tuple(int(c) for c in rng.integers(0, 256, 3))
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)((x, y, x + w + 4, y + h + 4), fill=color)
    out = BytesIO()
    image.filter(ImageFilter.SMOOTH).save(out, "JPEG", quality=90)
    return out.getvalue()


class PillowBlur:
    """SimCLR's blur, as in SLIP."""

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(radius=random.uniform(0.1, 2.0)))


def slip_pipeline() -> Callable[[list[bytes]], object]:
    normalize = transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    base = transforms.Compose([transforms.RandomResizedCrop(SIZE, scale=(0.5, 1.0)), transforms.ToTensor(), normalize])
    augment = transforms.Compose(
        [
            transforms.RandomResizedCrop(SIZE, scale=(0.08, 1.0)),
            transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            transforms.RandomGrayscale(p=0.2),
            transforms.RandomApply([PillowBlur()], p=0.5),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            normalize,
        ]
    )

    def views(data: bytes) -> object:
        image = Image.open(BytesIO(data)).convert("RGB")
        return base(image), augment(image), augment(image)

    return lambda files: [views(data) for data in files]


def our_pipeline() -> Callable[[list[bytes]], object]:
    return lambda files: our_views([open_image(data) for data in files], finish=True)


def our_views(images: Sequence[AnyImage], finish: bool) -> object:
    global count
    count += 1
    return make_views(images, POLICIES, Draws(0, count, np.arange(len(images))).uniform, SIZE, finish=finish)


def cached_pipeline(folder: Path, files: list[bytes], finish: bool) -> Callable[[list[bytes]], object]:
    """Ours, with all images in the cache."""
    cache = ImageCache(len(files), 1e10, folder / "images")

    def views(files: list[bytes]) -> object:
        images = [cache.open(position, lambda data=data: data) for position, data in enumerate(files)]
        return our_views(images, finish)

    return views


def seconds(pipeline: Callable[[list[bytes]], object], files: list[bytes]) -> float:
    start = time.thread_time()
    pipeline(files)
    return (time.thread_time() - start) / len(files)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    files = [photograph(seed) for seed in range(options.images)]
    folder = tempfile.TemporaryDirectory()
    pipelines = {
        "SLIP's": slip_pipeline(),
        "ours": our_pipeline(),
        "ours, cached": cached_pipeline(Path(folder.name), files, finish=True),
        "ours, cached, without color and blur": cached_pipeline(Path(folder.name), files, finish=False),
        "decoding": lambda files: [open_image(data).decode() for data in files],
    }
    times: dict[str, list[float]] = {name: [] for name in pipelines}
    for pipeline in pipelines.values():
        seconds(pipeline, files)  # warm-up
    for _ in range(options.repeats):
        for name, pipeline in pipelines.items():
            times[name].append(seconds(pipeline, files))
    size = sum(map(len, files)) / len(files) / 1000
    print(f"{len(files)} JPEGs of 500 × 375, {size:.0f} kB on average; one thread, medians of {options.repeats}")
    for name, values in times.items():
        per_image = statistics.median(values)
        each = f", {len(POLICIES) / per_image:6.0f} views/s" if name != "decoding" else ""
        print(f"{name:37s} {1000 * per_image:6.2f} ms/image, {1 / per_image:6.0f} images/s{each}")
    for base, name, target in (
        ("SLIP's", "ours", 4),
        ("ours", "ours, cached", None),
        ("ours, cached", "ours, cached, without color and blur", None),
    ):
        ratios = [before / after for before, after in zip(times[base], times[name])]
        line(f"three views, time of {base} over {name}", ratios, at_least=target)


if __name__ == "__main__":
    main()
