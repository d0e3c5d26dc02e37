"""Random small datasets of every kind, with random damage. What can be used of each is known by construction."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from helpers.random_folders import names_as_captions, shards, side_files, truncated_shard
from helpers.random_images import Truth
from helpers.random_tables import coco, folder_tables, json_table, parquet, saved_dataset, text_table

from coalign.config import DETECT


def mixture(rng: random.Random, root: Path) -> Truth:
    """Two or three other datasets, with weights."""
    truth = Truth("")
    specs = []
    for number in range(1, rng.randint(2, 3) + 1):
        while True:
            build = rng.choice([names_as_captions, side_files, text_table, json_table, folder_tables, shards, coco])
            part = build(rng, root / f"{number}-{rng.randrange(10**6)}")
            if part.captions and not part.refused and part.reading == DETECT:
                break
        specs.append(rng.choice(["", "2*", "0.5 * "]) + part.spec)
        truth.total += part.total
        truth.captions |= {f"{number}:{key}": captions for key, captions in part.captions.items()}
    truth.spec = " + ".join(specs)
    return truth


BUILDERS: dict[str, tuple[Callable[[random.Random, Path], Truth], int]] = {  # with the number of datasets
    "names as captions": (names_as_captions, 60),
    "side files": (side_files, 80),
    "text table": (text_table, 120),
    "json table": (json_table, 60),
    "folder tables": (folder_tables, 50),
    "coco": (coco, 30),
    "shards": (shards, 50),
    "truncated shard": (truncated_shard, 15),
    "parquet": (parquet, 16),
    "saved dataset": (saved_dataset, 8),
    "mixture": (mixture, 15),
}


def make(kind: str, seed: int, root: Path) -> Truth:
    """Makes a dataset in a folder below `root`, the same for the same kind and seed."""
    (root / "data").mkdir(parents=True)
    return BUILDERS[kind][0](random.Random(f"{kind} {seed}"), root / "data")
