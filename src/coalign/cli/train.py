"""`coalign train` and `coalign profile`, whose options include the settings of a recipe; `coalign models` and `coalign recipes`."""

from __future__ import annotations

import dataclasses
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from coalign.cli.parse import Command, first_sentence, parse
from coalign.config import NOMINAL_PAIRS, TrainConfig
from coalign.methods import recipe, recipes
from coalign.methods.defaults import with_start

# exit code after Ctrl-C, and after a signal that stopped training, so that a calling script stops too
INTERRUPTED = 130


@dataclass(frozen=True)
class TrainCommand:
    """Train a model on image-text pairs, evaluate it on held-out pairs, and write a report.

    Unset options take their defaults from the recipe and the dataset size.

    Example: coalign train --data my-pairs --out runs/first
    """

    # The pairs: a folder of images with captions, a CSV/TSV/JSONL/Parquet table, tar shards ("cc3m/{00000..00331}.tar"), a COCO captions
    # file, a Hugging Face dataset folder or hf:NAME, scenes:8192 (synthetic images), or several with weights ("2*photos + pairs.csv").
    data: str
    out: Path
    """Output folder of the run."""
    recipe: str = "clip"
    """Named settings; `coalign recipes` lists them."""
    resume: Literal["no", "auto"] = "no"
    """auto: resume from the newest checkpoint in --out, if there is one. Ctrl-C and SIGTERM save a checkpoint (exit code 130)."""
    dry_run: bool = False
    """Print the settings, the number of parameters, the cost per step and the first batch, then exit."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps. None: the best there is."""


@dataclass(frozen=True)
class ProfileCommand:
    """Measure the time of each stage of a training step, and print what would make it faster.

    Trains for a few steps and saves nothing. Accepts the settings of `coalign train`.

    Example: coalign profile --recipe declip --data my-pairs --steps 20
    """

    data: str
    """The pairs, as for `coalign train`."""
    recipe: str = "clip"
    """Named settings; `coalign recipes` lists them."""
    steps: int = 20
    """Steps to measure, after three warm-up steps."""
    device: str | None = None
    """cpu, cuda, cuda:N or mps. None: the best there is."""


def train_command(args: list[str]) -> Callable[[], int]:
    @cache
    def config_for(num_pairs: int) -> tuple[TrainCommand, TrainConfig]:
        return _parse_settings(args, num_pairs, "train", TrainCommand)

    options = config_for(NOMINAL_PAIRS)[0]  # rejects invalid options before importing torch and reading data

    def run() -> int:
        from coalign.workflows.train.train import train

        result = train(
            options.data, options.out, lambda num_pairs: config_for(num_pairs)[1],
            resume=options.resume, device=options.device, dry_run=options.dry_run,
        )  # fmt: skip
        return INTERRUPTED if result is not None and result.ended == "interrupted" else 0

    return run


def profile_command(args: list[str]) -> Callable[[], None]:
    @cache
    def config_for(num_pairs: int) -> tuple[ProfileCommand, TrainConfig]:
        return _parse_settings(args, num_pairs, "profile", ProfileCommand)

    options = config_for(NOMINAL_PAIRS)[0]

    def run() -> None:
        from coalign.devices import best_device, device_line
        from coalign.workflows.train.profile import print_profile, profile

        is_first = os.environ.get("RANK", "0") == "0"  # under torchrun only the first process prints
        device = best_device(options.device)
        if is_first:
            print(device_line(device))
        result = profile(options.data, lambda num_pairs: config_for(num_pairs)[1], steps=options.steps, device=device)
        if is_first:
            print_profile(result, options.steps)

    return run


TRAIN = Command(first_sentence(TrainCommand), train_command)
PROFILE = Command(first_sentence(ProfileCommand), profile_command)


def models_command(contains: Positional[str] = "") -> None:
    """List the model names that `coalign train --model` accepts.

    Args:
        contains: list only names that contain this text
    """
    from coalign.networks.towers.spec import model_names

    print("\n".join(name for name in model_names() if contains.lower() in name.lower()))


def recipes_command() -> None:
    """List the recipes: named settings for `coalign train --recipe`."""
    for name, make in sorted(recipes().items()):
        print(f"{name:20} {' '.join(inspect.cleandoc(make.__doc__ or '').split())}")


def _parse_settings(args: list[str], num_pairs: int, name: str, command: Any) -> tuple[Any, TrainConfig]:
    """Parses the command's own options, and the settings of the recipe for `num_pairs` training pairs with overrides.

    If the options say what a model starts from, the defaults of the others are those that fit it.
    """
    default = recipe(_value_of(args, "--recipe") or "clip")(num_pairs)
    options, config = _parse_options(args, default, name, command)
    fitted = with_start(default, config)
    return (options, config) if fitted is default else _parse_options(args, fitted, name, command)


def _parse_options(args: list[str], default: TrainConfig, name: str, command: Any) -> tuple[Any, TrainConfig]:
    options = dataclasses.make_dataclass(
        "Options",
        [
            ("command", Annotated[command, arg(name="")]),
            ("config", Annotated[TrainConfig, arg(name="")], dataclasses.field(default=default)),
            (
                "method_config",
                Annotated[type(default.method_config), arg(name="")],
                dataclasses.field(default=default.method_config),
            ),
        ],
    )
    parsed: Any = parse(options, args, name, description=inspect.cleandoc(command.__doc__ or ""))
    return parsed.command, dataclasses.replace(parsed.config, method_config=parsed.method_config)


def _value_of(args: Sequence[str], option: str) -> str | None:
    """Returns the value of an option without parsing the others, which depend on it."""
    for position, word in enumerate(args):
        if word == option and position + 1 < len(args):
            return args[position + 1]
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None
