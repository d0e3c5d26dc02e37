"""Images per second that a model embeds, the minutes for a number of photographs, and kinds of index against exact search.

With a model, its images per second on this machine are measured on some images of --data, read and embedded as `coalign index` does, and
are turned into minutes for --photographs images. Without --data, random photographs of 1024 by 768 pixels are written and read.

Kinds of index: synthetic embeddings around random centers, and queries of which half are shifted off the images, as texts are. For faiss'
inverted lists (`ivf`, which coalign uses above 200,000 images) and its graph (`hnsw`), each at several settings, RATIO is the time of exact
search over theirs; the recall@10 stands beside it, and the time to build over the one of the inverted lists. CPU time of one thread.

Run: python benchmarks/index.py [MODEL] [--data FOLDER] [--photographs 5000] [--images 256] [--vectors 50000] [--dim 512]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from lines import line
from PIL import Image

from coalign.cores import num_cores
from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.devices import best_device
from coalign.formatting import duration
from coalign.workflows.collection.nearest import RECALL_AT, inverted_lists, recall_of
from coalign.workflows.collection.query import one_vector
from coalign.workflows.evaluate.eval_model import open_eval_model

QUERIES, REPEATS, BATCH = 200, 3, 64
LATENT = 24  # directions in which the synthetic embeddings vary


def images_per_second(model: str, data: str, count: int, device: str, workers: int) -> float:
    """Reads and embeds images in batches; the first batch is a warm-up."""
    encoder = one_vector(open_eval_model(model, device=device).encoder)
    source = open_source(data)
    indices = np.arange(len(source))[: count + BATCH]
    batches = image_batches(source, indices, encoder.image_size, BATCH, workers, encoder.preprocess)
    done, start = 0, 0.0
    for number, (good, pixels, bad) in enumerate(batches):
        encoder.encode_image(pixels).cpu()
        done += (len(good) + len(bad)) * (number > 0)
        start = start or time.perf_counter()
    if not done:
        raise SystemExit(f"{data} has {len(source)} images; more than {BATCH} are needed.")
    return done / (time.perf_counter() - start)


def write_photographs(folder: Path, count: int) -> str:
    rng = np.random.default_rng(0)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
        coarse.resize((1024, 768), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
    return str(folder)


def synthetic(count: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns normalized vectors, and queries: images, and every other one shifted in one direction.

    Vectors are around random centers, in a subspace of LATENT dimensions with little noise beside it, since embeddings of images vary in
    far fewer directions than they have numbers.
    """
    rng = np.random.default_rng(0)
    centers = rng.standard_normal((2000, LATENT), np.float32)
    basis = rng.standard_normal((LATENT, dim), np.float32) / dim**0.5

    def draw(number: int) -> np.ndarray:
        latent = centers[rng.integers(len(centers), size=number)] + rng.standard_normal((number, LATENT), np.float32)
        return latent @ basis + 0.2 * rng.standard_normal((number, dim), np.float32) / dim**0.5

    vectors, queries = draw(count), draw(QUERIES)
    queries[::2] += 3 * rng.standard_normal(dim, np.float32) / dim**0.5
    return tuple(each / np.linalg.norm(each, axis=1, keepdims=True) for each in (vectors, queries))


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    start = time.process_time()
    result = work()
    return result, time.process_time() - start


def one_by_one(index: Any, queries: np.ndarray) -> np.ndarray:
    return np.concatenate([index.search(query[None], RECALL_AT)[1] for query in queries])


def compare_kinds(count: int, dim: int) -> None:
    faiss.omp_set_num_threads(1)
    vectors, queries = synthetic(count, dim)
    exact = faiss.IndexFlatIP(dim)
    exact.add(vectors)
    lists, build_seconds = timed(lambda: inverted_lists(vectors))
    graph = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
    _, graph_seconds = timed(lambda: graph.add(vectors))
    settings = [(f"ivf, {n} of {lists.nlist} lists", lists, n) for n in (4, 16, 64, 256) if n <= lists.nlist]
    settings += [(f"hnsw, efSearch {n}", graph, n) for n in (16, 64, 256)]
    expected = one_by_one(exact, queries)
    for name, index, setting in settings:
        if index is lists:
            index.nprobe = setting
        else:
            index.hnsw.efSearch = setting
        ratios = []
        for _ in range(REPEATS):
            _, exact_seconds = timed(lambda: one_by_one(exact, queries))
            found, seconds = timed(lambda index=index: one_by_one(index, queries))
            ratios.append(exact_seconds / seconds)
        cost = 1.0 if index is lists else graph_seconds / build_seconds
        line(name, ratios, more=f"recall@10 {recall_of(found, expected):.3f}; time to build over ivf's {cost:.2g}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="as for `coalign index`; without, only kinds of index are compared")
    parser.add_argument("--data", help="images to read")
    parser.add_argument("--photographs", type=int, default=5000)
    parser.add_argument("--images", type=int, default=256, help="images to measure on")
    parser.add_argument("--vectors", type=int, default=50_000, help="0: do not compare kinds of index")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device")
    parser.add_argument("--workers", type=int, default=min(8, num_cores()))
    args = parser.parse_args()
    if args.model is not None:
        device = best_device(args.device)
        with tempfile.TemporaryDirectory() as folder:
            data = args.data or write_photographs(Path(folder), args.images + BATCH)
            speed = images_per_second(args.model, data, args.images, device, args.workers)
        needed = duration(args.photographs / speed)
        print(f"{args.model} on {device}: {speed:.1f} images per second; {args.photographs:,} photographs: {needed}")
    if args.vectors:
        print(f"{args.vectors:,} synthetic embeddings of {args.dim} numbers, exact search over each kind:")
        compare_kinds(args.vectors, args.dim)


if __name__ == "__main__":
    main()
