"""What the final figures of a run are made of, held-out item by held-out item, so that runs can be compared on the same items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile

import numpy as np

from coalign.data.randomness import stable_hash
from coalign.errors import BadSample, UserError
from coalign.evaluation.embed import Evaluation
from coalign.run.model import HELD_OUT, write_file
from coalign.run.pairs import Data
from coalign.types import Source


@dataclass(frozen=True)
class Outcome:
    """One figure of one run, item by item."""

    # its figure is the mean, the mean of the classes' means, the median, or, of a distance, the one value, which is of no item
    kind: Literal["rate", "class rate", "rank", "distance"]
    values: np.ndarray  # float64 [item]
    clusters: np.ndarray | None  # int64 [item]: what the bootstrap draws together; of a class rate, the classes


def write_outcomes(folder: Path, pairs: Data, evaluations: Mapping[str, Evaluation]) -> None:
    """Writes folder/held_out.npz: of each evaluation, the items' hashes, clusters and outcomes."""
    arrays: dict[str, np.ndarray] = {}
    for task, evaluation in evaluations.items():
        arrays |= {f"{task}.{name}": values for name, values in evaluation.result.outcomes().items()}
        classes: Sequence[str] = () if task.startswith("retrieval") else evaluation.texts
        source = pairs.source if task.startswith("retrieval_") else pairs.val_source
        hashes = [_item(source, index, classes) for index in evaluation.images.indices]
        arrays[f"{task}.items"] = np.array(hashes, dtype=np.int64)

    def write(path: Path) -> None:
        with open(path, "wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_file(folder / HELD_OUT, write)


def read_outcomes(folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Outcome]]:
    """Task -> the hashes of its items, and figure -> outcome, such as "retrieval.image_to_text.r1". UserError without the file."""
    path = folder / HELD_OUT
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no {HELD_OUT}, which finished runs are compared by; let `coalign train … --resume auto` write it."
        ) from None
    except (OSError, ValueError, BadZipFile) as error:
        raise UserError(
            f"{path} is damaged; delete it and let `coalign train … --resume auto` write it again."
        ) from error
    items = {name.removesuffix(".items"): values for name, values in arrays.items() if name.endswith(".items")}
    outcomes = {
        name: _outcome(name, values, arrays)
        for name, values in arrays.items()
        if not name.endswith((".items", ".clusters", ".classes"))
    }
    return items, outcomes


def _outcome(name: str, values: np.ndarray, arrays: Mapping[str, np.ndarray]) -> Outcome:
    where, _, figure = name.rpartition(".")
    if figure in ("mean_per_class_recall", "mean_per_kind"):
        return Outcome("class rate", values, arrays[f"{where}.classes"])
    if figure == "modality_gap":
        return Outcome("distance", values, None)
    return Outcome("rank" if figure == "median_rank" else "rate", values, arrays.get(f"{where}.clusters"))


def _item(source: Source, index: int, classes: Sequence[str]) -> int:
    """Of the sample's name and captions: the same wherever the data lie. Among other classes it is another item."""
    try:
        record = source.record(index)
    except BadSample as bad:  # its picture can be read, and is a candidate without a caption
        return stable_hash(index, bad.reason)
    return stable_hash(record.key, *record.captions, "among", *classes)
