"""Memory and time before the first step for millions of samples in tar shards that are already indexed.

The shards are empty files of the right size with real index files beside them, so that millions of samples fit on a small disk. Measured:
the growth of the process's memory, its peak, and the time to open the dataset, to split it (the first time and again), and to look up
a batch in the order of an epoch. There is no peer: the readers of webdataset and img2dataset keep no index and shuffle within a buffer.

Run: python benchmarks/data_at_scale.py [--millions 5] [--shards 500]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from lines import line
from memory import clear_peak, peak

from coalign.data.loading.order import order
from coalign.data.sources.tar import shard_index
from coalign.data.sources.tar.shards import open_shards
from coalign.data.splits import assign_splits

MB_PER_MILLION = 16.0  # the target


def write_shards(folder: Path, samples: int, shards: int) -> None:
    rng = np.random.default_rng(0)
    for number in range(shards):
        path, count = folder / f"{number:05d}.tar", samples // shards
        with open(path, "wb") as file:
            file.truncate(count * 60_000)
        starts = np.full((count, 3), shard_index.MISSING, np.uint32)
        starts[:, :2] = np.arange(2 * count, dtype=np.uint32).reshape(count, 2) * 50
        keys, images, captions = (rng.integers(0, 2**63, count).astype(np.uint64) for _ in range(3))
        index = shard_index.ShardIndex(starts, [], keys, images, captions, np.ones(count, np.uint32))
        shard_index._write(Path(f"{path}.coalign-index"), shard_index.shard_stamp(str(path)), index)


def resident() -> float:
    """Returns the resident set in GB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30


def measure(folder: str) -> dict[str, float]:
    """Runs in its own process. Returns the seconds of each part, and the GB of memory."""
    order(1000, 0, 0)[np.arange(10)]
    before = resident()
    clear_peak()
    results = {}

    def timed(name: str, work):  # type: ignore[no-untyped-def]
        start = time.perf_counter()
        result = work()
        results[name] = time.perf_counter() - start
        return result

    source = timed("open", lambda: open_shards(folder))
    splits = timed("split", lambda: assign_splits(source, 0.01)[0])
    timed(
        "look up 4,096 samples of an epoch",
        lambda: splits["train"][order(len(splits["train"]), 0, 3)[np.arange(10_000, 14_096)]],
    )
    return {**results, "resident": resident() - before, "peak": peak() - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--millions", type=int, default=5)
    parser.add_argument("--shards", type=int, default=500)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        return print(json.dumps(measure(args.measure)))
    samples = args.millions * 10**6 // args.shards * args.shards
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "shards"
        folder.mkdir()
        write_shards(folder, samples, args.shards)
        environment = {**os.environ, "XDG_CACHE_HOME": f"{temporary}/cache"}
        command = [sys.executable, __file__, "--measure", str(folder)]
        first, again = (
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True, env=environment).stdout)
            for _ in range(2)
        )
    print(f"{samples / 1e6:g} million samples in {args.shards} shards")
    for label, results in (("first opening, with the split", first), ("second opening", again)):
        memory = ", peak ".join(f"{results[name] * 1024 / samples * 1e6:.1f}" for name in ("resident", "peak"))
        seconds = ", ".join(
            f"{name} {value:.3g} s" for name, value in results.items() if name not in ("resident", "peak")
        )
        print(f"  {label}: MB per million samples {memory}; {seconds}")
    line(
        "MB per million samples, second opening",
        [again["resident"] * 1024 / samples * 1e6],
        at_most=MB_PER_MILLION,
    )


if __name__ == "__main__":
    main()
