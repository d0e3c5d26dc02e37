"""README.md's Python code runs; its commands, make targets and --data examples are valid."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.experiments import benchmark, compare, compare_terminal, reproduce
from coalign.experiments.benchmark import BenchmarkResult
from coalign.methods.clip import config as clip
from coalign.report.compare_page import Comparison
from coalign.runs import card
from coalign.types import DualEncoder
from coalign.workflows import data
from coalign.workflows.evaluate import evaluate
from coalign.workflows.explore import localize, search, space
from coalign.workflows.explore.search import SearchResult
from coalign.workflows.models import export, import_model
from coalign.workflows.train import profile, train

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
BASH = "".join(re.findall(r"^```bash\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)).splitlines()
COMMANDS = [line for line in BASH if re.match(r"coalign |torchrun .* -m coalign ", line)]
DATA = re.findall(r"\| `(--data .*?)` \|", TEXT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the README's `photos`."""
    root = tmp_path_factory.mktemp("readme")
    tiny.write_pairs(root / "photos", 64)
    return root


@pytest.fixture
def small(monkeypatch, folder):
    """CLIP's recipe with a tiny model and one epoch."""
    model = str(tiny.write_model(folder / "model"))
    original = clip.default_config

    def default_config(*args):
        return replace(original(*args), model=model, context_length=12, batch_size=16, epochs=1, workers=0, evals=1)

    monkeypatch.setattr(clip, "default_config", default_config)
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
def calls(monkeypatch, tmp_path):
    """Records the calls of the commands' functions instead of running them."""
    monkeypatch.chdir(tmp_path)  # commands may write here
    calls = []

    def record(*args, **options):
        calls.append(args)

    for name in (
        "write_scenes",
        "prepare_openclipart",
        "check_data",
        "curate_data",
        "build_query_list",
        "write_paraphrases",
        "train_tokenizer",
    ):
        monkeypatch.setattr(data, name, record)
    monkeypatch.setattr(compare, "compare", lambda *args: calls.append(args) or Comparison([], {}, {}))
    monkeypatch.setattr(evaluate, "evaluate", lambda *args, **options: calls.append(args) or {})
    for module, name in (
        (evaluate, "write_results"),
        (evaluate, "print_results"),
        (evaluate, "write_page"),
        (benchmark, "print_comparison"),
        (benchmark, "write_results"),
        (compare, "print_comparison"),
        (compare, "write_results"),
        (compare_terminal, "print_comparison"),
        (reproduce, "reproduce"),
        (localize, "localize"),
        (export, "export"),
    ):
        monkeypatch.setattr(module, name, record)
    monkeypatch.setattr(import_model, "import_model", record)
    monkeypatch.setattr(card, "card", lambda *args: calls.append(args) or "")
    monkeypatch.setattr(space, "space", lambda *args: calls.append(args) or {})
    monkeypatch.setattr(
        search, "search", lambda *args, **options: calls.append((args, options)) or SearchResult("text", [], 0, 0)
    )
    monkeypatch.setattr(train, "train", lambda data, out, config_for, **_: calls.append(config_for(5000)))
    empty = BenchmarkResult(Comparison([], {}, {}), "", {})
    monkeypatch.setattr(benchmark, "benchmark", lambda *args, **_: calls.append(args) or empty)
    monkeypatch.setattr(profile, "profile", lambda data, config_for, **_: calls.append(config_for(5000)))
    monkeypatch.setattr(profile, "print_profile", record)
    return calls


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_parse(calls, line, capsys):
    words = shlex.split(line, comments=True)
    words = words[words.index("coalign") + 1 :]
    assert cli.main(words) == 0, capsys.readouterr().err
    assert calls


def test_every_command_is_shown():
    shown = [words for line in COMMANDS if (words := shlex.split(line, comments=True)[1:])]
    shown += [text.split()[1:] for text in re.findall(r"`(coalign [^`]*)`", TEXT)]
    for name in cli.COMMANDS:
        assert any(words[: len(name.split())] == name.split() for words in shown), name


@pytest.mark.parametrize("option", DATA)
def test_data_options_parse(calls, option):
    assert cli.main(["train", *shlex.split(option), "--out", "run"]) == 0


def test_make_targets_exist():
    targets = set(re.findall(r"^make ([\w-]+)", "\n".join(BASH), re.MULTILINE))
    assert {"demo", "test", "test-slow", "lint", "bench"} <= targets
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_listed_run_files_are_those_written(small, folder):
    train.train("photos", "runs/files")
    table = TEXT[TEXT.index("A run's folder holds") : TEXT.index("## Evaluate")]
    listed = {name.rstrip("/") for name in re.findall(r"`([\w.]+/?)`", table) if "." in name or "/" in name}
    written = {path.name for path in (folder / "runs/files").iterdir()} - {"run.lock"}
    assert written == listed
