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

from coalign import __version__
from coalign.config import TrainConfig
from coalign.errors import UserError
from coalign.recipes import recipe, recipes

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
    file, a Hugging Face data set folder or hf:NAME, or scenes:8192 (made by code)."""
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


def train_command(args: list[str]) -> int:
    @cache
    def parse(num_pairs: int) -> tuple[TrainCommand, TrainConfig]:
        return _parse_train(args, num_pairs)

    command = parse(NOMINAL_PAIRS)[0]  # complains about wrong options before torch is imported and data are read
    from coalign.run.train import train

    result = train(
        command.data, command.out, lambda num_pairs: parse(num_pairs)[1],
        resume=command.resume, device=command.device, dry_run=command.dry_run,
    )  # fmt: skip
    return INTERRUPTED if result is not None and result.ended == "interrupted" else 0


def _parse_train(args: list[str], num_pairs: int) -> tuple[TrainCommand, TrainConfig]:
    """The options over the recipe's settings for that many pairs."""
    default = recipe(_given(args, "--recipe") or "clip")(num_pairs)
    options = dataclasses.make_dataclass(
        "TrainOptions",
        [
            ("command", Annotated[TrainCommand, arg(name="")]),
            ("config", Annotated[TrainConfig, arg(name="")], dataclasses.field(default=default)),
            (
                "method_config",
                Annotated[type(default.method_config), arg(name="")],
                dataclasses.field(default=default.method_config),
            ),
        ],
    )
    parsed: Any = _parse(options, args, "train", description=inspect.cleandoc(TrainCommand.__doc__ or ""))
    return parsed.command, dataclasses.replace(parsed.config, method_config=parsed.method_config)


def _given(args: Sequence[str], option: str) -> str | None:
    """The value of an option, before the options can be parsed."""
    for position, word in enumerate(args):
        if word == option and position + 1 < len(args):
            return args[position + 1]
        if word.startswith(f"{option}="):
            return word.split("=", 1)[1]
    return None


# ---------------------------------------------------------------- the other commands


def eval_command(
    model: Positional[str],
    tasks: tuple[str, ...],
    weights: str = "last",
    split: str | None = None,
    classes: Path | None = None,
    label: str | None = None,
    prompts: str = "default",
    json: Path | None = None,
    device: str = "cpu",
    workers: int = 0,
) -> None:
    """Evaluate a trained model: zero-shot classification and image-text retrieval, with 95 % bootstrap intervals.

    Example: coalign eval runs/clip --tasks retrieval:data/openclipart zeroshot:data/openclipart --json out.json

    Args:
        model: the folder of a run
        tasks: one or more of retrieval:DATA and zeroshot:DATA, where DATA is anything that `coalign train --data` takes
        weights: the checkpoint: last or best
        split: train, val, test, … or all (default: the pairs that the run held out, else the data's own test or val split, else all)
        classes: text file with your classes, one a line: `name`, or `label = name`
        label: the column or fact that holds an image's class (default: label, class, category or folder)
        prompts: prompt templates: default, imagenet, a data set's name (cifar10, food101, …), or a text file with {} for the class
        json: write the figures to this file
        device: cpu, cuda or cuda:N
        workers: loader processes
    """
    from coalign.run.evaluate import evaluate, write_json
    from coalign.run.model import check_output
    from coalign.run.reporting import print_results

    if json:
        check_output(json)  # before the work
    results = evaluate(
        model,
        tasks,
        weights=weights,
        split=split,
        classes=classes,
        label=label,
        prompts=prompts,
        device=device,
        workers=workers,
    )
    print_results(results)
    if json:
        write_json(results, json)


def compare_command(runs: Positional[tuple[str, ...]], report: Path | None = None, json: Path | None = None) -> None:
    """Compare finished runs side by side on the same held-out pairs, with paired differences to the first.

    Runs that differ in their seed alone become one line. Example: coalign compare runs/clip runs/slip --report compare.html

    Args:
        runs: the folders of two or more runs
        report: write a page with figures to this HTML file
        json: write the figures to this file
    """
    from coalign.run.compare import compare
    from coalign.run.evaluate import write_json
    from coalign.run.model import check_output
    from coalign.run.reporting import print_comparison

    if json:
        check_output(json)
    comparison = compare(runs, report)
    print_comparison(comparison)
    if json:
        write_json(comparison.to_json(), json)
    if report:
        print(f"Report: {report}")


def scenes_command(out: Path, size: int = 64, train: int = 8192, seed: int = 0, swap: float = 0.0) -> None:
    """Write the scenes data set: pictures drawn by code, with captions, tags and exact ground truth.
    Training needs no copy of it: --data scenes:8192.

    Args:
        out: the new folder
        size: side of the pictures in pixels
        train: training pairs; validation, test, held-out combinations and shifted nuisance have 2,000 each
        seed: another seed is another data set
        swap: share of the training captions that are swapped between pictures (noise, flagged)
    """
    from coalign.run.data import write_scenes

    write_scenes(out, size, train, seed, swap)


def openclipart_command(
    out: Path, download: bool = False, from_: Annotated[Path | None, arg(name="from")] = None, max_side: int = 256
) -> None:
    """Prepare Open Clip Art: about 6,900 real, noisy public-domain pairs from Debian's packages openclipart-png and openclipart-svg.

    Args:
        out: the new folder
        download: fetch the two packages with apt-get into a temporary folder (needs a Debian or Ubuntu system, not root)
        from_: read an installed or unpacked copy below this root instead, such as /
        max_side: longest side of the pictures that are written, in pixels
    """
    from coalign.run.data import prepare_openclipart

    prepare_openclipart(out, download, from_, max_side)


def check_command(data: Positional[str], report: Path | None = None, limit: int | None = None) -> None:
    """Say what is in a data set before it is trained on: broken files, sizes, captions, duplicates, languages, tags.

    Args:
        data: anything that `coalign train --data` takes
        report: write a page with figures and a gallery to this HTML file
        limit: look at this many samples, drawn at random (default: all)
    """
    from coalign.run.data import check_data

    check_data(data, report, limit)


def curate_command(data: Positional[str], out: Path, min_side: int = 0, drop_chinese: bool = False) -> None:
    """Apply DeCLIP's data rules and write the kept pairs: no damaged images, no empty captions, an English-word ratio of at least 0.8, more
    than one part of speech. What is dropped, and why, is listed in dropped.jsonl.

    Args:
        data: anything that `coalign train --data` takes
        out: the new folder
        min_side: also drop images whose shorter side is below this many pixels (web data)
        drop_chinese: also drop captions in Chinese (web data)
    """
    from coalign.run.data import curate_data

    curate_data(data, out, min_side, drop_chinese)


def queries_command(data: Positional[str], out: Path) -> None:
    """Build the list of search queries of DeCLIP's Appendix C: the data's tags and words with their WordNet synonyms.

    Args:
        data: anything that `coalign train --data` takes
        out: the text file to write, one query a line
    """
    from coalign.run.data import write_queries

    write_queries(data, out)


def tokenizer_command(data: Positional[str], out: Path, vocab_size: int = 8192) -> None:
    """Train a small byte-pair vocabulary on the training captions; use it by `coalign train --tokenizer FILE`.

    Args:
        data: anything that `coalign train --data` takes
        out: the JSON file to write
        vocab_size: entries of the vocabulary
    """
    from coalign.run.data import train_tokenizer

    train_tokenizer(data, out, vocab_size)


def models_command(contains: Positional[str] = "") -> None:
    """List the names that `coalign train --model` takes.

    Args:
        contains: only names with this in them
    """
    from coalign.networks.towers import model_names

    print("\n".join(name for name in model_names() if contains.lower() in name.lower()))


def recipes_command() -> None:
    """List the recipes: named settings for `coalign train --recipe`."""
    for name, make in sorted(recipes().items()):
        print(f"{name:16} {' '.join((make.__doc__ or '').split())}")


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
    "eval": _plain(eval_command, "eval"),
    "compare": _plain(compare_command, "compare"),
    "data openclipart": _plain(openclipart_command, "data openclipart"),
    "data scenes": _plain(scenes_command, "data scenes"),
    "data check": _plain(check_command, "data check"),
    "data curate": _plain(curate_command, "data curate"),
    "data queries": _plain(queries_command, "data queries"),
    "data tokenizer": _plain(tokenizer_command, "data tokenizer"),
    "models": _plain(models_command, "models"),
    "recipes": _plain(recipes_command, "recipes"),
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
