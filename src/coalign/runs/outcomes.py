"""Per-item outcomes of a run's final metrics (held_out.npz), for paired comparisons of runs on the same held-out items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np

from coalign.data.sources.base import Source
from coalign.errors import BadSample, UserError
from coalign.evaluation.embed import Evaluation
from coalign.files import write_atomically
from coalign.randomness import stable_hash
from coalign.runs.folder import HELD_OUT


@dataclass(frozen=True)
class Outcome:
    """One metric of one run, item by item.

    The metric is the mean of `values` (rate), the mean of the per-class means (class rate), the median (rank), or the single value
    (distance, which has no items).
    """

    kind: Literal["rate", "class rate", "rank", "distance"]
    values: np.ndarray  # float64 [item]
    clusters: np.ndarray | None  # int64 [item]: clusters of the bootstrap; for a class rate, the classes


def write_outcomes(folder: Path, evaluations: Mapping[str, Evaluation], sources: Mapping[str, Source]) -> None:
    """Writes the item hashes, clusters and outcomes of each evaluation to held_out.npz. `sources`: task -> source of its items."""
    arrays: dict[str, np.ndarray] = {}
    for task, evaluation in evaluations.items():
        arrays |= {f"{task}.{name}": values for name, values in evaluation.result.outcomes().items()}
        classes: Sequence[str] = () if task.startswith("retrieval") else evaluation.texts
        hashes = [_item_hash(sources[task], index, classes) for index in evaluation.images.indices]
        arrays[f"{task}.items"] = np.array(hashes, dtype=np.int64)

    def write(temporary: Path) -> None:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]

    write_atomically(folder / HELD_OUT, write)


def read_outcomes(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Outcome]]:
    """Reads held_out.npz: task -> hashes of its items, and metric (such as "retrieval.image_to_text.r1") -> outcome.

    Raises UserError if the file is missing or damaged.
    """
    path = folder / HELD_OUT
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {HELD_OUT}, which comparisons need; run `coalign train … --resume auto` to write it."
        ) from None
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{path} is damaged; delete it, and run `coalign train … --resume auto` to write it again."
        ) from error
    items = {name.removesuffix(".items"): values for name, values in arrays.items() if name.endswith(".items")}
    outcomes = {
        name: _outcome(name, values, arrays)
        for name, values in arrays.items()
        if not name.endswith((".items", ".clusters", ".classes"))
    }
    return items, outcomes


def _outcome(name: str, values: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Outcome:
    prefix, _, metric = name.rpartition(".")
    if metric in ("mean_per_class_recall", "mean_per_kind"):
        return Outcome("class rate", values, arrays[f"{prefix}.classes"])
    if metric == "modality_gap":
        return Outcome("distance", values, None)
    return Outcome("rank" if metric == "median_rank" else "rate", values, arrays.get(f"{prefix}.clusters"))


def _item_hash(source: Source, index: int, classes: Sequence[str]) -> int:
    """Hashes a sample's key and captions, which do not depend on where the data is stored, and the candidate classes."""
    try:
        record = source.record(index)
    except BadSample as bad:  # the image is readable, and is a retrieval candidate
        return stable_hash(index, bad.reason)
    return stable_hash(record.key, *record.captions, "among", *classes)
