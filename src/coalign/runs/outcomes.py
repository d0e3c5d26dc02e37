"""Per-item outcomes of a run's final metrics (held_out.npz), for paired comparisons of runs on the same held-out items."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from zipfile import BadZipFile

import numpy as np

from coalign.data.sources.base import Source
from coalign.errors import BadSample, UserError
from coalign.files import write_atomically
from coalign.metric import Metric, Outcome
from coalign.randomness import stable_hash
from coalign.runs.folder import HELD_OUT


def item_hashes(source: Source, indices: Iterable[int], texts: Sequence[str]) -> np.ndarray:
    """Returns a hash of each sample's key and captions, which do not depend on where the data is stored, and of all candidate texts."""
    candidates = stable_hash(*texts)

    def item(index: int) -> int:
        try:
            record = source.record(index)
        except BadSample as bad:  # the image is readable, and is a retrieval candidate
            return stable_hash(index, bad.reason)
        return stable_hash(record.key, *record.captions, "among", candidates)

    return np.array([item(index) for index in indices], dtype=np.int64)


def write_outcomes(
    folder: Path, metrics: Mapping[str, Sequence[Metric]], items: Mapping[str, np.ndarray], name: str = HELD_OUT
) -> None:
    """Writes the outcomes of each task's metrics, and the hashes of its items, to held_out.npz or another file."""
    arrays: dict[str, np.ndarray] = {f"{task}/items": hashes for task, hashes in items.items()}
    for task, task_metrics in metrics.items():
        for metric in task_metrics:
            if metric.outcome is not None:
                key = f"{task}.{metric.name}"
                arrays[f"{key}/values"] = metric.outcome.values
                arrays[f"{key}/statistic"] = np.array(metric.outcome.statistic)
                if metric.outcome.groups is not None:
                    arrays[f"{key}/groups"] = metric.outcome.groups

    def write(temporary: Path) -> None:
        np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]

    write_atomically(folder / name, write)


def read_outcomes(folder: Path, name: str = HELD_OUT) -> tuple[dict[str, np.ndarray], dict[str, Outcome]]:
    """Reads held_out.npz: task -> hashes of its items, and metric (such as "retrieval.image_to_text.r1") -> outcome.

    Raises UserError if the file is missing or damaged.
    """
    path = folder / name
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {name}, which comparisons need; run `coalign train … --resume auto` to write it."
        ) from None
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{path} is damaged; delete it, and run `coalign train … --resume auto` to write it again."
        ) from error
    items: dict[str, np.ndarray] = {}
    outcomes: dict[str, Outcome] = {}
    for key, array in arrays.items():
        whose, _, part = key.rpartition("/")
        if part == "items":
            items[whose] = array
        elif part == "values":
            outcomes[whose] = Outcome(array, arrays.get(f"{whose}/groups"), str(arrays[f"{whose}/statistic"]))  # type: ignore[arg-type]
    return items, outcomes
