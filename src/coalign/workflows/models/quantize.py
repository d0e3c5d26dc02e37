"""Quantizes an exported ONNX folder, and measures what that costs on the run's held-out pairs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from coalign.errors import UserError
from coalign.evaluation.metrics import estimate
from coalign.files import write_json
from coalign.formatting import data_size
from coalign.interop.onnx.load import INFO, from_onnx
from coalign.interop.onnx.quantize import quantize_graph
from coalign.metric import Metric
from coalign.runs.run import Run
from coalign.types import DualEncoder
from coalign.workflows.evaluate.tasks import TASKS
from coalign.workflows.models.held_out import held_out_context, validation_pairs
from coalign.workflows.train.batches import TrainingData

RECALLS = ("image_to_text.r1", "image_to_text.r10", "text_to_image.r1", "text_to_image.r10")
_ENCODERS = ("image.onnx", "text.onnx", "joint.onnx")


def quantize_folder(run: Run, folder: Path, kind: str) -> str:
    """Quantizes the encoders of an exported folder, and evaluates retrieval on the run's held-out pairs before and after.

    Stores the sizes in bytes and the recalls in INFO, and prints them. If the recalls cannot be measured, it says why. Returns a sentence
    for the model card. Raises UserError if onnxruntime is not installed.
    """
    files = [folder / name for name in _ENCODERS if (folder / name).exists()]
    before = sum(file.stat().st_size for file in files)
    for file in files:
        quantize_graph(file, kind)
    found: dict[str, Any] = {
        "kind": kind,
        "bytes": {"before": before, "after": sum(file.stat().st_size for file in files)},
        "pairs": 0,
        "retrieval": {},
    }
    problem = ""
    try:
        pairs = validation_pairs(run)
        if pairs is None:
            raise UserError(f"{run.path} held out no pairs.")
        found |= {"pairs": len(pairs.val), "retrieval": _loss(run, from_onnx(folder), pairs)}
    except UserError as error:  # such as data that is on another machine
        problem = str(error)
    write_json(folder / INFO, {**json.loads((folder / INFO).read_text()), "quantization": found})
    _print(found, problem)
    recalls = f"; {INFO} has the recalls before and after" if found["retrieval"] else ""
    return f"The weights were quantized to {kind} after training and after these checks and results{recalls}."


def _print(found: dict[str, Any], problem: str) -> None:
    """Prints the sizes, and the recalls before and after, or why they were not measured."""
    console = Console(highlight=False, soft_wrap=True)
    kind = found["kind"]
    before, after = (data_size(found["bytes"][side]) for side in ("before", "after"))
    console.print(f"The encoders take {after} as {kind}, {before} before.")
    if problem:
        console.print(f"The loss in retrieval was not measured: {problem}", markup=False)
        return
    table = Table(f"{found['pairs']:,} held-out pairs", "run", kind, "percentage points", "95 % interval, paired")
    for values in found["retrieval"].values():
        metrics = [Metric("", "", "rate", values[side]) for side in ("before", "after")]
        change = Metric("", "", "difference", values["difference"], values["low"], values["high"])
        table.add_row(values["title"], *(each.text() for each in (*metrics, change)), change.interval_text())
    console.print(table)


def _loss(run: Run, quantized: DualEncoder, pairs: TrainingData) -> dict[str, Any]:
    """Returns the recalls of the run and of its quantized export, and their paired differences, as fractions."""
    sides = (TASKS["retrieval"].load()(held_out_context(each, run, pairs)) for each in (run.encoder(), quantized))
    before, after = ({metric.name: metric for metric in side.metrics} for side in sides)
    losses = {}
    for name in (name for name in RECALLS if name in before):  # others have the value of chance whatever the model
        one, other = before[name], after[name]
        assert one.outcome is not None
        assert other.outcome is not None
        change = estimate([other.outcome], [one.outcome])
        difference = {"difference": change.value, "low": change.low, "high": change.high}
        losses[name] = {"title": one.title, "before": one.value, "after": other.value, **difference}
    return losses
