"""What `train --dry-run` prints: everything that would happen, and the first batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from coalign.config import TrainConfig, flatten, to_json
from coalign.data.loader import PairLoader
from coalign.method import Method
from coalign.types import Batch

SHOWN = 8  # pairs of the first batch


def describe(
    console: Console,
    data: str,
    out: Path,
    config: TrainConfig,
    method: Method,
    loader: PairLoader,
    pairs: Any,
    total_steps: int,
) -> None:
    """Prints the resolved configuration, parameters, steps and the first batch; writes the batch's pictures to out/first_batch.png."""
    table = Table("setting", "value", title="Configuration", title_justify="left")
    for name, value in flatten(to_json(config)).items():
        table.add_row(name, str(value))
    console.print(table)
    counts = {role: sum(p.numel() for p in parameters) for role, parameters in method.parameter_groups().items()}
    table = Table("part", "trained parameters", title="Model", title_justify="left")
    for role, count in {**counts, "total": sum(counts.values())}.items():
        table.add_row(role, f"{count:,}")
    console.print(table)
    console.print(
        f"{data}: {len(pairs.train):,} training pairs, {len(pairs.val):,} held out. {loader.steps_per_epoch:,} steps an epoch of "
        f"{config.batch_size} pairs, {total_steps:,} steps in all."
    )
    loaded = next(loader.batches(0, 1))
    batch = loaded.batch
    for name, view in batch.images.items():
        console.print(f"image view {name}: uint8 {list(view.pixels.shape)}")
    for name, text in batch.texts.items():
        console.print(
            f"text view {name}: {list(text.ids.shape)} token ids, {text.lengths.float().mean():.1f} tokens a caption"
        )
        for row in range(min(SHOWN, len(batch))):
            console.print(f"  {loader.tokenizer.decode(text.ids[row, : text.lengths[row]].tolist())}", markup=False)
    if loaded.bad:
        console.print(
            f"{len(loaded.bad)} samples of this batch cannot be used: {', '.join(sorted({e.reason for e in loaded.bad}))}."
        )
    out.mkdir(parents=True, exist_ok=True)
    picture = out / "first_batch.png"
    Image.fromarray(_contact_sheet(batch)).save(picture)
    console.print(f"Its pictures, a row a view: {picture}", soft_wrap=True)


def _contact_sheet(batch: Batch) -> np.ndarray:
    rows = [
        view.pixels[:SHOWN].permute(0, 2, 3, 1).numpy() for view in batch.images.values()
    ]  # [pair, height, width, 3] each
    return np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
