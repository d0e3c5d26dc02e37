"""The command line: parse, call `run`, print. Nothing here imports torch until a command runs, so that help is fast."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional, arg

from coalign import __version__, commands
from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.recipes import recipe

NOMINAL_PAIRS = 10_000  # help shows a recipe's settings for data of this size
# Exit code after Ctrl-C, and of training that a signal ended: what follows in a script must not start.
INTERRUPTED = 130


# ---------------------------------------------------------------- train


@dataclass(frozen=True)
class TrainCommand:
    """Train a model on image-text pairs, evaluate it on held-out ones, and write a report.

    Every setting below has a default from the recipe and the size of the data; give an option to override it. Start with

        coalign train --data my-pairs --out runs/first
    """

    data: str
    """The pairs: a folder of images with captions, a CSV/TSV/JSONL/Parquet table, tar shards ("cc3m/{00000..00331}.tar"), a COCO captions
    file, a Hugging Face data set folder or hf:NAME, scenes:8192 (made by code), or several with weights ("2*photos + pairs.csv")."""
    out: Path
    """Folder of the run."""
    recipe: str = "clip"
    """Named settings; `coalign recipes` lists them."""
    resume: Literal["no", "auto"] = "no"
    """auto: go on from the newest checkpoint in --out, or start if there is none. Ctrl-C and SIGTERM save one (exit code 130)."""
    dry_run: bool = False
    """Print the settings, the parameters, the steps and the first batch, and stop."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: cuda where there is one)."""


@dataclass(frozen=True)
class ProfileCommand:
    """Say where the time of a training step goes, and what helps: trains for some steps, and keeps nothing.

    Takes the settings of `coalign train`. Example: coalign profile --recipe declip --data my-pairs --steps 20
    """

    data: str
    """The pairs, as for `coalign train`."""
    recipe: str = "clip"
    """Named settings; `coalign recipes` lists them."""
    steps: int = 20
    """Steps that are measured, after three that are not."""
    device: str | None = None
    """cpu, cuda or cuda:N (default: cuda where there is one)."""


def profile_command(args: list[str]) -> int:
    @cache
    def parse(num_pairs: int) -> tuple[ProfileCommand, TrainConfig]:
        return _parse_settings(args, num_pairs, "profile", ProfileCommand)

    command = parse(NOMINAL_PAIRS)[0]
    from coalign.run.profile import print_profile, profile

    found = profile(command.data, lambda num_pairs: parse(num_pairs)[1], steps=command.steps, device=command.device)
    if os.environ.get("RANK", "0") == "0":  # under torchrun one process tells
        print_profile(found, command.steps)
    return 0


def train_command(args: list[str]) -> int:
    @cache
    def parse(num_pairs: int) -> tuple[TrainCommand, TrainConfig]:
        return _parse_settings(args, num_pairs, "train", TrainCommand)

    command = parse(NOMINAL_PAIRS)[0]  # complains about wrong options before torch is imported and data are read
    from coalign.run.train import train

    result = train(
        command.data, command.out, lambda num_pairs: parse(num_pairs)[1],
        resume=command.resume, device=command.device, dry_run=command.dry_run,
    )  # fmt: skip
    return INTERRUPTED if result is not None and result.ended == "interrupted" else 0


def _parse_settings(args: list[str], num_pairs: int, name: str, command: Any) -> tuple[Any, TrainConfig]:
    """The options over the recipe's settings for that many pairs."""
    default = recipe(_given(args, "--recipe") or "clip")(num_pairs)
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
    parsed: Any = _parse(options, args, name, description=inspect.cleandoc(command.__doc__ or ""))
    return parsed.command, dataclasses.replace(parsed.config, method_config=parsed.method_config)


def _given(args: Sequence[str], option: str) -> str | None:
    """The value of an option, before the options can be parsed."""
    for position, word in enumerate(args):
        if word == option and position + 1 < len(args):
            return args[position + 1]
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


# ---------------------------------------------------------------- eval


@dataclass(frozen=True)
class EvalCommand:
    """Evaluate a model, ours or another library's: image-text retrieval, zero-shot classification and more, with 95 % bootstrap intervals.

    Example: coalign eval runs/clip --tasks retrieval:data/openclipart zeroshot:data/openclipart --json out.json
    """

    model: Positional[str]
    """A run's folder, an exported folder, open_clip:NAME:WEIGHTS (one of open_clip's pretrained, or a .safetensors file), or
    transformers:NAME (a CLIPModel of the hub, or its folder)."""
    tasks: tuple[str, ...]
    """One or more of retrieval:DATA and retrieval-1k:DATA (among 1,000 images at a time), zeroshot:DATA, and, on frozen image features,
    probe:DATA (logistic regression), probe-mct:DATA and probe-slip:DATA (by the descent of these papers, SLIP's on 90 crops an image),
    fewshot:DATA (1 to 16 images a
    class), knn:DATA (20 nearest neighbours), and MCT's tagging:DATA (of data with tags) and vse:DATA (retrieval with a GRU over words);
    finetune:DATA (from zero-shot on, and the weights between both) and finetune-retrieval:DATA (of both encoders); where DATA is anything
    that `coalign train --data` takes, or, with
    --data-root, one of oxford_pets, cifar10, cifar100, sun397, food101, flowers102, stanford_cars, caltech101, fgvc_aircraft, dtd and
    imagenet; suite11 and suite11-probe are all of these in a row; foils:scenes and foils:sugarcrepe:FOLDER (true or false captions, by
    kind) and pairs:winoground:FOLDER; detection:, detection-c4: and segmentation: of scenes, coco:instances.json:images or voc:VOCdevkit
    (detectors on a ResNet); on scenes also localization:scenes (maps against the objects' masks); of OneR bootstrap:DATA (zero-shot with
    its own first answers beside the image) and guided:scenes (what is said of the object that a text names)."""
    weights: str = "last"
    """The checkpoint of a run: last or best."""
    split: str | None = None
    """train, val, test, … or all (default: the pairs that the run held out, else the data's own test or val split, else all)."""
    classes: Path | None = None
    """Text file with your classes, one a line: `name`, or `label = name`."""
    label: str | None = None
    """The column or fact that holds an image's class (default: label, class, category or folder)."""
    prompts: str | None = None
    """Prompt templates: default, imagenet, a data set's name (cifar10, food101, …), or a text file with {} for the class (default: those
    of one of the named data sets, else default)."""
    data_root: Path | None = None
    """The folder with the named data sets in it, each as torchvision unpacks it."""
    preprocess: str | None = None
    """How pictures become squares: coalign, open_clip or transformers (default: the model's own way)."""
    precision: str = "fp32"
    """fp32, or bf16, which is refused where it gives other embeddings."""
    cache: Path | None = None
    """Keep embeddings in this folder and find them again, by the content of weights and inputs (of probe-slip: of every crop)."""
    epochs: int = 10
    """Epochs of fine-tuning and of the detectors."""
    learn_from: str | None = None
    """What detectors learn from, where the data have no train part."""
    json: Path | None = None
    """Write the figures to this file."""
    report: Path | None = None
    """Write a page with the figures to this HTML file."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""
    workers: int = 0
    """Loader processes."""


def eval_command(args: list[str]) -> None:
    options = vars(_parse(EvalCommand, args, "eval", description=inspect.cleandoc(EvalCommand.__doc__ or "")))
    from coalign.run.evaluate import evaluate_and_write

    evaluate_and_write(**options)


# ---------------------------------------------------------------- dispatch


@dataclass(frozen=True)
class Command:
    summary: str
    run: Callable[[list[str]], int | None]  # gives the exit code, if it is not 0


def _plain(function: Callable[..., None], name: str) -> Command:
    summary = (function.__doc__ or "").strip().split("\n")[0]

    # called when parsing is over: what the command itself writes to stderr is no complaint of the parser's
    @wraps(function)
    def later(*args: Any, **options: Any) -> Callable[[], None]:
        return lambda: function(*args, **options)

    return Command(summary, lambda args: _parse(later, args, name)())


def _parse(target: Any, args: list[str], name: str, **options: Any) -> Any:
    """tyro's parse, with its boxed complaint turned into a sentence."""
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(target, args=args, prog=f"coalign {name}", **options)
    except SystemExit as error:
        if not error.code:
            raise
        lines = [
            line for line in complaint.getvalue().splitlines() if not line.startswith("\u256d")
        ]  # the box's top carries a title
        words = " ".join(re.sub(r"[\u2500-\u257f]", " ", " ".join(lines)).split())
        words = re.split(r"For full helptext|Argument helptext", words)[0].strip()
        raise UserError(f"{words} (see `coalign {name} --help`)") from None


COMMANDS = {
    "train": Command(
        "Train a model on image-text pairs, evaluate it on held-out ones, and write a report.", train_command
    ),
    "profile": Command("Say where the time of a training step goes, and what helps.", profile_command),
    "eval": Command(
        "Evaluate a model, ours or another library's: retrieval, zero-shot classification and more.", eval_command
    ),
    "compare": _plain(commands.compare_command, "compare"),
    "localize": _plain(commands.localize_command, "localize"),
    "space": _plain(commands.space_command, "space"),
    "search": _plain(commands.search_command, "search"),
    "export": _plain(commands.export_command, "export"),
    "import": _plain(commands.import_command, "import"),
    "card": _plain(commands.card_command, "card"),
    "reproduce": _plain(commands.reproduce_command, "reproduce"),
    "data openclipart": _plain(commands.openclipart_command, "data openclipart"),
    "data scenes": _plain(commands.scenes_command, "data scenes"),
    "data check": _plain(commands.check_command, "data check"),
    "data curate": _plain(commands.curate_command, "data curate"),
    "data paraphrase": _plain(commands.paraphrase_command, "data paraphrase"),
    "data queries": _plain(commands.queries_command, "data queries"),
    "data tokenizer": _plain(commands.tokenizer_command, "data tokenizer"),
    "models": _plain(commands.models_command, "models"),
    "recipes": _plain(commands.recipes_command, "recipes"),
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of `coalign`. Returns the exit code: 2 for a mistake of the user's, which is said in one sentence."""
    words = list(sys.argv[1:] if args is None else args)
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help(), end="")
        return 0
    if words[0] == "--version":
        print(f"coalign {__version__}")
        return 0
    length = 2 if words[0] == "data" else 1
    name = " ".join(words[:length])
    try:
        if name not in COMMANDS:
            if words[0] == "data" and (len(words) == 1 or words[1] in ("-h", "--help")):
                print(_help("data "), end="")
                return 0
            raise UserError(_no_command(name))
        return COMMANDS[name].run(words[length:]) or 0
    except UserError as error:
        print(f"coalign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("coalign: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output went away, as in `coalign models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _help(group: str = "") -> str:
    commands = [
        f"  coalign {name:18} {command.summary}" for name, command in COMMANDS.items() if name.startswith(group)
    ]
    lines = ["coalign: data-efficient language-image pre-training.", "", *commands, ""]
    lines += ["`coalign COMMAND --help` says what a command takes."]
    if not group:
        first = "coalign train --data scenes:4096 --out runs/first --epochs 5"
        lines += ["A first run, in a few minutes on a laptop:", "", f"  {first}"]
    return "\n".join([*lines, ""])


def _no_command(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, 1)
    return f"there is no command {name!r}; " + (f"did you mean {near[0]!r}?" if near else "see `coalign --help`.")


if __name__ == "__main__":
    raise SystemExit(main())
