"""What README.md shows runs: its Python, its commands' options, its make targets, and the data that it names."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

import coalign.recipes.clip
from coalign import cli
from coalign.report.compare_page import Comparison
from coalign.run import (
    card,
    contest,
    data,
    evaluate,
    export,
    import_model,
    localize,
    profile,
    reporting,
    reproduce,
    search,
    space,
    train,
)
from coalign.run.contest import Contest
from coalign.run.search import Answers
from coalign.types import DualEncoder

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
BASH = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)).splitlines()
COMMANDS = [line for line in BASH if re.match(r"coalign |torchrun .* -m coalign.cli ", line)]
DATA = re.findall(r"\| `(--data .*?)` \|", TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that holds the README's `photos`."""
    root = tmp_path_factory.mktemp("readme")
    tiny.write_pairs(root / "photos", 64)
    return root


@pytest.fixture
def small(monkeypatch, folder):
    """The recipe with a tiny model and one epoch."""
    model = str(tiny.write_model(folder / "model"))
    original = coalign.recipes.clip.small_data

    def small_data(*args):
        return replace(original(*args), model=model, context_length=12, batch_size=16, epochs=1, workers=0, evals=1)

    monkeypatch.setattr(coalign.recipes.clip, "small_data", small_data)
    monkeypatch.chdir(folder)


@pytest.mark.slow
def test_python(small, folder, capsys):
    assert len(PYTHON) == 3
    namespaces = [{"__name__": "readme"} for _ in PYTHON]
    for code, names in zip(PYTHON, namespaces):
        exec(compile(code, "README.md", "exec"), names)
    first, _, last = namespaces
    assert first["embeds"].shape == (2, 16)
    assert isinstance(first["encoder"], DualEncoder)
    assert first["results"]["retrieval:photos"]["split"] == "val"
    assert (folder / "runs/short/report.html").exists()
    assert last["results"]["retrieval:photos"]["images"] == 64
    assert "'chance':" in capsys.readouterr().out


@pytest.fixture
def called(monkeypatch, tmp_path):
    """The commands' work is recorded instead of done."""
    monkeypatch.chdir(tmp_path)  # where a command may write
    calls = []

    def record(*args, **options):
        calls.append(args)

    for name in (
        "write_scenes",
        "prepare_openclipart",
        "check_data",
        "curate_data",
        "write_queries",
        "write_paraphrases",
        "train_tokenizer",
    ):
        monkeypatch.setattr(data, name, record)
    monkeypatch.setattr(contest, "compare", lambda *args: calls.append(args) or Comparison([], {}, {}))
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **options: calls.append(args) or {})
    for module, name in (
        (evaluate, "write_json"),
        (evaluate, "print_results"),
        (evaluate, "write_page"),
        (contest, "print_comparison"),
        (contest, "write_json"),
        (reporting, "print_comparison"),
        (reproduce, "reproduce"),
        (localize, "localize"),
        (export, "export"),
    ):
        monkeypatch.setattr(module, name, record)
    monkeypatch.setattr(import_model, "import_model", record)
    monkeypatch.setattr(card, "card", lambda *args: calls.append(args) or "")
    monkeypatch.setattr(space, "space", lambda *args: calls.append(args) or {})
    monkeypatch.setattr(
        search, "search", lambda *args, **options: calls.append((args, options)) or Answers("text", [], 0, 0)
    )
    monkeypatch.setattr(train, "train", lambda data, out, settle, **_: calls.append(settle(5000)))
    monkeypatch.setattr(
        contest, "contest", lambda *args, **_: calls.append(args) or Contest(Comparison([], {}, {}), "", {})
    )
    monkeypatch.setattr(profile, "profile", lambda data, settle, **_: calls.append(settle(5000)))
    monkeypatch.setattr(profile, "print_profile", record)
    return calls


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(called, line, capsys):
    words = shlex.split(line, comments=True)
    words = words[words.index("coalign.cli" if "coalign.cli" in words else "coalign") + 1 :]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert called


def test_every_command_is_shown():
    shown = [words for line in COMMANDS if (words := shlex.split(line, comments=True)[1:])]
    shown += [text.split()[1:] for text in re.findall(r"`(coalign [^`]*)`", TEXT)]
    for name in cli.COMMANDS:
        assert any(words[: len(name.split())] == name.split() for words in shown), name


@pytest.mark.parametrize("option", DATA)
def test_data_options_parse(called, option):
    assert cli.main(["train", *shlex.split(option), "--out", "run"]) == 0


def test_make_targets_exist():
    targets = set(re.findall(r"^make ([\w-]+)", "\n".join(BASH), re.MULTILINE))
    assert {"demo", "test", "test-slow", "lint", "bench"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_files_of_a_run_are_those_listed(small, folder):
    train.train("photos", "runs/files")
    table = TEXT[TEXT.index("A run's folder holds") : TEXT.index("## Evaluate")]
    named = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", table) if "." in name or "/" in name}
    made = {path.name for path in (folder / "runs/files").iterdir()} - {"run.lock"}
    assert made == named
