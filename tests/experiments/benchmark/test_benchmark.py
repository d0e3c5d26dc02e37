"""`coalign benchmark`: settings chosen by a search in equal time, leads tested on pairs that chose nothing, and data efficiency."""

import json
import math
import shlex
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import tiny
from helpers.encoders import write_open_clip

from coalign.cli import main as cli
from coalign.cli.train import TrainCommand, _parse_settings
from coalign.config import DataConfig, flatten, to_json
from coalign.data.sources.open import open_source
from coalign.errors import NotFinite, UserError
from coalign.experiments.benchmark import benchmark as module
from coalign.experiments.benchmark import plan as benchmark_plan
from coalign.experiments.benchmark import result as benchmark_result
from coalign.experiments.benchmark.benchmark import benchmark
from coalign.experiments.benchmark.plan import ENOUGH, FEWEST, MOST, Plan, make_plan
from coalign.experiments.benchmark.result import BenchmarkResult, Lead
from coalign.experiments.tables import reproduce, search
from coalign.experiments.tables.data_efficiency import efficiencies, factor
from coalign.experiments.tables.trials import Trial, _train
from coalign.methods import recipe
from coalign.methods.search import OWN, Choice, Search
from coalign.methods.table import Table
from coalign.runs.folder import SavedConfig, read_config, read_results, write_config
from coalign.workflows.train import train as train_module
from coalign.workflows.train.profile import Profile

SPEEDS = {"clip": 1000.0, "slip": 400.0, "mcd": 500.0}


@pytest.fixture
def quick(monkeypatch, tmp_path, without_run_reports):
    """Runs trials in this process with a tiny model, at most three per search. Returns the labels of the trials that ran."""
    model, ran = str(tiny.write_model(tmp_path / "model")), []
    original = Table.config

    def config(self, arm, seed, num_pairs):
        found = original(self, arm, seed, num_pairs)
        small = {"model": model, "evals": 1, "batch_size": 8, "image_size": 32, "batch_norm_group": 8}
        return replace(found, context_length=self.context_length or 16, **small)

    def run(trials, jobs):
        for trial in trials:
            ran.append(trial.label)
            _train(trial, 1)
        return []

    monkeypatch.setattr(Table, "config", config)
    for each in (search, reproduce):
        monkeypatch.setattr(each, "run_trials", run)
    monkeypatch.setattr(benchmark_plan, "MOST", 3)
    monkeypatch.setattr(module, "_speed", lambda data, config_for: (SPEEDS[config_for(64).method], 0.0))
    monkeypatch.chdir(tmp_path)
    tiny.write_pairs(tmp_path / "photos", 240)
    return ran


@pytest.fixture
def used(monkeypatch):
    """The pairs of every run that was evaluated, by its name."""
    found, evaluate = {}, train_module.evaluate_held_out

    def evaluate_held_out(method, config, pairs, tokenizer, name):
        found[name] = pairs
        return evaluate(method, config, pairs, tokenizer, name)

    monkeypatch.setattr(train_module, "evaluate_held_out", evaluate_held_out)
    return found


def test_settings_are_searched_and_leads_tested_on_pairs_that_chose_nothing(quick, used, tmp_path, capsys):
    command = ["benchmark", "--data", "photos", "--out", "out", "--methods", "slip"]
    command += ["--epochs", "2", "--fractions", "0.5", "1", "--seeds", "2"]
    assert cli.main([*command, "--json", "results.json"]) == 0
    arms = ["clip", "slip", "clip, 50 %", "slip, 50 %"]
    first = [f"{arm}, trial {number}" for number in (1, 2, 3) for arm in ("clip", "slip")]
    assert quick[:6] == first
    assert (
        len(quick) == 6 + 4 + 2 + 2 + 8
    )  # the better two and the best are extended; of a fraction, there is one trial
    assert quick[-8:] == [f"{arm}, seed {seed}" for seed in (0, 1) for arm in arms]
    check_pairs(used)
    printed = capsys.readouterr().out
    assert "clip: 1,000 pairs/s; 0.5, 1 or 2 epochs" in printed
    assert "Search: 3 trials per method, of which 2 and 1 are extended. Then 2 new seeds per method" in printed
    assert printed.count("On these pairs ") + printed.count("No method beats chance") == 1
    assert "Report: out/benchmark.html" in printed
    assert printed.count("Device: ") == 1
    values = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert json.loads((tmp_path / "results.json").read_text())["advice"] == values["advice"] in printed
    page = (tmp_path / "out/benchmark.html").read_text()
    assert values["advice"] in page
    assert values["headline"] == "R@10, mean of both directions"
    check_verdict(values, tmp_path / "out")
    check_search(values)
    check_command(values, printed, tmp_path / "out")
    assert values["by_fraction"]["slip"].keys() == {"0.5", "1.0"}
    assert "By dataset size" in page
    assert values["efficiency"].keys() == {"slip"}
    check_kept(command, quick, tmp_path, capsys)


def test_locked_encoders_are_compared_with_training_from_scratch(quick, tmp_path):
    weights = str(write_open_clip(tmp_path / "weights"))
    command = ["benchmark", "--data", "photos", "--out", "out", "--methods", "clip", "--epochs", "2", "--seeds", "2"]
    assert cli.main([*command, "--image-tower", weights, "--text-tower", weights]) == 0
    assert {label.partition(",")[0] for label in quick} == {"clip", "locked"}
    values = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert [lead["over"] for lead in values["leads"]] in (["clip"], ["locked"])
    assert "crop" not in values["chosen"]["locked"]
    saved = read_config(tmp_path / "out/locked-seed1").config
    assert (saved.image_tuning, saved.text_tuning, saved.image_tower, saved.text_tower) == (
        "locked",
        "locked",
        weights,
        weights,
    )
    assert read_config(tmp_path / "out/clip-seed1").config.image_tower is None
    assert not (tmp_path / "out/features").exists()  # they are needed no more
    stored = json.loads((tmp_path / "out/plan.json").read_text())
    sweep = module._table(stored["settings"], Plan(**stored["plan"]))
    trial = reproduce.table_trials(sweep, ["locked"], 2, "photos", tmp_path / "out")[1]
    words = shlex.split(benchmark_result.train_command(trial))
    command, config = _parse_settings(words[2:], 200, "train", TrainCommand)
    assert command.recipe == "clip"
    assert "None" not in words
    assert "--temperature" not in words  # by default, that of the weights
    default, expected = recipe("clip")(200), trial.config(read_config(trial.folder).num_train)
    own = {name: getattr(default, name) for name in benchmark_result._OF_THE_BENCHMARK}
    expected = flatten(to_json(replace(expected, **own)))
    for name, value in flatten(to_json(config)).items():
        wanted = expected.pop(name)
        assert value == (pytest.approx(wanted, rel=1e-3) if isinstance(wanted, float) else wanted), name
    assert not expected


def check_pairs(used):
    """The test pairs are trained on by no run and evaluated by no trial of a search; every run has the same."""
    tests = [set(pairs.test_splits["test"].tolist()) for name, pairs in used.items() if "-trial" not in name]
    assert len(tests) == 8
    assert all(test == tests[0] for test in tests)
    assert 10 <= len(tests[0]) <= 40
    for name, pairs in used.items():
        train, val = set(pairs.train.tolist()), set(pairs.val.tolist())
        assert not tests[0] & (train | val)
        assert not train & val
        assert ("-trial" in name) == (not pairs.test_splits)
        assert len(train) + len(val) + len(tests[0]) == 240 or "50" in name


def check_verdict(values, out):
    """The best method is that with the best validation score; its lead is the difference of means on the test pairs."""
    validation = {arm: each["validation"] for arm, each in values["chosen"].items()}
    for arm in ("clip", "slip"):
        scores = [
            read_results(out / f"{arm}-seed{seed}")["tasks"]["retrieval"]["metrics"]["mean_recall"]["value"]
            for seed in (0, 1)
        ]
        assert validation[arm] == pytest.approx(np.mean(scores))
    best, other = sorted(("clip", "slip"), key=lambda arm: -validation[arm])
    (lead,) = values["leads"]
    assert lead["over"] == other
    tested = {arm: score_on_test(out, arm) for arm in (best, other)}
    assert lead["difference"] == pytest.approx(tested[best] - tested[other])
    low, high = lead["interval"]
    assert low <= lead["difference"] <= high
    assert 0 < lead["p"] <= 1
    assert values["recommended"] in (best, other)
    assert f"On these pairs {best} is best by validation" in values["advice"]
    names = {name for group in values["groups"] for name in group["metrics"]}
    assert all(name.startswith("retrieval_test") for name in names)


def score_on_test(out, arm):
    found = [read_results(out / f"{arm}-seed{seed}")["tasks"]["retrieval_test"]["metrics"] for seed in (0, 1)]
    return np.mean([each[f"{side}.r10"]["value"] for each in found for side in ("image_to_text", "text_to_image")])


def check_search(values):
    """Both methods have first their own settings and then the same draws; fractions keep the settings chosen on all pairs."""
    draws = [asdict(each) for each in Search((1,), trials=2).draws()]
    for arm in ("clip", "slip"):
        found = values["search"][arm]
        own = {"lr_factor": 1.0, "weight_decay": recipe(arm)(192).optimizer.weight_decay, "crop": 1.0}
        assert [trial["settings"] for trial in found["trials"]] == [own, *draws]
        assert len(found["best_of"]) == 3
        best = max(each["score"] for trial in found["trials"] for each in trial["lengths"].values())
        (trial,) = [each for each in found["trials"] if each["settings"] == found["chosen"]["settings"]]
        assert trial["lengths"][f"{found['chosen']['epochs']:g}"]["score"] == best
        assert values["chosen"][arm]["epochs"] == found["chosen"]["epochs"] * 0.5
        assert values["search"][f"{arm}, 50 %"]["chosen"]["settings"] == found["chosen"]["settings"]


def check_command(values, printed, out):
    """The printed command has the settings of the runs that were tested, and holds out and evaluates what `train` does by default."""
    assert values["command"] in printed
    words = shlex.split(values["command"])
    assert words[:2] == ["coalign", "train"]
    saved = read_config(out / f"{values['recommended']}-seed1")
    command, config = _parse_settings(words[2:], saved.num_train, "train", TrainCommand)
    assert (command.recipe, command.data) == (values["recommended"], "photos")
    expected = saved.config
    assert config.epochs == pytest.approx(expected.epochs, rel=1e-3)
    assert config.optimizer.schedule == "constant"
    assert config.optimizer.lr == pytest.approx(expected.optimizer.lr, rel=1e-3)
    assert config.optimizer.weight_decay == pytest.approx(expected.optimizer.weight_decay, rel=1e-3)
    assert config.optimizer.warmup_steps == expected.optimizer.warmup_steps
    crops = [each.method_config.image_view.crop_scale[0] for each in (config, expected)]
    assert crops[0] == pytest.approx(crops[1], rel=1e-3)
    assert (config.batch_size, config.model) == (expected.batch_size, expected.model)
    assert (config.val_fraction, config.test_fraction, config.test_splits, config.seed) == (0.05, 0.0, (), 0)


@pytest.mark.parametrize(("method", "pairs"), [("clip-strong", 18_000), ("clip-strong", 90_000), ("declip", 90_000)])
def test_the_command_has_the_settings_of_the_runs_whatever_it_holds_out(tmp_path, method, pairs):
    """It trains on more pairs than these, perhaps so many that the recipe's model, rates and heads are others."""
    settings = {"methods": [method], "towers": {}, "fractions": [1.0], "context_length": None, "reading": {}}
    sweep = module._table(settings | {"skip_data_checks": False}, Plan(3, {method: 2.0}, {}, 1.0))
    trial = Trial(sweep, method, 0, "photos", tmp_path, Choice(OWN, 4.0, 1.0))
    saved = SavedConfig("photos", trial.config(pairs), pairs, pairs // 9)
    trial.folder.mkdir()
    write_config(trial.folder, saved)
    words = shlex.split(benchmark_result.train_command(trial))
    for number in (pairs, round(1.15 * pairs), round(1.23 * pairs)):
        _, config = _parse_settings(words[2:], number, "train", TrainCommand)
        assert (config.model, config.batch_size) == (saved.config.model, saved.config.batch_size)
        assert (config.method_config, config.epochs) == (saved.config.method_config, saved.config.epochs)
        assert replace(config.optimizer, roles={}) == replace(saved.config.optimizer, roles={})


def check_kept(command, ran, tmp_path, capsys):
    """What is finished is kept, and not mixed with trials of other settings."""
    ran.clear()
    assert cli.main(command) == 0
    assert ran == []
    for other in (["--seeds", "3"], ["--data", "elsewhere"], ["--minutes", "5"]):
        assert cli.main([*command, *other]) == 2
        assert "was started with different settings" in capsys.readouterr().err
    (tmp_path / "out/plan.json").write_text("{")
    assert cli.main(command) == 2
    assert "is not a plan written by `coalign benchmark`" in capsys.readouterr().err


def test_tables_with_a_test_split_and_columns_of_other_names(quick, used, tmp_path, capsys):
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    rows = [
        f"{path.relative_to(tmp_path)};{path.stem};a caption;{'test' if number % 5 == 0 else 'train'}"
        for number, path in enumerate(paths)
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(["where;words;caption;split", *rows]))
    command = ["benchmark", "--data", "pairs.csv", "--out", "out", "--methods", "slip", "--epochs", "1", "--seeds", "1"]
    assert cli.main(command) == 2  # no column of images is detected
    assert "its columns are: where, words, caption, split" in capsys.readouterr().err
    options = ["--image-column", "where", "--caption-column", "words", "--separator", ";"]
    assert cli.main([*command, *options]) == 0
    source = open_source("pairs.csv", reading=DataConfig("where", ("words",), separator=";"))
    for arm in ("clip", "slip"):
        run = read_config(tmp_path / "out" / f"{arm}-seed0")
        assert run.config.reading == DataConfig("where", ("words",), separator=";")
        assert run.num_train + run.num_val == 192
        assert used[f"{arm}-seed0"].test_splits["test"].tolist() == source.splits["test"].tolist()
    values = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert values["held_out"]["images"] == 48
    assert not values["command"] or "--image-column where" in values["command"]
    quick.clear()
    assert cli.main([*command, *options]) == 0
    assert not quick  # nothing is trained again
    assert cli.main([*command, *options[:2], "--caption-column", "caption"]) == 2
    assert "was started with different settings" in capsys.readouterr().err


def test_class_labels_are_compared_by_accuracy(quick, tmp_path):
    paths = sorted((tmp_path / "photos").rglob("*.png"))
    rows = [f"{path.relative_to(tmp_path)},{('red', 'green', 'blue')[n % 3]} thing" for n, path in enumerate(paths)]
    (tmp_path / "labels.csv").write_text("\n".join(["image,caption", *rows]))
    result = benchmark("labels.csv", "out", ["slip"], epochs=0.5, seeds=1)
    assert result.headline == "zero-shot top-1"
    tasks = read_results(tmp_path / "out/clip-seed0")["tasks"]
    assert tasks["zeroshot_test"]["metrics"]["acc1"]["title"].startswith("Test: ")
    assert result.chosen["clip"]["validation"] == tasks["zeroshot"]["metrics"]["acc1"]["value"]
    assert "zeroshot_test.acc1" in result.comparison.groups[0].metrics


# ---------------------------------------------------------------- plan

BUDGET = {"spent": 30.0, "fractions": 1, "seeds": 3, "jobs": 2}


def test_methods_get_equal_time():
    speeds = {"clip": 500.0, "uniclip": 200.0}
    plan = make_plan(speeds, 2000, 60, **BUDGET)
    assert plan.epochs["clip"] / plan.epochs["uniclip"] == pytest.approx(2.5, rel=0.01)
    assert plan.seconds <= 60 * 60 - 30
    assert plan.seconds > 0.99 * (60 * 60 - 30)  # nothing is left, as neither limit is reached


def test_the_time_of_a_plan_is_that_of_its_trials():
    """Simulated trial by trial, on two cores: each trial starts where one is free; a length begins when all of the one before are done."""
    plan = make_plan({"clip": 500.0, "mcd": 250.0}, 2000, 60, **BUDGET)
    shortest = plan.epochs["clip"] * 2000 / 500
    number, total = plan.trials, 0.0
    for methods_trials, length in (
        (2 * number, 1.0),
        (2 * math.ceil(number / 2), 2 - 0.8),  # from before the cool-down, a fifth of the run
        (2 * math.ceil(number / 4), 4 - 0.8 * 2),
        (2 * 3, 4.0),
    ):
        cores = [0.0, 0.0]
        for _ in range(methods_trials):
            cores[cores.index(min(cores))] += benchmark_plan.OVERHEAD + shortest * length
        total += max(cores)
    assert plan.seconds == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("minutes", [30, 45, 60, 90, 240, 600])
def test_trials_are_as_many_as_leave_enough_epochs(minutes):
    plan = make_plan({"clip": 300.0, "uniclip": 120.0, "mcd": 150.0}, 2500, minutes, **BUDGET)
    assert FEWEST <= plan.trials <= MOST
    if plan.trials > FEWEST:
        assert min(plan.epochs.values()) >= 0.99 * ENOUGH
    if plan.trials < MOST:
        assert min(plan.epochs.values()) < 1.5 * ENOUGH  # one more trial would leave fewer
    assert min(plan.epochs.values()) * 4 <= benchmark_plan.LONGEST


def test_few_pairs_are_not_trained_on_for_all_of_a_long_time():
    plan = make_plan({"clip": 300.0, "mcd": 150.0}, 200, 600, **BUDGET)
    assert plan.trials == MOST
    assert plan.seconds < 3600
    assert plan.epochs == {"clip": 25, "mcd": 25}  # and four times as long


def test_a_method_that_needs_little_time_leaves_it_to_the_others():
    """Locked encoders, whose features are kept, reach the most epochs in seconds. The others share what that leaves equally."""
    scratch = {"clip": 500.0, "mcd": 250.0}
    plan = make_plan(scratch | {"locked": 20_000.0}, 2000, 60, **BUDGET)
    assert plan.epochs["locked"] == 25
    assert plan.epochs["clip"] == pytest.approx(2 * plan.epochs["mcd"], rel=0.01)
    budget = 60 * 60 - 30
    assert 0.99 * budget < plan.seconds <= budget
    without = make_plan(scratch, 2000, 60, **BUDGET)
    assert plan.epochs["mcd"] * plan.trials == pytest.approx(without.epochs["mcd"] * without.trials, rel=0.3)


def test_equal_samples():
    plan = make_plan({"clip": 500.0, "mcd": 250.0}, 2000, 60, **BUDGET, longest=30)
    assert plan.epochs == {"clip": 7.5, "mcd": 7.5}
    assert FEWEST <= plan.trials <= MOST
    assert plan.seconds <= 3570
    assert make_plan({"clip": 500.0, "mcd": 250.0}, 2000, 600, **BUDGET, longest=30).trials == MOST


@pytest.mark.parametrize("longest", [None, 200.0])
def test_the_minutes_that_are_needed_are_enough(longest):
    speeds = {"clip": 100.0, "mcd": 50.0}
    with pytest.raises(
        UserError, match=r"--minutes 5 is too short for .*; give \d+ or more, or omit a method"
    ) as error:
        make_plan(speeds, 2000, 5, **BUDGET, longest=longest)
    needed = int(str(error.value).split("give ")[1].split()[0])
    assert make_plan(speeds, 2000, needed, **BUDGET, longest=longest).trials == FEWEST
    with pytest.raises(UserError):
        make_plan(speeds, 2000, needed - 1, **BUDGET, longest=longest)


def test_the_speed_is_measured_for_some_seconds(monkeypatch):
    asked = []

    def profile(data, config_for, steps):
        asked.append(steps)
        return Profile(0.01 * steps, {}, 1000.0 / steps, [])

    monkeypatch.setattr(module, "profile", profile)
    assert module._speed("photos", None) == (pytest.approx(1000 / 84), 0.0)
    assert asked == [6, 84]  # 84 steps of the 0.06 s that the first six took on average: five seconds
    monkeypatch.setattr(module, "profile", lambda data, config_for, steps: Profile(2.0, {}, 7.0, []))
    assert module._speed("photos", None) == (7.0, 0.0)  # six steps are enough
    monkeypatch.setattr(module, "profile", lambda data, config_for, steps: Profile(0.001, {}, 9000.0, [], 0.05))
    assert module._speed("photos", None) == (9000.0, 0.05)  # more steps would take more features, which take longer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--methods", "simclr"], "no method named 'simclr'"),
        (["--methods", "clip"], "another method besides clip"),
        (["--fractions", "2"], "--fractions contains 2"),
        (["--fractions", "0.01", "--methods", "slip"], "fewer than two batches"),
        (["--seeds", "0"], "--seeds is 0"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--minutes", "1", "--methods", "slip"], "--minutes 1 is too short"),
        (["--epochs", "5000", "--methods", "slip"], "--minutes 60 is too short for 5000 epochs"),
        (["--context-length", "12"], "--context-length 13 keeps them whole"),
        (["--data", "few"], "for test, but 10 of each are needed; use more data."),
    ],
)
def test_wrong_options_are_reported_before_training(quick, tmp_path, capsys, options, message):
    tiny.write_pairs(tmp_path / "few", 40)
    assert cli.main(["benchmark", "--data", "photos", "--out", "out", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert not quick


# ---------------------------------------------------------------- verdict


def lead(over, difference, p):
    return Lead(over, difference, None if p is None else (difference - 0.1, difference + 0.1), p)


@pytest.mark.parametrize(
    ("leads", "recommended", "sentence"),
    [
        (
            [lead("clip", 0.1, 0.001), lead("slip", 0.2, 0.03)],
            "mcd",
            "10.0 percentage points ahead of clip; its lead over every other method is significant: choose mcd.",
        ),
        (
            [lead("clip", 0.1, 0.2), lead("slip", 0.05, 0.7)],
            "clip",
            "5.0 percentage points ahead of slip, but the difference from clip and slip is not significant: choose the cheapest of them",
        ),
        (
            [lead("clip", 0.1, 0.001), lead("slip", 0.02, 0.7)],
            "mcd",
            "the difference from slip is not significant: choose the cheapest",
        ),
        ([lead("clip", 0.1, None)], "mcd", "with one seed, it is not known whether"),
        (
            [lead("clip", -0.1, 0.001)],
            "clip",
            "10.0 percentage points behind clip, which is significant: the validation",
        ),
        (
            [lead("clip", -0.05, 0.4), lead("slip", -0.02, 0.01)],
            "slip",
            "2.0 percentage points behind slip, which is significant",
        ),
        ([lead("clip", -0.02, 0.5)], "clip", "2.0 percentage points behind clip, but the difference from clip is not"),
        ([], "mcd", "no other method finished"),
    ],
)
def test_the_advice(leads, recommended, sentence):
    costs = {"clip": 1.0, "mcd": 2.0, "slip": 2.1}
    metrics = {"zeroshot_test.acc1": SimpleNamespace(value=0.5)}
    groups = {name: SimpleNamespace(seconds=cost, samples_seen=100, metrics=metrics) for name, cost in costs.items()}
    result = BenchmarkResult(None, "", leads=leads, headline="zero-shot top-1")
    found, advice = benchmark_result._advice(result, groups, "mcd", "zeroshot_test.acc1")
    assert found == recommended
    assert advice.startswith("On these pairs mcd is best by validation: zero-shot top-1, 50.0 % on the test pairs")
    assert sentence in advice


def test_p_values_are_corrected_for_all_pairs_of_methods(monkeypatch):
    p_values = {"clip": 0.02, "slip": 0.03, "oner": 0.5}

    def decide(sweep, trials):
        assert sweep.claims == (("clip", "mcd"), ("slip", "mcd"), ("oner", "mcd"))
        return [{"difference": 0.1, "interval": (0.0, 0.2), "p": p_values[lower]} for lower, _ in sweep.claims]

    monkeypatch.setattr(benchmark_result, "decide", decide)
    found = benchmark_result._leads(Table("", {}, 1.0), [], "mcd", list(p_values), "retrieval_test.r10")
    assert [each.p for each in found] == pytest.approx([6 * 0.02, 5 * 0.03, 1.0])
    assert not any(each.is_significant for each in found)


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
    run = reproduce.run_trials

    def failing(trials, jobs):
        failed = [trial for trial in trials if trial.arm == "mcd"]
        run([trial for trial in trials if trial not in failed], jobs)
        return [f"{trial.folder.name} (out of memory)" for trial in failed]

    for each in (search, reproduce):
        monkeypatch.setattr(each, "run_trials", failing)
    result = benchmark("photos", "out", ["slip", "mcd"], epochs=0.4, seeds=1)
    assert [group.name for group in result.comparison.groups] == ["clip", "slip"]
    assert result.left_out == {"mcd": "its trials failed"}
    assert "failed: mcd-trial1 (out of memory)" in capsys.readouterr().out


def test_a_method_that_diverges_is_left_out(quick, monkeypatch, capsys, tmp_path):
    def diverge(data, out, config, **options):
        result = train_module.train(data, out, config, **options)
        if config(192).method in diverging:
            raise NotFinite("The loss was not finite")
        return result

    diverging = ["mcd"]
    monkeypatch.setattr(search, "train", diverge)
    command = ["benchmark", "--data", "photos", "--epochs", "0.4", "--seeds", "1", "--fractions", "0.5", "1"]
    assert cli.main([*command, "--out", "out", "--methods", "slip", "mcd"]) == 0
    printed = capsys.readouterr().out
    assert "failed: mcd (all trials of its search diverged); its log is in out" in printed
    assert "mcd is left out: all trials of its search diverged." in printed
    assert "mcd is left out: all trials of its search diverged." in (tmp_path / "out/benchmark.html").read_text()
    values = json.loads((tmp_path / "out/benchmark.json").read_text())
    assert values["left_out"] == {"mcd": "all trials of its search diverged"}
    assert {group["name"].partition(",")[0] for group in values["groups"]} == {"clip", "slip"}
    diverging = ["slip"]
    assert cli.main([*command, "--out", "other", "--methods", "slip"]) == 2
    assert "There is nothing to compare: slip (all trials of its search diverged)" in tiny.error_line(capsys)


def test_methods_at_chance_are_not_recommended(quick):
    result = benchmark("photos", "out", ["slip"], epochs=0.2, seeds=1)
    assert result.advice.startswith("No method beats chance yet")
    assert not any([result.efficiency, result.command, result.recommended])


def test_one_method_above_chance_is_enough_for_a_verdict(quick, monkeypatch):
    """Also if it is not the best one on the validation pairs."""
    result = benchmark("photos", "out", ["slip"], epochs=0.2, seeds=1)
    best = max(result.chosen, key=lambda arm: result.chosen[arm]["validation"])
    (other,) = (group for group in result.comparison.groups if group.name != best)
    monkeypatch.setattr(benchmark_result, "_above_chance", lambda metric: metric in other.metrics.values())
    again = benchmark("photos", "out", ["slip"], epochs=0.2, seeds=1)
    assert again.advice.startswith(f"On these pairs {best} is best by validation")
    assert again.recommended


def test_nothing_finished_is_an_error(quick, monkeypatch):
    for each in (search, reproduce):
        monkeypatch.setattr(each, "run_trials", lambda trials, jobs: ["clip-seed0 (no)"] if trials else [])
    with pytest.raises(UserError, match="nothing to compare"):
        benchmark("photos", "out", ["slip"], epochs=1)
