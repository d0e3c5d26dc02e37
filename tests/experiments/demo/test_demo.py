"""`coalign demo`: both methods train on the same drawings, the page has the numbers of the runs, and a killed demo resumes."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import emoji
import numpy as np
import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.data.prepare.emoji import prepare_emoji
from coalign.data.sources.open import open_source
from coalign.experiments.benchmark import benchmark as benchmark_module
from coalign.experiments.benchmark import plan as benchmark_plan
from coalign.experiments.benchmark.benchmark import benchmark
from coalign.experiments.benchmark.plan import TooShort
from coalign.experiments.demo import demo as module
from coalign.experiments.demo import examples as demo_examples
from coalign.experiments.demo.demo import demo
from coalign.experiments.demo.examples import evenly_spaced, is_hit
from coalign.experiments.tables import reproduce as reproduce_module
from coalign.experiments.tables import search as search_module
from coalign.experiments.tables.trials import _train
from coalign.methods.table import Arm, Table
from coalign.networks.towers.image import ImageTower
from coalign.runs.folder import read_config
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.explore.search import search

FROM_SCRATCH = {"image_tower": None, "text_tower": None, "image_size": 32}


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A folder of a demo with the data of 200 emoji, which it does not prepare again."""
    out = tmp_path_factory.mktemp("few") / "demo"
    everything = list(emoji.EMOJI_DATA)
    texts = ["❤️", "🇯🇵", *everything[:: len(everything) // 520]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(emoji, "EMOJI_DATA", {text: emoji.EMOJI_DATA[text] for text in texts})
        summary = prepare_emoji(out / "data", ("twemoji", "openmoji"))
    assert 150 < summary.emoji < 300
    return out


@pytest.fixture
def quick(monkeypatch, tmp_path, without_run_reports):
    """Runs trials in this process with a tiny model. Returns the names of the trained arms."""
    model, ran = str(tiny.write_model(tmp_path / "model")), []
    original = Table.config

    def config(self, arm, seed, num_pairs):
        return replace(original(self, arm, seed, num_pairs), model=model, context_length=16, batch_norm_group=8)

    def run(trials, jobs):
        for trial in trials:
            ran.append(trial.arm)
            _train(trial, 1)
        return []

    monkeypatch.setattr(Table, "config", config)
    arms = {name: Arm(name, start=FROM_SCRATCH) for name in module.SETTINGS.arms}
    monkeypatch.setattr(module, "SETTINGS", replace(module.SETTINGS, arms=arms, batch_size=16, evals=1))
    for each in (module, search_module, reproduce_module):
        monkeypatch.setattr(each, "run_trials", run)
    return ran


@pytest.fixture
def done(few, quick, capsys):
    """The folder of a finished demo of few epochs, and what it printed."""
    page = demo(few, epochs=2)
    assert page == few / "index.html"
    return few, capsys.readouterr().out


def test_methods_train_once_on_the_same_drawings_of_one_vendor(done, quick):
    out, _ = done
    configs = [read_config(out / f"{arm}-seed0") for arm in ("clip", "mcd")]
    assert configs[0].fingerprint == configs[1].fingerprint
    assert configs[0].config.epochs == configs[1].config.epochs == 2
    source = open_source(str(out / "data/metadata.jsonl"))
    vendors = {source.record(index).fact("vendor") for index in source.splits["train"].tolist()}
    assert vendors == {"twemoji"}
    assert {source.record(index).fact("vendor") for index in source.splits["test"].tolist()} == {"openmoji"}
    before = list(quick)
    (out / "index.html").unlink()
    demo(out, epochs=2)
    assert quick == before
    assert (out / "index.html").exists()


def test_the_page_has_the_numbers_of_an_evaluation_of_its_own(done):
    out, printed = done
    page = re.sub(r"\s+", " ", (out / "index.html").read_text())
    for arm in ("clip", "mcd"):
        task = f"retrieval:{out / 'data/metadata.jsonl'}"
        found = evaluate(out / f"{arm}-seed0", [task], EvalConfig(split="test"))[task]["metrics"]
        assert f"{100 * found['text_to_image.r10']['value']:.1f} %" in page
    values = json.loads((out / "demo.json").read_text())
    assert [group["name"] for group in values["groups"]] == ["CLIP", "MCD"]
    for sentence in values["sentences"]:
        assert sentence in printed
        assert sentence in page
    assert "Page: " in printed
    for needed in (
        "CC BY 4.0",
        "CC BY-SA 4.0",
        "coalign search runs/mcd",
        "They have never seen a drawing by OpenMoji",
    ):
        assert needed in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)  # self-contained


def test_searches_are_those_of_coalign_search(done):
    out, _ = done
    page = (out / "index.html").read_text()
    hits = search(out / "mcd-seed0", str(out / "data/metadata.jsonl"), "red heart", top=5, split="test").hits
    (row,) = re.findall(
        r'<div class="versus"><div class="query">[^/]*red heart</div>.*?(?=<div class="versus">|<h2)', page, re.S
    )
    mcd = row[row.index(">MCD ") :]
    assert re.findall(r'<div class="cell (good|bad)">.*?dir="auto">(.*?)</div>', mcd, re.S) == [
        ("good" if "red" in hit.captions[0].split() and "heart" in hit.captions[0].split() else "bad", hit.captions[0])
        for hit in hits
    ]


def test_a_locked_image_encoder_of_both_runs_runs_once(tmp_path, pairs, model_file, trained, monkeypatch):
    runs = {f"seed {seed}": tmp_path / str(seed) for seed in (1, 2)}
    for seed, out in enumerate(runs.values(), 1):
        options = {"init_from": trained, "image_tuning": "locked", "epochs": 1, "evals": 0, "seed": seed}
        assert cli.main(tiny.train_args(pairs, out, model_file, **options)) == 0
    source, counts = open_source(str(pairs)), []
    indices, queries = np.arange(len(source)), dict.fromkeys(["a red tree", "blue", "lying"], "")
    original = ImageTower.forward

    def forward(self, pixels, *args, **options):
        counts.append(len(pixels) if pixels.ndim == 4 else 0)
        return original(self, pixels, *args, **options)

    monkeypatch.setattr(ImageTower, "forward", forward)
    found = demo_examples.search(runs, source, indices, queries)
    assert sum(counts) == len(source)
    for name, folder in runs.items():
        for query, alone in zip(found, demo_examples.search({name: folder}, source, indices, queries)):
            assert [cell.caption for cell in query.results[name]] == [cell.caption for cell in alone.results[name]]


def test_hits_and_the_rule_of_the_queries():
    assert is_hit("smiling cat", ["grinning cat with smiling eyes"])
    assert not is_hit("smiling cat", ["cat with wry smile", "smiling face"])
    assert evenly_spaced(["c", "a", "b", "a"], 1) == ["b"]
    assert evenly_spaced(list("abcdefgh"), 2) == ["c", "g"]
    assert evenly_spaced(["a"], 3) == ["a"]
    assert evenly_spaced([], 3) == []


def test_your_own_pairs(quick, tmp_path, monkeypatch, capsys):
    data, out = tiny.write_pairs(tmp_path / "photos", 240), tmp_path / "own"

    def short(data, out, methods, *, minutes, seeds):
        assert (minutes, seeds) == (module.OWN_MINUTES, module.OWN_SEEDS)
        return benchmark(data, out, methods, epochs=1, seeds=seeds)

    monkeypatch.setattr(module, "benchmark", short)
    monkeypatch.setattr(benchmark_plan, "MOST", 3)
    monkeypatch.setattr(benchmark_module, "_speed", lambda *_: (1000.0, 0.0))
    assert cli.main(["demo", "--data", str(data), "--out", str(out)]) == 0
    assert quick[-4:] == ["clip", "mcd"] * 2
    advice = json.loads((out / "benchmark.json").read_text())["advice"]
    page = (out / "index.html").read_text()
    assert advice in page
    assert advice in capsys.readouterr().out
    assert page.count('class="versus"') == module.OWN_QUERIES
    assert f"coalign benchmark --data {data}" in page


def test_too_many_pairs_for_the_time(tmp_path, monkeypatch, capsys):
    """The command has no --minutes."""

    def benchmark(*args, **options):
        raise TooShort("--minutes 10 is too short", 25)

    monkeypatch.setattr(module, "benchmark", benchmark)
    assert cli.main(["demo", "--data", "my photos", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "my photos has too many pairs for 10 minutes on this machine" in error
    assert "coalign benchmark --data 'my photos' --out runs/benchmark --methods clip mcd --minutes 25" in error


def test_a_folder_of_something_else_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/letter.txt").write_text("mine")
    assert cli.main(["demo", "--out", str(tmp_path)]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
    assert (tmp_path / "data/letter.txt").read_text() == "mine"


def steps_of(folder):
    path = folder / "metrics.jsonl"
    return [row["step"] for row in tiny.rows(path) if "loss" in row] if path.exists() else []


@pytest.mark.slow
@pytest.mark.parametrize("how", ["Ctrl-C", "SIGKILL of the parent"])
def test_a_killed_demo_resumes(few, tmp_path, how):
    """Without fakes: in separate processes."""
    out = tmp_path / "demo"
    out.mkdir()
    (out / "data").symlink_to(few / "data")
    arms = f"{{name: Arm(name, start={FROM_SCRATCH}) for name in ('clip', 'mcd')}}"
    code = "from dataclasses import replace; from coalign.experiments.demo import demo; from coalign.methods.table import Arm; "
    code += f"demo.SETTINGS = replace(demo.SETTINGS, batch_size=16, arms={arms}); "
    code += f"demo.demo({str(out)!r}, epochs=6)"
    command = [sys.executable, "-c", code]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    runs = [out / "clip-seed0", out / "mcd-seed0"]
    deadline = time.monotonic() + 900
    while not all(len(steps_of(run)) > 3 for run in runs[: min(2, len(os.sched_getaffinity(0)))]):
        assert time.monotonic() < deadline, "training did not begin"
        time.sleep(0.1)
    if how == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    process.communicate(timeout=300)  # the trials hold the pipe open, too
    assert process.returncode
    begun = [run for run in runs if run.exists()]
    before = {run: steps_of(run) for run in begun}
    assert not any((run / "results.json").exists() for run in begun)
    again = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert again.returncode == 0, again.stderr
    assert (out / "index.html").exists()
    for run in runs:
        steps = steps_of(run)
        assert steps == list(range(len(steps)))
        if run in begun:
            assert steps[: len(before[run])] == before[run]
            assert "resuming at step" in run.with_name(f"{run.name}.log").read_text()


@pytest.mark.slow
def test_two_minutes_of_the_demo(tmp_path, monkeypatch):
    """All emoji, two small views of each: both methods beat chance on the other vendor's drawings."""
    start = {**module.START, "image_size": 64, "feature_views": 2}
    arms = {name: Arm(name, start=start) for name in module.SETTINGS.arms}
    monkeypatch.setattr(module, "SETTINGS", replace(module.SETTINGS, arms=arms))
    demo(tmp_path, epochs=12)
    groups = json.loads((tmp_path / "demo.json").read_text())["groups"]
    for group in groups:
        metric = group["metrics"]["retrieval_test.text_to_image.r10"]
        assert metric["over_items"][0] > 2 * metric["chance"]
        assert metric["count"] > 1500
    difference = groups[1]["metrics"]["retrieval_test.text_to_image.r10"]["difference_over_items"]
    assert np.isfinite(difference).all()
