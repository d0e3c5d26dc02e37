"""The registry of evaluation tasks: the only list of them. Imports no torch."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Literal

from coalign.errors import UserError

if TYPE_CHECKING:
    from coalign.workflows.evaluate.context import EvalContext, TaskResult

# what the data or the model of a task must have; see `needs.py`
Need = Literal[
    "classes",
    "foils",
    "image pairs",
    "object masks",
    "boxes",
    "masks",
    "resnet",
    "features",
    "trainable encoders",
    "joint embeds",
    "maps",
]


@dataclass(frozen=True)
class Task:
    """An evaluation task.

    run: module and name of the function that runs it. needs: what its data and its model must have. learns: it trains on samples other
    than those it is evaluated on. allows_bf16: its model may compute in bfloat16.
    """

    name: str
    help: str
    run: str
    needs: tuple[Need, ...] = ()
    learns: bool = False
    allows_bf16: bool = True

    def load(self) -> Callable[[EvalContext], TaskResult]:
        module, name = self.run.split(":")
        return getattr(import_module(f"coalign.workflows.evaluate.{module}"), name)


def _probe(name: str, help: str, function: str, *needs: Need) -> Task:
    return Task(name, help, f"probe_tasks:{function}", (*needs, "features"), learns=True)


_TASKS = (
    Task("retrieval", "image-text retrieval", "pair_tasks:retrieval"),
    Task("retrieval-1k", "image-text retrieval among 1,000 images at a time", "pair_tasks:retrieval_in_folds"),
    Task("zeroshot", "zero-shot classification", "pair_tasks:zero_shot", ("classes",)),
    _probe("probe", "linear probe: logistic regression", "linear", "classes"),
    _probe("probe-mct", "linear probe by MCT's SGD", "mct_probe", "classes"),
    _probe("probe-slip", "linear probe by SLIP's SGD on 90 random crops per image", "slip_probe", "classes"),
    _probe("fewshot", "linear probes on 1 to 16 images per class", "few_shot_probes", "classes"),
    _probe("knn", "k-NN classification with 20 neighbors", "nearest_neighbors", "classes"),
    _probe("tagging", "MCT's tagging, on data with tags", "tags"),
    _probe("vse", "MCT's retrieval with a GRU over words", "vse_retrieval"),
    Task(
        "finetune", "fine-tuning for classification", "finetune_tasks:fine_tune_classifier",
        ("classes", "trainable encoders"), learns=True, allows_bf16=False,
    ),
    Task(
        "finetune-retrieval", "fine-tuning of both encoders for retrieval", "finetune_tasks:fine_tune_encoders",
        ("trainable encoders",), learns=True, allows_bf16=False,
    ),
    Task(
        "detection", "Faster R-CNN with an FPN on a ResNet image encoder: scenes, coco:instances.json:images or voc:VOCdevkit",
        "detection_tasks:fpn", ("boxes", "trainable encoders", "resnet"), learns=True, allows_bf16=False,
    ),
    Task(
        "detection-c4", "Faster R-CNN with a C4 backbone, on the same data", "detection_tasks:c4",
        ("boxes", "trainable encoders", "resnet"), learns=True, allows_bf16=False,
    ),
    Task(
        "segmentation", "Mask R-CNN with an FPN, on the same data with masks", "detection_tasks:fpn_with_masks",
        ("boxes", "masks", "trainable encoders", "resnet"), learns=True, allows_bf16=False,
    ),
    Task("foils", "true or false captions, by kind of fact: scenes or sugarcrepe:FOLDER", "pair_tasks:foils", ("foils",)),
    Task("pairs", "Winoground: winoground:FOLDER", "pair_tasks:image_pairs", ("image pairs",)),
    Task(
        "localization", "heat maps against object masks, on scenes", "scene_tasks:localization",
        ("maps", "object masks"), allows_bf16=False,
    ),
    Task(
        "bootstrap", "OneR only: zero-shot guided by its own top predictions", "pair_tasks:bootstrap",
        ("classes", "joint embeds"), allows_bf16=False,
    ),
    Task(
        "guided", "OneR only: the size of a named object, on scenes", "scene_tasks:guided",
        ("joint embeds", "object masks"), allows_bf16=False,
    ),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}
SUITES = {"suite11": "zeroshot", "suite11-probe": "probe"}  # all of DeCLIP's eleven datasets by one task


def parse_task(text: str) -> tuple[Task, str]:
    """Returns the task and the data of `TASK:DATA`. Raises UserError for anything else."""
    name, _, data = text.partition(":")
    if name in TASKS and data:
        return TASKS[name], data
    if name in TASKS:
        raise UserError(f"The task {text!r} has no data; use TASK:DATA, such as {name}:my-images.")
    near = difflib.get_close_matches(name, TASKS, 2)
    hint = (
        f"did you mean {' or '.join(near)}?"
        if near
        else f"use TASK:DATA, such as retrieval:my-images, or {' or '.join(SUITES)}."
    )
    known = "" if near else f" The tasks are {', '.join(TASKS)}."
    raise UserError(f"{text!r} is not a task; {hint}{known}")


def help_table() -> str:
    """Returns a line per task, for help."""
    width = max(map(len, TASKS)) + 2
    return "\n".join(f"    {task.name:{width}}{task.help}" for task in TASKS.values())
