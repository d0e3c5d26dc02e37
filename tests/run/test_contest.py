"""Methods on one's own data: trained on equal terms, judged on the same pairs, and how many fewer pairs they need."""

import json
import math
from dataclasses import replace

import pytest
import tiny

from coalign import cli
from coalign.errors import UserError
from coalign.recipes.sweep import Table
from coalign.run import contest as module
from coalign.run import reproduce
from coalign.run.contest import contest
from coalign.run.efficiency import efficiencies, factor
from coalign.run.profile import Profile


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Trials run in this process with a tiny model; what was trained is listed."""
    model, ran = str(tiny.write_model(tmp_path / "model")), []
    original = Table.config

    def config(self, arm, seed, num_pairs):
        found = original(self, arm, seed, num_pairs)
        return replace(found, model=model, context_length=12, evals=1, batch_size=8, image_size=32, batch_norm_group=8)

    def run(trials, jobs, console):
        for trial in trials:
            ran.append((trial.arm, trial.seed))
            reproduce._train(trial, 1)
        return []

    monkeypatch.setattr(Table, "config", config)
    monkeypatch.setattr(module, "run_trials", run)
    monkeypatch.chdir(tmp_path)
    tiny.write_pairs(tmp_path / "photos", 240)
    return ran


def test_methods_fractions_and_seeds_are_trained_once_and_judged(quick, tmp_path, capsys):
    command = [
        "compare",
        "--data",
        "photos",
        "--out",
        "out",
        "--methods",
        "slip",
        "--epochs",
        "6",
        "--fractions",
        "0.5",
        "1",
    ]
    assert cli.main([*command, "--json", "figures.json"]) == 0
    arms = ["clip", "slip", "clip, 50 %", "slip, 50 %"]
    assert quick == [(arm, seed) for seed in (0, 1) for arm in arms]
    said = capsys.readouterr().out
    assert said.count("On these pairs ") == 1
    assert "Report: out/contest.html" in said
    values = json.loads((tmp_path / "out/contest.json").read_text())
    assert json.loads((tmp_path / "figures.json").read_text())["advice"] == values["advice"] in said
    page = (tmp_path / "out/contest.html").read_text()
    assert values["advice"] in page
    assert "By the number of pairs" in page
    assert values["by_fraction"]["slip"].keys() == {"0.5", "1.0"}
    assert values["efficiency"].keys() <= {"slip"}
    groups = {group["name"]: group for group in values["groups"]}
    assert list(groups) == arms
    steps = {group["steps"] for group in groups.values()}
    assert max(steps) - min(steps) < 0.05 * max(
        steps
    )  # as many pairs seen; not equal, for this batch is not the table's
    assert groups["clip"]["settings"]["num_train"] == pytest.approx(
        2 * groups["clip, 50 %"]["settings"]["num_train"], abs=1
    )

    assert cli.main(command) == 0
    assert len(quick) == 8  # what is finished stays
    for other in (["--seeds", "3"], ["--data", "elsewhere"]):
        assert cli.main([*command, *other]) == 2
        assert "was started with other settings" in capsys.readouterr().err
    (tmp_path / "out/plan.json").write_text("{")
    assert cli.main(command) == 2
    assert "is not what a contest writes" in capsys.readouterr().err


def test_time_is_shared_by_what_each_method_does_in_it(quick, tmp_path, monkeypatch):
    """Two methods and two seeds at two at once: half of the time each, less what a trial takes beside."""
    speed = {"clip": 10.0, "slip": 4.0}
    monkeypatch.setattr(module, "profile", lambda data, settle, steps: Profile(1.0, {}, speed[settle(64).method], []))
    contest("photos", "out", ["slip"], minutes=4, jobs=2)
    epochs = json.loads((tmp_path / "out/plan.json").read_text())["epochs"]
    number = json.loads((tmp_path / "out/clip-seed0/config.json").read_text())["num_train"]
    assert epochs["clip"] == pytest.approx((120 - module.OVERHEAD) * 10 / number)
    assert epochs["slip"] == pytest.approx(epochs["clip"] * 0.4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--methods", "simclr"], "no method named 'simclr'"),
        (["--methods", "clip"], "another method than clip"),
        (["--fractions", "2"], "A fraction is 2"),
        (["--fractions", "0.01", "--methods", "slip", "--epochs", "1"], "less than two batches"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--minutes", "1"], "too little"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_trained(quick, capsys, options, said):
    assert cli.main(["compare", "--data", "photos", "--out", "out", *options]) == 2
    assert said in capsys.readouterr().err
    assert not quick


def test_runs_or_data(quick, capsys):
    for words in (["compare"], ["compare", "runs/a", "--data", "photos", "--out", "out"]):
        assert cli.main(words) == 2
        assert "Give either two runs or more" in capsys.readouterr().err
    assert cli.main(["compare", "--data", "photos"]) == 2
    assert "--out" in capsys.readouterr().err


# ---------------------------------------------------------------- how many fewer pairs

FRACTIONS = [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([10, 20, 40], 1.0),  # CLIP itself
        ([10, 40, 60], 2.0),  # reached with half of the pairs
        ([20, 30, 50], 1 / math.sqrt(0.5)),  # half way between half and all, by their logarithms
        ([45, 50, 60], 4.0),  # ahead with the least that was tried
        ([10, 15, 20], 0.5),  # CLIP has its score with half of the pairs
        ([5, 20, 30], math.sqrt(0.5)),
        ([1, 2, 3], 0.25),
    ],
)
def test_the_factor_is_where_the_curves_meet(scores, expected):
    assert factor(FRACTIONS, scores, [10, 20, 40]) == pytest.approx(expected)


@pytest.mark.parametrize(("scores", "bound"), [([45, 50, 60], True), ([45, 30, 50], False), ([1, 2, 3], True)])
def test_a_factor_at_the_least_fraction_is_a_bound(scores, bound):
    curves = {"mcd": {f: {0: x} for f, x in zip(FRACTIONS, scores)}}
    curves["clip"] = {f: {0: x} for f, x in zip(FRACTIONS, [10, 20, 40])}
    assert efficiencies(curves)["mcd"].bound == bound


def test_a_factor_has_an_interval_where_every_seed_has_a_curve():
    curves = {"clip": {f: {0: x, 1: x + 2} for f, x in zip(FRACTIONS, [10, 20, 40])}}
    curves["mcd"] = {f: {0: x, 1: x} for f, x in zip(FRACTIONS, [10, 40, 60])}
    found = efficiencies(curves)["mcd"]
    low, high = found.over_seeds
    assert low < found.factor < high
    del curves["mcd"][0.5][1]
    assert efficiencies(curves)["mcd"].over_seeds is None
    del curves["mcd"][0.5]
    assert not efficiencies(curves)


def test_a_dip_counts_from_above():
    """What was reached with fewer pairs, and lost with more, is not reached yet."""
    assert factor(FRACTIONS, [45, 30, 50], [10, 20, 40]) == pytest.approx(1 / math.sqrt(0.5))


def test_a_trial_that_fails_is_told_and_the_rest_judged(quick, monkeypatch, capsys):
    run = module.run_trials

    def failing(trials, jobs, console):
        run([trial for trial in trials if trial.arm != "mcd"], jobs, console)
        return ["mcd-seed0 (out of memory)"]

    monkeypatch.setattr(module, "run_trials", failing)
    result = contest("photos", "out", ["slip", "mcd"], epochs=1, seeds=1)
    assert [group.name for group in result.comparison.groups] == ["clip", "slip"]
    assert "failed: mcd-seed0 (out of memory)" in capsys.readouterr().out


def test_what_has_learnt_nothing_is_not_called_best(quick):
    result = contest("photos", "out", ["slip"], epochs=0.2, fractions=(0.5,), seeds=1)
    assert result.advice.startswith("No method is told from chance yet")
    assert not result.efficiency


def test_nothing_finished_is_an_error(quick, monkeypatch):
    monkeypatch.setattr(module, "run_trials", lambda *_: ["clip-seed0 (no)"])
    with pytest.raises(UserError, match="nothing to compare"):
        contest("photos", "out", ["slip"], epochs=1)
