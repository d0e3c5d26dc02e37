"""Entry point of the command line: runs a command and prints errors in one line. Does not import torch, so that help is fast."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence

from coalign.cli import data, evaluate, experiments, serve, train, use
from coalign.cli.parse import Command, command
from coalign.errors import UserError
from coalign.version import __version__

INTERRUPTED = train.INTERRUPTED

FUNCTIONS: dict[str, Callable[..., None]] = {
    "data check": data.check_command,
    "data curate": data.curate_command,
    "data paraphrase": data.paraphrase_command,
    "data queries": data.queries_command,
    "data tokenizer": data.tokenizer_command,
    "data openclipart": data.openclipart_command,
    "data emoji": data.emoji_command,
    "data scenes": data.scenes_command,
    "models": train.models_command,
    "recipes": train.recipes_command,
    "compare": experiments.compare_command,
    "embed": use.embed_command,
    "index": use.index_command,
    "search": use.search_command,
    "serve": serve.serve_command,
    "classify": use.classify_command,
    "localize": use.localize_command,
    "space": use.space_command,
    "interpolate": use.interpolate_command,
    "export": use.export_command,
    "import": use.import_command,
    "card": use.card_command,
    "demo": experiments.demo_command,
    "benchmark": experiments.benchmark_command,
    "reproduce": experiments.reproduce_command,
}
COMMANDS: dict[str, Command] = {
    "train": train.TRAIN,
    "profile": train.PROFILE,
    "eval": evaluate.EVAL,
    **{name: command(function, name) for name, function in FUNCTIONS.items()},
}
# the groups of `coalign --help`; each command is in one
GROUPS = {
    "Data": [name for name in COMMANDS if name.startswith("data ")],
    "Train": ["train", "profile", "models", "recipes"],
    "Evaluate": ["eval", "compare"],
    "Use": [
        "embed",
        "index",
        "search",
        "serve",
        "classify",
        "localize",
        "space",
        "interpolate",
        "export",
        "import",
        "card",
    ],
    "Experiments": ["demo", "benchmark", "reproduce"],
}


def main(args: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 2 after a UserError, whose message is printed in one line."""
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
                print(_help("Data"), end="")
                return 0
            raise UserError(_unknown_command(name))
        return COMMANDS[name].parse(words[length:])() or 0
    except UserError as error:
        print(f"coalign: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("coalign: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # stdout was closed, as in `coalign models | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _help(only: str | None = None) -> str:
    """Returns the list of all commands, or of those in one group."""
    lines = ["coalign: data-efficient language-image pre-training.", ""]
    for group, names in GROUPS.items():
        if only in (None, group):
            lines += [f"{group}:", *(f"  coalign {name:18} {COMMANDS[name].summary}" for name in names), ""]
    lines += ["Run `coalign COMMAND --help` for the options of a command."]
    if only is None:
        lines += ["To train two first models, in a few minutes on a laptop:", "", "  coalign demo"]
    return "\n".join([*lines, ""])


def _unknown_command(name: str) -> str:
    import difflib

    matches = difflib.get_close_matches(name, COMMANDS, 1)
    return f"There is no command {name!r}; " + (f"did you mean {matches[0]!r}?" if matches else "see `coalign --help`.")


if __name__ == "__main__":
    raise SystemExit(main())
