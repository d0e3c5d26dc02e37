"""`coalign reproduce`: trials run in separate processes, fail alone, resume after an interruption, and are compared by arm."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.experiments.tables import registry, trials
from coalign.experiments.tables import reproduce as module
from coalign.experiments.tables.reproduce import reproduce
from coalign.experiments.tables.trials import Trial, _train
from coalign.methods.table import Arm, Table
from coalign.runs.folder import read_config
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate


@pytest.fixture
def small(monkeypatch, tmp_path, without_run_reports):
    """A table of two arms whose trials run in this process with a tiny model. Returns the list of trained (arm, seed)."""
    model, ran = str(tiny.write_model(tmp_path / "model")), []
    tiny.write_pairs(tmp_path / "photos", 96)
    sweep = Table(
        "a test",
        {"one": Arm("clip"), "other, longer": Arm("clip", {"multi_positive": False}, epochs=2)},
        epochs=1,
        batch_size=16,
        image_size=32,
        val_fraction=0.2,
        classes=("red", "green = grass"),
        probe=True,
    )
    original = Table.config

    def config(self, arm, seed, num_pairs):
        return replace(original(self, arm, seed, num_pairs), model=model, context_length=12, evals=1)

    def run(trials, jobs):
        failures = []
        for trial in trials:
            ran.append((trial.arm, trial.seed))
            try:
                _train(trial, 1)
            except UserError as error:
                failures.append(f"{trial.folder.name} ({error})")
        return failures

    monkeypatch.setattr(Table, "config", config)
    monkeypatch.setitem(registry.TABLES, "test", sweep)
    monkeypatch.setattr(module, "run_trials", run)
    monkeypatch.chdir(tmp_path)
    return ran


def test_arms_and_seeds_are_trained_once_and_compared_by_arm(small, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["reproduce", "test", "--data", str(tmp_path / "photos"), "--out", str(out), "--seeds", "2"]
    assert cli.main(command) == 0
    assert small == [("one", 0), ("other, longer", 0), ("one", 1), ("other, longer", 1)]
    assert "other, longer" in capsys.readouterr().out
    assert (tmp_path / "out/table.html").exists()
    values = json.loads((tmp_path / "out/table.json").read_text())
    assert [(group["name"], group["seeds"]) for group in values["groups"]] == [
        ("one", [0, 1]),
        ("other, longer", [0, 1]),
    ]
    first, longer = values["groups"]
    assert longer["steps"] == 2 * first["steps"]
    assert "zeroshot.acc1" in longer["metrics"]
    tasks = [json.loads((out / f"one-seed{seed}/results.json").read_text())["tasks"] for seed in (0, 1)]
    gaps = [results["retrieval"]["metrics"]["modality_gap"]["value"] for results in tasks]
    gap = first["metrics"]["retrieval.modality_gap"]
    assert (gap["kind"], gap["over_items"], gap["value"]) == ("distance", None, pytest.approx(sum(gaps) / 2))
    again = evaluate(str(out / "one-seed0"), [f"probe:{tmp_path / 'photos'}"], EvalConfig(classes=out / "classes.txt"))
    probed = again[f"probe:{tmp_path / 'photos'}"]["metrics"]
    assert tasks[0]["probe"]["metrics"] == probed
    assert probed["acc1"]["value"] > 0.5
    assert 0 < first["metrics"]["probe.acc1"]["value"] <= 1
    assert longer["metrics"]["retrieval.image_to_text.r1"]["difference_over_seeds"] is not None
    text = json.dumps(values)  # results hold no local paths
    assert str(out) not in text
    assert str(tmp_path / "photos") not in text

    assert cli.main(command) == 0
    assert len(small) == 4  # finished trials are kept

    sweep = registry.TABLES["test"]
    longer = replace(sweep, arms={**sweep.arms, "one": Arm("clip", epochs=3)})
    registry.TABLES["test"] = longer  # the fixture restores the original
    assert cli.main(command) == 2
    assert "one-seed0 holds a run whose epochs differs from this table's" in capsys.readouterr().err


def test_results_are_compared_with_the_paper(small, tmp_path, capsys, monkeypatch):
    sweep = replace(
        registry.TABLES["test"],
        arms={"one": Arm("clip", paper=20.5), "two": Arm("clip", epochs=2, paper=30), "three": Arm("slip", paper=25)},
        paper_metric="top-1 of its Table 9",
        claims=(("one", "two"),),
        classes=(),
        probe=False,
    )
    monkeypatch.setitem(registry.TABLES, "test", sweep)
    assert cli.main(["reproduce", "test", "--data", "photos", "--out", "out", "--seeds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "Paper: top-1 of its Table 9" in printed
    assert "two is better than one, by Image → text R@10: undecided" in printed
    values = json.loads((tmp_path / "out/table.json").read_text())
    name = "retrieval.image_to_text.r10"
    ours = {group["name"]: group["metrics"][name]["value"] for group in values["groups"]}
    place = {arm: sorted(ours.values()).index(value) for arm, value in ours.items()}
    if len(set(ours.values())) == 3:  # without ties: 1 - 6 Σ d² / (n (n² - 1))
        squares = sum((place[arm] - rank) ** 2 for arm, rank in (("one", 0), ("three", 1), ("two", 2)))
        assert values["rank_correlation"] == {name: pytest.approx(1 - 6 * squares / 24)}
    else:
        assert values["rank_correlation"] == {name: None}
    assert values["arms"]["two"]["paper"] == 30


def test_finished_trials_of_other_data_are_refused(small, tmp_path, capsys):
    """They are not shown as those of the data, or columns, that are given now."""
    tiny.write_pairs(tmp_path / "drawings", 96)
    command = ["reproduce", "test", "--out", "out", "--seeds", "1", "--data"]
    assert cli.main([*command, "photos"]) == 0
    for options, changed in ((["drawings"], "data"), (["photos", "--caption-column", "title"], "reading")):
        assert cli.main([*command, *options]) == 2
        assert f"one-seed0 holds a run whose {changed} differs from this table's" in tiny.error_line(capsys)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    (tmp_path / "moved").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "moved/photos")
    assert cli.main([*command, "moved/photos"]) == 0
    assert len(small) == 2


def test_a_trial_that_fails_stops_no_other(small, tmp_path):
    folder = Trial(registry.TABLES["test"], "one", 0, "photos", tmp_path / "out").folder
    folder.parent.mkdir()
    folder.write_text("in the way")
    with pytest.raises(UserError, match=r"1 of 4 trials failed: one-seed0 \(.* is a file"):
        reproduce("test", "photos", "out", seeds=2)
    assert len(small) == 4
    assert len(json.loads((tmp_path / "out/table.json").read_text())["groups"]) == 2


def test_shared_features_are_kept_until_no_trial_needs_them(tmp_path, monkeypatch):
    """Another process may run the other arms of the table."""
    start, done = {"image_tuning": "locked"}, []
    sweep = Table(
        "", {"scratch": Arm("clip"), "one": Arm("clip", start=start), "other": Arm("mcd", start=start)}, epochs=1
    )
    monkeypatch.setattr(module, "finished", lambda trial: trial.label in done)
    monkeypatch.setattr(module, "run_trials", lambda trials, jobs: done.extend(trial.label for trial in trials) or [])
    (tmp_path / "features").mkdir()
    for arm, kept in (("one", True), ("other", False)):
        assert module.run_table(sweep, [arm], 2, 1, "photos", tmp_path) == []
        assert (tmp_path / "features").exists() == kept


def test_wrong_arguments_are_reported(small, tmp_path, capsys):
    for words, message in (
        (["nothing"], "There is no table named"),
        (["test", "--arms", "thing"], "has no arm 'thing'"),
        (["test", "--jobs", "0"], "must be at least 1"),
    ):
        assert cli.main(["reproduce", *words, "--data", "photos", "--out", "out"]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["reproduce", "test"]) == 2
    assert "The table test needs --data and --out" in capsys.readouterr().err
    assert cli.main(["reproduce"]) == 0
    assert "test\n    a test\n" in capsys.readouterr().out
    (tmp_path / "file").write_text("in the way")
    assert cli.main(["reproduce", "test", "--data", "photos", "--out", "file"]) == 2
    assert "cannot be written to file" in capsys.readouterr().err
    assert small == []


def test_data_that_does_not_fit_the_table_is_reported(small, tmp_path, capsys, monkeypatch):
    """The error names the column or split that is missing, and data that has it, but no option that the command does not have."""
    sweep = registry.TABLES["test"]
    of_splits = tmp_path / "parts"
    for number, split in enumerate(("train", "val", "test")):
        tiny.write_pairs(of_splits / split, 20, number)
    (tmp_path / "pairs.jsonl").write_text(
        "".join(
            json.dumps({"image": str(path), "caption": path.stem, "concept": path.stem, "split": path.parts[-3]}) + "\n"
            for path in sorted(of_splits.rglob("*.png"))
        )
    )
    for data, settings, problem in (
        ("photos", {"val_by": "concept"}, "holds out values of the column 'concept', which photos does not have"),
        ("photos", {"test_splits": ("test",)}, "evaluates on the split 'test', which photos does not have"),
        (
            "pairs.jsonl",
            {"val_by": "concept", "test_splits": ("test",)},
            "holds out values of the column 'concept', but pairs.jsonl has its own validation split",
        ),
    ):
        monkeypatch.setitem(registry.TABLES, "test", replace(sweep, data="the file that has it", **settings))
        assert cli.main(["reproduce", "test", "--data", data, "--out", "out", "--seeds", "1"]) == 2
        assert tiny.error_line(capsys) == f"coalign: The table test {problem}; use the file that has it.\n"
    assert small == []


def of_oner():
    """An arm of OneR, and one that evaluates its weights with another pooling."""
    arms = {
        "one, anew": Arm("oner", {"pooling": "cls"}, weights_of="one"),
        "one": Arm("oner", {"similarity": "projector"}),
    }
    return replace(registry.TABLES["test"], arms=arms, classes=(), probe=False)


def test_an_arm_evaluates_the_weights_of_another(small, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TABLES, "test", of_oner())
    command = ["reproduce", "test", "--data", "photos", "--out", "out", "--seeds", "1", "--arms", "one, anew"]
    assert cli.main(command) == 0
    assert small == [("one", 0), ("one, anew", 0)]  # it needs the other arm
    one, anew = (tmp_path / f"out/{name}-seed0" for name in ("one", "one-anew"))
    assert (one / "last/model.safetensors").exists()
    for path in (*(one / "last").iterdir(), one / "metrics.jsonl", one / "tokenizer.json"):
        assert (anew / path.relative_to(one)).read_bytes() == path.read_bytes()
    assert "step 1/" in (tmp_path / "out/one-seed0.log").read_text()
    assert "step 1/" not in (tmp_path / "out/one-anew-seed0.log").read_text()
    config = read_config(anew).config
    assert (config.method_config.pooling, config.method_config.similarity) == ("cls", "projector")
    original = read_config(one).config
    assert config == replace(original, method_config=replace(original.method_config, pooling="cls"))
    trained, evaluated = (json.loads((folder / "results.json").read_text()) for folder in (one, anew))
    assert trained["run"]["step"] == evaluated["run"]["step"] > 0
    assert trained["tasks"] != evaluated["tasks"]
    again = evaluate(anew, ["retrieval:photos"])["retrieval:photos"]
    gaps = [results["metrics"]["modality_gap"]["value"] for results in (evaluated["tasks"]["retrieval"], again)]
    assert gaps[0] == pytest.approx(gaps[1], rel=1e-5)
    values = json.loads((tmp_path / "out/table.json").read_text())
    assert [group["name"] for group in values["groups"]] == ["one, anew", "one"]

    assert cli.main(command) == 0
    assert len(small) == 2
    (anew / "results.json").unlink()  # interrupted after its weights were copied
    assert cli.main(command) == 0
    assert small[2:] == [("one, anew", 0)]
    assert json.loads((anew / "results.json").read_text())["tasks"] == evaluated["tasks"]


def test_an_arm_without_the_weights_it_evaluates_fails(small, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.TABLES, "test", of_oner())
    (tmp_path / "out").mkdir()
    (tmp_path / "out/one-seed0").write_text("in the way")
    message = r"one-seed0 \(.* is a file.*; one-anew-seed0 \(one-seed0, whose weights it evaluates, has not finished\)"
    with pytest.raises(UserError, match=f"2 of 2 trials failed: {message}"):
        reproduce("test", "photos", "out", seeds=1, arms=["one", "one, anew"])
    assert not (tmp_path / "out/one-anew-seed0").exists()


def test_weights_are_trained_before_they_are_evaluated(monkeypatch, tmp_path, capsys):
    arms = {"anew": Arm("oner", weights_of="one"), "clip": Arm("clip"), "one": Arm("oner")}
    sweep, started, done, waiting = Table("a test", arms, epochs=1), [], [], threading.Event()

    def run(trial, threads):
        started.append((trial.arm, set(done)))
        waiting.wait(0.1)
        done.append((trial.arm, trial.seed))

    monkeypatch.setattr(trials, "_in_a_process", run)
    all_trials = [Trial(sweep, arm, seed, "photos", tmp_path) for seed in range(2) for arm in arms]
    assert trials.run_trials(all_trials, 3) == []
    trained = {(arm, seed) for arm in ("clip", "one") for seed in range(2)}
    assert [before >= trained for arm, before in started if arm == "anew"] == [True, True]
    numbers = [line.split(":")[0] for line in capsys.readouterr().out.splitlines()]
    assert numbers == [f"{number} of 6" for number in range(1, 7)]


@pytest.mark.slow
def test_trials_run_in_separate_processes(tmp_path):
    """Without fakes: two seeds of one arm at once, on few scenes."""
    with pytest.raises(UserError, match=r"1 of 1 trials failed: .*fewer than --batch-size"):
        reproduce("scenes", "scenes:50", tmp_path, seeds=1, arms=["clip"])
    comparison = reproduce("scenes", "scenes:128", tmp_path, seeds=2, jobs=2, arms=["clip"])
    assert comparison is not None
    (group,) = comparison.groups
    assert group.seeds == [0, 1]
    assert group.metrics["foils.mean_per_kind"].chance == 0.5
    assert {"foils.colour.accuracy", "zeroshot.acc1"} <= group.metrics.keys()


@pytest.mark.slow
@pytest.mark.parametrize("by", ["Ctrl-C", "SIGKILL of the parent"])
def test_an_interrupted_table_resumes(tmp_path, by):
    command = [sys.executable, "-m", "coalign", "reproduce", "scenes", "--data", "scenes:512"]
    command += ["--out", str(tmp_path), "--seeds", "1", "--jobs", "1", "--arms", "clip", "mcd"]
    process = subprocess.Popen(
        command, start_new_session=True, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored if the tests run in the background
    )  # fmt: skip
    log = tmp_path / "clip-seed0.log"
    deadline = time.monotonic() + 240
    while not (log.exists() and "step 1/" in log.read_text()):
        assert time.monotonic() < deadline, "the first trial did not begin"
        time.sleep(0.2)
    if by == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    else:
        process.kill()
    _, errors = process.communicate(timeout=300)  # the trial holds the pipe open, too
    assert process.returncode == (cli.INTERRUPTED if by == "Ctrl-C" else -signal.SIGKILL)
    assert "Traceback" not in errors
    assert "Interrupted at step" in log.read_text()
    assert (tmp_path / "clip-seed0/last").is_dir()
    assert not (tmp_path / "mcd-seed0").exists()  # the second trial was not begun
    reproduce("scenes", "scenes:512", tmp_path, seeds=1, jobs=2, arms=["clip"])
    assert "resuming at step" in log.read_text()
    assert (tmp_path / "clip-seed0/results.json").exists()


def test_a_trial_stops_if_its_parent_died_during_startup():
    gone = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    code = f"""
import multiprocessing, time
from coalign.experiments.tables import trials
trials._train = lambda trial, threads: time.sleep(120)
trials._report(None, 1, {int(gone.stdout)}, multiprocessing.Pipe()[1])
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=100).returncode == -signal.SIGTERM
