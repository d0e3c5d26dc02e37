"""`coalign eval`."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from coalign.cli.parse import Command, first_sentence, parse
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.tasks import help_table


@dataclass(frozen=True, kw_only=True)
class EvalCommand(EvalConfig):
    """Evaluate a model from any library: image-text retrieval, zero-shot classification, probes and more, with 95 % bootstrap intervals.

    A task is TASK:DATA. DATA is anything that `coalign train --data` accepts, or, with --data-root, one of oxford_pets, cifar10, cifar100,
    sun397, food101, flowers102, stanford_cars, caltech101, fgvc_aircraft, dtd and imagenet. The tasks:

    TASKS

    suite11 and suite11-probe run zeroshot and probe on all eleven named datasets.

    Example: coalign eval runs/clip --tasks retrieval:data/openclipart zeroshot:data/openclipart --json out.json
    """

    # A run folder, an exported folder, open_clip:NAME:WEIGHTS (an open_clip pretrained tag or a .safetensors file), or
    # transformers:NAME (a CLIPModel on the hub, or its folder).
    model: Positional[str]
    tasks: tuple[str, ...]
    """One or more tasks TASK:DATA, such as retrieval:my-pairs or zeroshot:my-pairs, or a suite; `coalign eval --help` lists them."""
    json: Path | None = None
    """Write the results to this JSON file."""
    report: Path | None = None
    """Write a report to this HTML file."""


def eval_command(args: list[str]) -> Callable[[], None]:
    description = inspect.cleandoc(EvalCommand.__doc__ or "").replace("TASKS\n", f"{help_table()}\n")
    command = parse(EvalCommand, args, "eval", description=description)

    def run() -> None:
        from coalign.workflows.evaluate.evaluate import evaluate_and_write

        evaluate_and_write(command.model, command.tasks, command, command.json, command.report)

    return run


EVAL = Command(first_sentence(EvalCommand), eval_command)
