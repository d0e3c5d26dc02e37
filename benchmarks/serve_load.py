"""The search server under load: 20 clients, 100,000 synthetic embeddings of dimension 512; p95 latency and number of errors.

A client searches by a text, then loads the first eight thumbnails of what was found, over one connection. The clients first do so once per
second each, as people at a page might, then without a pause. The server runs in its own process, as `coalign serve` does. Texts are
embedded by a stand-in that takes no time, so latency is of the server, the search and the pictures; a model adds its own, one query
after another. Pictures are 640 × 480 JPEG files. Exits with an error if a request fails or any response is wrong.

Run: python benchmarks/serve_load.py [--clients 20] [--images 100000] [--rounds 20]
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path

import httpx
import numpy as np

DIM, THUMBNAILS, PICTURES = 512, 8, 32
WORDS = [
    "a",
    "photo",
    "of",
    "red",
    "green",
    "blue",
    "small",
    "large",
    "old",
    "new",
    "cat",
    "dog",
    "tree",
    "house",
    "boat",
]


def embed(text: str) -> np.ndarray:
    """A random vector that depends on the text alone."""
    vector = np.random.default_rng(zlib.crc32(text.encode())).standard_normal(DIM).astype(np.float32)
    return vector / np.linalg.norm(vector)


def vectors(images: int) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((images, DIM), dtype=np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    return rows


def serve_synthetic(images: int) -> None:
    """Serves synthetic images until it is terminated."""
    import torch
    from PIL import Image

    from coalign.serve.server import serve
    from coalign.types import DualEncoder
    from coalign.workflows.collection.nearest import ExactVectors
    from coalign.workflows.collection.query import Collection
    from coalign.workflows.collection.records import Records
    from coalign.workflows.evaluate.eval_model import EvalModel

    rng, files = np.random.default_rng(1), []
    for _ in range(PICTURES):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3)).astype(np.uint8)).resize((640, 480))
        file = io.BytesIO()
        coarse.save(file, "JPEG")
        files.append(file.getvalue())

    class Synthetic(Records):
        def __len__(self) -> int:
            return images

        def key(self, row: int) -> str:
            return f"{row}.jpg"

        def captions(self, row: int) -> tuple[str, ...]:
            return (f"image {row}",)

        def tags(self, row: int) -> tuple[str, ...]:
            return ()

        def image(self, row: int) -> bytes:
            return files[row % PICTURES]

    def encode_text(texts):
        return torch.tensor(np.stack([embed(text) for text in texts]))

    encoder = DualEncoder(lambda pixels: torch.zeros(len(pixels), DIM), encode_text, image_size=224, name="stand-in")
    collection = Collection("synthetic", EvalModel(encoder), ExactVectors(vectors(images)), Synthetic())
    serve(lambda: [collection], port=0)


class Client(threading.Thread):
    """Searches and loads thumbnails, `rounds` times. `nearest` are the right first rows by text."""

    def __init__(self, url: str, seed: int, rounds: int, pause: float, nearest: dict[str, int]) -> None:
        super().__init__()
        self.url, self.rounds, self.pause, self.nearest = url, rounds, pause, nearest
        self.rng = np.random.default_rng(seed)
        self.searches: list[float] = []
        self.pictures: list[float] = []
        self.errors: list[str] = []

    def run(self) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            time.sleep(self.rng.random() * self.pause)
            for _ in range(self.rounds):
                start = time.perf_counter()
                try:
                    self._round(client)
                except (httpx.HTTPError, AssertionError) as error:
                    self.errors.append(f"{type(error).__name__}: {error}")
                time.sleep(max(0.0, self.pause - (time.perf_counter() - start)))

    def _round(self, client: httpx.Client) -> None:
        text = str(self.rng.choice(list(self.nearest)))
        start = time.perf_counter()
        response = client.post("/api/search", json={"text": text})
        self.searches.append(time.perf_counter() - start)
        assert response.status_code == 200, response.text
        rows = [hit["row"] for hit in response.json()["hits"]]
        assert (len(rows), rows[0]) == (60, self.nearest[text]), f"wrong images for {text!r}"
        for row in rows[:THUMBNAILS]:
            start = time.perf_counter()
            response = client.get(f"/api/image/0/{row}")
            self.pictures.append(time.perf_counter() - start)
            assert response.status_code == 200, response.text
            assert response.content[:2] == b"\xff\xd8"


def load(url: str, clients: int, rounds: int, pause: float, nearest: dict[str, int]) -> list[str]:
    """Runs the clients, prints the latencies and returns the errors."""
    threads = [Client(url, seed, rounds, pause, nearest) for seed in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    print("one search per second and client:" if pause else "without pauses:")
    for name in ("searches", "pictures"):
        times = np.array([value for thread in threads for value in getattr(thread, name)])
        median, high = np.percentile(times, [50, 95]) * 1000
        rate = len(times) / seconds
        print(
            f"  {name}: {len(times):,}, {rate:.0f} per second; median {median:.0f} ms, p95 {high:.0f} ms, max {times.max() * 1000:.0f} ms"
        )
    errors = [error for thread in threads for error in thread.errors]
    print(f"  errors: {len(errors)}", flush=True)
    return errors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=20, help="searches of each client, with and without pauses")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve_synthetic(options.images)
        return
    texts = [" ".join(np.random.default_rng(seed).choice(WORDS, 4)) for seed in range(100)]
    queries = np.stack([embed(text) for text in texts])
    nearest = dict(zip(texts, (vectors(options.images) @ queries.T).argmax(0).tolist()))
    command = [sys.executable, str(Path(__file__)), "--serve", "--images", str(options.images)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as server:
        try:
            line = server.stdout.readline() if server.stdout else ""
            if not (address := re.match(r"http://\S+", line)):
                raise SystemExit("The server did not start.")
            print(
                f"{options.clients} clients, {options.images:,} embeddings of dimension {DIM}; {os.cpu_count()} cores",
                flush=True,
            )
            errors = [
                error
                for pause in (1.0, 0.0)
                for error in load(address.group().rstrip("/"), options.clients, options.rounds, pause, nearest)
            ]
        finally:
            server.terminate()
    for error in errors[:10]:
        print(error, file=sys.stderr)
    sys.exit(bool(errors))


if __name__ == "__main__":
    main()
