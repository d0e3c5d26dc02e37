"""`coalign benchmark`: methods trained on equal terms, compared on the same held-out pairs, and their data efficiency."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.config import DataConfig
from coalign.errors import UserError
from coalign.experiments import benchmark as module
from coalign.experiments.benchmark import benchmark
from coalign.experiments.data_efficiency import efficiencies, factor
from coalign.experiments.trials import _train
from coalign.methods.table import Table
from coalign.runs.folder import read_config
from coalign.workflows.train.profile import Profile


@pytest.fixture
def quick(monkeypatch, tmp_path, without_run_reports):
    """Runs trials in this process with a tiny model. Returns the list of trained (arm, seed)."""
    model, ran = str(tiny.write_model(tmp_path / "model")), []
    original = Table.config

    def config(self, arm, seed, num_pairs):
        found = original(self, arm, seed, num_pairs)
        small = {"model": model, "evals": 1, "batch_size": 8, "image_size": 32, "batch_norm_group": 8}
        return replace(found, context_length=self.context_length or 16, **small)

    def run(trials, jobs):
        for trial in trials:
            ran.append((trial.arm, trial.seed))
            _train(trial, 1)
        return []

    monkeypatch.setattr(Table, "config", config)
    monkeypatch.setattr(module, "run_trials", run)
    monkeypatch.chdir(tmp_path)
    tiny.write_pairs(tmp_path / "photos", 240)
    return ran


def test_methods_fractions_and_seeds_are_trained_once_and_compared(quick, tmp_path, capsys):
    command = [
        "benchmark",
        "--data",
        "photos",
        "--out",
        "out",
        "--methods",
        "slip",
        "--epochs",
        "3",
        "--fractions",
        "0.5",
        "1",
    ]
    assert cli.main([*command, "--json", "results.json"]) == 0
    arms = ["clip", "slip", "clip, 50 %", "slip, 50 %"]
    assert quick == [(arm, seed) for seed in (0, 1) for arm in arms]
    printed = capsys.readouterr().out
    assert printed.count("On these pairs ") == 1
    assert "Report: out/benchmark.html" in printed
    values = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert json.loads((tmp_path / "results.json").read_text())["advice"] == values["advice"] in printed
    page = (tmp_path / "out/benchmark.html").read_text()
    assert values["advice"] in page
    assert "By dataset size" in page
    assert values["by_fraction"]["slip"].keys() == {"0.5", "1.0"}
    assert values["efficiency"].keys() <= {"slip"}
    groups = {group["name"]: group for group in values["groups"]}
    assert list(groups) == arms
    steps = {group["steps"] for group in groups.values()}
    # as many pairs seen; not equal, for this batch is not the table's
    assert max(steps) - min(steps) < 0.05 * max(steps)
    assert groups["clip"]["settings"]["num_train"] == pytest.approx(
        2 * groups["clip, 50 %"]["settings"]["num_train"], abs=1
    )

    assert cli.main(command) == 0
    assert len(quick) == 8  # finished trials are kept
    for other in (["--seeds", "3"], ["--data", "elsewhere"]):
        assert cli.main([*command, *other]) == 2
        assert "was started with different settings" in capsys.readouterr().err
    (tmp_path / "out/plan.json").write_text("{")
    assert cli.main(command) == 2
    assert "is not a plan written by `coalign benchmark`" in capsys.readouterr().err


def test_tables_with_columns_of_other_names(quick, tmp_path, capsys):
    rows = [f"{path.relative_to(tmp_path)};{path.stem};a caption" for path in (tmp_path / "photos").rglob("*.png")]
    (tmp_path / "pairs.csv").write_text("\n".join(["where;words;caption", *rows]))
    command = [
        "benchmark",
        "--data",
        "pairs.csv",
        "--out",
        "out",
        "--methods",
        "slip",
        "--epochs",
        "0.2",
        "--seeds",
        "1",
    ]
    assert cli.main(command) == 2  # no column of images is detected
    assert "its columns are: where, words, caption" in capsys.readouterr().err
    options = ["--image-column", "where", "--caption-column", "words", "--separator", ";"]
    assert cli.main([*command, *options]) == 0
    assert len(quick) == 2
    for arm, _ in quick:
        run = read_config(tmp_path / "out" / f"{arm}-seed0")
        assert run.config.reading == DataConfig("where", ("words",), separator=";")
        assert run.num_train + run.num_val == 240
    assert cli.main([*command, *options]) == 0
    assert len(quick) == 2  # nothing is trained again
    assert cli.main([*command, *options[:2], "--caption-column", "caption"]) == 2
    assert "was started with different settings" in capsys.readouterr().err


def test_methods_get_equal_time(quick, tmp_path, monkeypatch):
    """Two methods, two seeds, two trials at once: half of the time for each trial, minus its overhead."""
    speed = {"clip": 10.0, "slip": 4.0}
    monkeypatch.setattr(
        module, "profile", lambda data, config_for, steps: Profile(1.0, {}, speed[config_for(64).method], [])
    )
    benchmark("photos", "out", ["slip"], minutes=4, jobs=2)
    epochs = json.loads((tmp_path / "out/plan.json").read_text())["epochs"]
    number = json.loads((tmp_path / "out/clip-seed0/config.json").read_text())["num_train"]
    assert epochs["clip"] == pytest.approx((120 - module.OVERHEAD) * 10 / number)
    assert epochs["slip"] == pytest.approx(epochs["clip"] * 0.4)
    benchmark("photos", "capped", ["slip"], minutes=4, jobs=2, max_epochs=0.5)  # of the faster one; both get less time
    assert json.loads((tmp_path / "capped/plan.json").read_text())["epochs"] == {"clip": 0.5, "slip": 0.2}


def test_the_speed_is_measured_for_some_seconds(monkeypatch):
    asked = []

    def profile(data, config_for, steps):
        asked.append(steps)
        return Profile(0.01 * steps, {}, 1000.0 / steps, [])

    monkeypatch.setattr(module, "profile", profile)
    assert module._speed("photos", None) == pytest.approx(1000 / 84)
    assert asked == [6, 84]  # 84 steps of the 0.06 s that the first six took on average: five seconds
    monkeypatch.setattr(module, "profile", lambda data, config_for, steps: Profile(2.0, {}, 7.0, []))
    assert module._speed("photos", None) == 7.0  # six steps are enough


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "simclr"], "no method named 'simclr'"),
        (["--methods", "clip"], "another method besides clip"),
        (["--fractions", "2"], "--fractions contains 2"),
        (["--fractions", "0.01", "--methods", "slip", "--epochs", "1"], "fewer than two batches"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--minutes", "1"], "too short"),
        (["--context-length", "12", "--epochs", "1"], "--context-length 13 keeps them whole"),
    ],
)
def test_wrong_options_are_reported_before_training(quick, capsys, options, message):
    assert cli.main(["benchmark", "--data", "photos", "--out", "out", *options]) == 2
    assert message in capsys.readouterr().err
    assert not quick


# ---------------------------------------------------------------- data efficiency

FRACTIONS = [0.25, 0.5, 1.0]


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([10, 20, 40], 1.0),  # CLIP itself
        ([10, 40, 60], 2.0),  # reached with half of the pairs
        ([20, 30, 50], 1 / math.sqrt(0.5)),  # half way between half and all, in log fraction
        ([45, 50, 60], 4.0),  # ahead with the smallest fraction
        ([10, 15, 20], 0.5),  # CLIP reaches its score with half of the pairs
        ([5, 20, 30], math.sqrt(0.5)),
        ([1, 2, 3], 0.25),
    ],
)
def test_the_factor_is_where_the_curves_cross(scores, expected):
    assert factor(FRACTIONS, scores, [10, 20, 40]) == pytest.approx(expected)


@pytest.mark.parametrize(("scores", "bound"), [([45, 50, 60], True), ([45, 30, 50], False), ([1, 2, 3], True)])
def test_a_factor_at_the_smallest_fraction_is_a_bound(scores, bound):
    curves = {"mcd": {f: {0: x} for f, x in zip(FRACTIONS, scores)}}
    curves["clip"] = {f: {0: x} for f, x in zip(FRACTIONS, [10, 20, 40])}
    assert efficiencies(curves)["mcd"].bound == bound


def test_a_factor_has_an_interval_of_the_factors_of_draws():
    curves = {"clip": {f: {0: x, 1: x + 2} for f, x in zip(FRACTIONS, [10, 20, 40])}}
    curves["mcd"] = {f: {0: x, 1: x} for f, x in zip(FRACTIONS, [10, 40, 60])}
    noise = np.random.default_rng(0).normal(size=(2, 3, 200))
    draws = {
        name: {f: np.mean(list(seeds.values())) + each for (f, seeds), each in zip(of_method.items(), noises)}
        for (name, of_method), noises in zip(curves.items(), noise)
    }
    found = efficiencies(curves, draws)["mcd"]
    factors = [
        factor(FRACTIONS, *([draws[name][f][i] for f in FRACTIONS] for name in ("mcd", "clip"))) for i in range(200)
    ]
    assert found.interval == pytest.approx(tuple(np.quantile(factors, [0.025, 0.975])))
    assert found.interval[0] < found.factor < found.interval[1]
    assert efficiencies(curves)["mcd"].interval is None
    del curves["mcd"][0.5]
    assert not efficiencies(curves)


def test_a_score_lost_with_more_pairs_is_not_reached():
    assert factor(FRACTIONS, [45, 30, 50], [10, 20, 40]) == pytest.approx(1 / math.sqrt(0.5))


def test_a_failed_trial_is_reported_and_the_others_compared(quick, monkeypatch, capsys):
    run = module.run_trials

    def failing(trials, jobs):
        run([trial for trial in trials if trial.arm != "mcd"], jobs)
        return ["mcd-seed0 (out of memory)"]

    monkeypatch.setattr(module, "run_trials", failing)
    result = benchmark("photos", "out", ["slip", "mcd"], epochs=1, seeds=1)
    assert [group.name for group in result.comparison.groups] == ["clip", "slip"]
    assert "failed: mcd-seed0 (out of memory)" in capsys.readouterr().out


def test_methods_at_chance_are_not_recommended(quick):
    result = benchmark("photos", "out", ["slip"], epochs=0.2, fractions=(0.5,), seeds=1)
    assert result.advice.startswith("No method beats chance yet")
    assert not result.efficiency


def test_nothing_finished_is_an_error(quick, monkeypatch):
    monkeypatch.setattr(module, "run_trials", lambda *_: ["clip-seed0 (no)"])
    with pytest.raises(UserError, match="nothing to compare"):
        benchmark("photos", "out", ["slip"], epochs=1)
