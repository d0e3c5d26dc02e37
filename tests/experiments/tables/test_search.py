"""`coalign reproduce` of a table with a search: equal budgets, choice on the held-out pairs, resumption, one evaluation on test."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.config import DataConfig
from coalign.errors import NotFinite, UserError
from coalign.experiments.tables import registry, search, trials
from coalign.experiments.tables import reproduce as module
from coalign.experiments.tables.trials import Trial, _train
from coalign.methods.search import Choice, Search
from coalign.methods.table import Arm, Table, by_fraction
from coalign.runs.folder import read_config, read_results
from coalign.workflows.train import train as train_module

ARMS = by_fraction({"clip": Arm("clip"), "other": Arm("clip", {"temperature": 0.2})}, (1.0, 0.5))
SEARCH = Search(epochs=(1, 2), trials=2)


def write_data(folder):
    """Writes pairs with a test split."""
    tiny.write_pairs(folder, 128)
    images = sorted(folder.rglob("*.png"))
    rows = [
        {
            "image": str(path.relative_to(folder)),
            "caption": path.stem.replace("_", " "),
            "split": "test" if number % 4 == 0 else "train",
        }
        for number, path in enumerate(images)
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "pairs.jsonl"


@pytest.fixture
def table(monkeypatch, tmp_path, without_run_reports):
    """A table with a search whose trials run in this process with a tiny model. Returns the labels of the trials that ran."""
    model, ran = str(tiny.write_model(tmp_path / "model")), []
    write_data(tmp_path / "photos")
    sweep = Table(
        "a test",
        ARMS,
        epochs=99,
        search=SEARCH,
        batch_size=16,
        image_size=32,
        val_fraction=0.2,
        evals=1,
        test_splits=("test",),
        claims=(("clip", "other"),),
        headline_metrics=("retrieval_test.r10", "retrieval.image_to_text.r10"),
    )
    original, evaluate = Table.config, train_module.evaluate_held_out

    def config(self, arm, seed, num_pairs):
        return replace(original(self, arm, seed, num_pairs), model=model, context_length=12)

    def run(trials, jobs):
        failures = []
        for trial in trials:
            ran.append(trial.label)
            try:
                _train(trial, 1)
            except UserError as error:
                failures.append(f"{trial.folder.name} ({error})")
        return failures

    def evaluate_held_out(method, config, pairs, tokenizer, name):
        if "-trial" in name:
            assert not pairs.test_splits, "a search evaluates no test split"
        return evaluate(method, config, pairs, tokenizer, name)

    monkeypatch.setattr(Table, "config", config)
    monkeypatch.setitem(registry.TABLES, "test", sweep)
    for each in (module, search):
        monkeypatch.setattr(each, "run_trials", run)
    monkeypatch.setattr(train_module, "evaluate_held_out", evaluate_held_out)
    monkeypatch.chdir(tmp_path)
    return ran


COMMAND = ["reproduce", "test", "--data", "photos/pairs.jsonl", "--out", "out", "--seeds", "2"]


def test_a_search_chooses_settings_and_lengths_for_the_trials_of_a_table(table, tmp_path, capsys, monkeypatch):
    stopped = []

    def stop(*arguments, **options):  # at the second length of the first trial that is extended
        if len(stopped) == 4:
            raise KeyboardInterrupt
        stopped.append(arguments[1].name)
        return train_module.train(*arguments, **options)

    monkeypatch.setattr(search, "train", stop)
    assert cli.main(COMMAND) == cli.INTERRUPTED
    monkeypatch.setattr(search, "train", train_module.train)
    assert capsys.readouterr().out.count("Device: ") == 1
    assert stopped == ["clip-trial1", "other-trial1", "clip-trial2", "other-trial2"]
    better = {arm: better_half(tmp_path / "out/search", arm) for arm in ("clip", "other")}
    assert table[-1] == better["clip"]
    table.clear()

    assert cli.main([*COMMAND, "--track", "retrieval:photos/pairs.jsonl"]) == 0
    assert set(table[:2]) == set(better.values())
    assert table[2:4] == ["clip, 50 %, trial 1", "other, 50 %, trial 1"]
    assert table[4:] == [f"{arm}, seed {seed}" for seed in (0, 1) for arm in ARMS]
    printed = capsys.readouterr().out
    assert "other is better than clip, by Test: R@10, mean of both directions: " in printed
    assert printed.count("Device: ") == 1  # of both lengths of the search, and of the trials
    assert sorted(path.suffix for path in (tmp_path / "out/search").iterdir()) == [".json"] * 6 + [".log"] * 6
    for number in (1, 2):
        log = (tmp_path / f"out/search/clip-trial{number}.log").read_text()
        extended = f"clip, trial {number}" in better.values()
        assert log.count("Extending the run from 1 to 2 epochs") == extended

    found = json.loads((tmp_path / "out/search.json").read_text())
    values = json.loads((tmp_path / "out/table.json").read_text())
    assert values["search"] == found
    assert str(tmp_path / "out") not in json.dumps(values)
    assert str(tmp_path / "photos") not in json.dumps(values)
    assert found["arms"].keys() == ARMS.keys()
    check_budget(found["arms"])
    for arm, of_arm in found["arms"].items():
        best = max(each["score"] for trial in of_arm["trials"] for each in trial["lengths"].values())
        chosen = of_arm["chosen"]
        length = f"{chosen['epochs']:g}"
        (scores,) = [trial["lengths"] for trial in of_arm["trials"] if trial["settings"] == chosen["settings"]]
        assert scores[length]["score"] == best
        assert of_arm["best_of"][-1] == max(trial["lengths"]["1"]["score"] for trial in of_arm["trials"])
        whole = found["arms"][arm.removesuffix(", 50 %")]
        assert chosen["settings"] == whole["chosen"]["settings"]
        check_trial(tmp_path / f"out/{arm.replace(', ', '-').replace(' ', '-')}-seed1", chosen, of_arm)
    check_table(values)
    check_kept(table, tmp_path, capsys)


def better_half(folder, arm):
    """The label of the better of the arm's two trials."""
    found = [json.loads((folder / f"{arm}-trial{number}.json").read_text())["lengths"] for number in (1, 2)]
    assert [lengths.keys() for lengths in found] == [{"1"}, {"1"}]
    return f"{arm}, trial {1 if found[0]['1']['score'] >= found[1]['1']['score'] else 2}"


def check_budget(arms):
    """Every arm has the same draws, lengths and samples."""
    draws = [asdict(each) for each in SEARCH.draws()]
    for arm in ("clip", "other"):
        assert [trial["settings"] for trial in arms[arm]["trials"]] == draws
        assert sorted(len(trial["lengths"]) for trial in arms[arm]["trials"]) == [1, 2]
    samples = {
        (length, each["samples_seen"])
        for of_arm in arms.values()
        for trial in of_arm["trials"]
        for length, each in trial["lengths"].items()
    }
    assert len(samples) == 2


def check_trial(folder, chosen, of_arm):
    """A trial of the table has the chosen settings, the length in steps and the warm-up of the search."""
    saved, results = read_config(folder), read_results(folder)
    config, steps = saved.config, results["run"]["step"]
    length = f"{chosen['epochs']:g}"
    (samples,) = {each["lengths"][length]["samples_seen"] for each in of_arm["trials"] if length in each["lengths"]}
    assert steps * config.batch_size == samples
    assert config.optimizer.schedule == "constant"
    assert config.optimizer.weight_decay == chosen["settings"]["weight_decay"]
    assert config.optimizer.lr == pytest.approx(2e-3 * chosen["settings"]["lr_factor"])
    assert config.method_config.image_view.crop_scale[0] == pytest.approx(0.5 ** chosen["settings"]["crop"])
    shortest = round(SEARCH.epochs[0] / chosen["epochs"] * steps)
    assert config.optimizer.warmup_steps == round(0.1 * shortest)
    assert {"retrieval", "retrieval_test"} <= results["tasks"].keys()


def check_table(values):
    for claim, metric in zip(values["claims"], ("retrieval_test.r10", "retrieval.image_to_text.r10")):
        assert (claim["claim"], claim["metric"]) == ("other is better than clip", metric)
        low, high = claim["interval"]
        assert low <= claim["difference"] <= high
        assert 0 < claim["p"] <= 1
        assert claim["verdict"] == "undecided" if claim["p"] >= 0.05 else claim["verdict"] != "undecided"
    clip, other = (
        [group["metrics"][f"retrieval_test.{side}.r10"]["value"] for side in ("image_to_text", "text_to_image")]
        for group in values["groups"][:2]
    )
    assert values["claims"][0]["difference"] == pytest.approx(sum(other) / 2 - sum(clip) / 2)
    assert values["by_fraction"]["retrieval_test"].keys() == {"clip", "other"}
    low, high = values["efficiency"]["retrieval_test"]["other"]["interval"]
    assert low <= values["efficiency"]["retrieval_test"]["other"]["factor"] <= high
    tracked = values["groups"][0]["metrics"]["retrieval:photos/pairs.jsonl.image_to_text.r10"]
    assert tracked["title"] == "retrieval:photos/pairs.jsonl: image → text R@10"
    assert tracked["over_items"] is not None
    assert values["commands"] == [
        "coalign reproduce test --data pairs.jsonl --seeds 2 --jobs 1 --track retrieval:pairs.jsonl"
    ]


def check_kept(ran, tmp_path, capsys):
    """What is finished is kept, and not mixed with the trials of another search."""
    ran.clear()
    capsys.readouterr()
    assert cli.main([*COMMAND, "--arms", "clip", "--track", "retrieval:photos"]) == 0
    assert ran == []
    printed = capsys.readouterr().out
    assert "Trained without all tasks of --track" in printed
    assert "Device: " not in printed
    assert len(json.loads((tmp_path / "out/table.json").read_text())["commands"]) == 2
    sweep = registry.TABLES["test"]
    registry.TABLES["test"] = replace(sweep, search=replace(SEARCH, seed=1))  # the fixture restores it
    assert cli.main(COMMAND) == 2
    assert "clip-trial1.json holds a trial whose " in capsys.readouterr().err
    assert cli.main([*COMMAND, "--scale", "paper", "--track", "retrieval:photos"]) == 2
    assert "omit it" in capsys.readouterr().err


def test_records_belong_to_a_split(table, tmp_path):
    """A record is of the split that its table holds out."""
    sweep, of = registry.TABLES["test"], ("photos/pairs.jsonl", tmp_path / "out")
    (tmp_path / "out").mkdir()
    search.run_search(sweep, ["clip"], *of, 1)
    assert "clip" in search.searches(sweep, *of)
    others = [{"test_fraction": 0.1}, {"val_fraction": 0.1}, {"val_by": "split"}]
    for changes in (*others, {"reading": DataConfig(caption_column=("title",))}):
        with pytest.raises(UserError, match=f"a trial whose {next(iter(changes))} differs from this table's"):
            search.searches(replace(sweep, **changes), *of)
    for record in (tmp_path / "out/search").glob("*.json"):
        values = json.loads(record.read_text())
        del values["config"]["method"]
        record.write_text(json.dumps(values))
    with pytest.raises(UserError, match="cannot be read; delete it"):
        search.searches(sweep, *of)


def test_settings_that_diverge_are_not_chosen(table, tmp_path, monkeypatch, capsys):
    def diverge(data, out, config, **options):
        lr = config(96).optimizer.lr
        result = train_module.train(data, out, config, **options)
        if lr == pytest.approx(2e-3 * max(each.lr_factor for each in SEARCH.draws())) or every:
            raise NotFinite("The loss was not finite")
        return result

    every = False
    monkeypatch.setattr(search, "train", diverge)
    lowest = min(SEARCH.draws(), key=lambda each: each.lr_factor)
    assert cli.main([*COMMAND[:-1], "1", "--arms", "clip"]) == 0
    found = json.loads((tmp_path / "out/search.json").read_text())["arms"]["clip"]
    assert found["chosen"]["settings"] == asdict(lowest)
    assert sorted(len(trial["lengths"]) for trial in found["trials"]) == [0, 2]
    assert [trial.get("diverged", "") for trial in found["trials"]].count("The loss was not finite") == 1
    assert found["best_of"][0] == pytest.approx(found["best_of"][1] / 2)  # the score of the other trial is 0
    every = True
    assert cli.main([*COMMAND[:-1], "1", "--arms", "other"]) == 2
    assert "other (all trials of its search diverged)" in tiny.error_line(capsys)
    assert json.loads((tmp_path / "out/search.json").read_text())["arms"].keys() == {"clip"}
    assert not (tmp_path / "out/search/other-trial1").exists()
    every = False
    table.clear()
    assert cli.main([*COMMAND[:-1], "1", "--arms", "clip, 50 %", "other, 50 %"]) == 2  # the others go on
    assert table == ["clip, 50 %, trial 1", "clip, 50 %, seed 0"]
    assert "other (all trials of its search diverged)" in tiny.error_line(capsys)


def test_fractions_of_every_table_with_a_search_have_an_arm_on_all_pairs():
    for sweep in registry.TABLES.values():
        if sweep.search:
            for name, arm in sweep.arms.items():
                assert sweep.arms[sweep.whole(name)].train_fraction == 1
                assert sweep.whole(name) == name.partition(",")[0]
                assert sweep.search.epochs == tuple(sorted(sweep.search.epochs))
                assert replace(arm, train_fraction=1.0) == sweep.arms[sweep.whole(name)]


def test_locked_arms_draw_no_crop_and_have_the_lengths_of_the_search(monkeypatch, tmp_path):
    monkeypatch.setattr(trials, "pretrained_towers", lambda settings: dict.fromkeys(settings, "a tower"))
    sweep = registry.TABLES["headline-emoji-concepts"]
    drawn = sweep.search.draws()[0]
    for arm, pairs, epochs in (("locked", 4000, 40), ("locked, 12.5 %", 500, 40 * 31 / 3)):
        config = Trial(sweep, arm, 0, "emoji", tmp_path, Choice(drawn, 40, 20)).config(pairs)
        assert config.epochs == pytest.approx(epochs)
        assert config.optimizer.lr == pytest.approx(1e-3 * drawn.lr_factor)
        assert config.optimizer.warmup_steps == round(0.1 * 20 * 31)
        assert (config.image_tuning, config.method_config.image_view.crop_scale) == ("locked", (0.5, 1.0))


SCRIPT = """
import sys
from pathlib import Path

from coalign.experiments.tables.search import run_search
from coalign.methods.search import Search
from coalign.methods.table import Arm, Table

if __name__ == "__main__":
    sweep = Table("a test", {"clip": Arm("clip")}, epochs=1, search=Search((2, 4), trials=1), batch_size=16, image_size=32)
    Path(sys.argv[1]).mkdir(exist_ok=True)
    assert not run_search(sweep, ["clip"], "photos", Path(sys.argv[1]), 1)
"""


@pytest.mark.slow
def test_a_killed_search_resumes(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    tiny.write_pairs(tmp_path / "photos", 96)
    command = [sys.executable, "script.py"]

    def start(out):
        return subprocess.Popen(
            [*command, out], cwd=tmp_path, start_new_session=True, stderr=subprocess.PIPE, text=True
        )

    process, deadline = start("killed"), time.monotonic() + 600
    first = tmp_path / "killed/search/clip-trial1.json"
    while not (first.exists() and json.loads(first.read_text())["lengths"]):
        assert time.monotonic() < deadline, "the first length was not scored"
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (tmp_path / "killed/search.json").exists()
    found = {}
    for out in ("killed", "whole"):
        process = start(out)
        _, errors = process.communicate(timeout=900)
        assert process.returncode == 0, errors
        found[out] = json.loads((tmp_path / out / "search.json").read_text())["arms"]["clip"]
    assert found["killed"] == found["whole"]
