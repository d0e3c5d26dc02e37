"""compare(): groups, paired differences against naive loops, and what cannot be compared."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import tiny
from helpers.run_folders import CAPTIONS, write_run
from rich.console import Console
from scipy import stats

from coalign.cli import main as cli
from coalign.config import flatten
from coalign.errors import UserError
from coalign.experiments.compare.compare import compare
from coalign.experiments.compare.terminal import print_comparison
from coalign.runs.outcomes import read_outcomes
from coalign.workflows.evaluate.eval_report import write_results

R5, RANK, CLASSES = (
    "retrieval.text_to_image.r5",
    "retrieval.text_to_image.median_rank",
    "zeroshot.mean_per_class_recall",
)


@pytest.fixture
def two(tmp_path):
    return write_run(tmp_path / "good", 8), write_run(tmp_path / "bad", 14, seed=1, method="slip")


def naive(first, others, metric, statistic, draws=2000):
    """Quantiles of statistic(others) - statistic(first) over resampled images, each with all its captions, by loops."""
    generator = np.random.default_rng(9)
    arrays = [read_outcomes(folder)[1][metric] for folder in (first, others)]
    owner = arrays[0].groups
    texts = [np.flatnonzero(owner == image) for image in range(len(CAPTIONS))]
    found = []
    for _ in range(draws):
        rows = np.concatenate([texts[image] for image in generator.integers(len(texts), size=len(texts))])
        found.append(statistic(arrays[1].values[rows]) - statistic(arrays[0].values[rows]))
    return np.quantile(found, [0.025, 0.975])


# ---------------------------------------------------------------- metrics


@pytest.mark.parametrize(("metric", "statistic"), [(R5, np.mean), (RANK, np.median)])
def test_a_difference_equals_a_naive_paired_bootstrap(two, metric, statistic):
    first, second = compare(two).groups
    values = [read_outcomes(folder)[1][metric].values for folder in two]
    shown = second.metrics[metric]
    assert first.metrics[metric].value == pytest.approx(statistic(values[0]))
    assert shown.value == pytest.approx(statistic(values[1]))
    assert shown.difference == pytest.approx(statistic(values[1]) - statistic(values[0]))
    low, high = naive(*two, metric, statistic)
    assert shown.difference_over_items == pytest.approx((low, high), abs=0.15 * (high - low))
    assert first.metrics[metric].difference is None
    assert shown.difference_over_seeds is None


def test_pairing_narrows_the_interval_of_runs_that_agree(tmp_path):
    first = write_run(tmp_path / "a", 8)
    second = shutil.copytree(first, tmp_path / "b")
    with np.load(first / "held_out.npz") as file:
        arrays = dict(file)
    values = f"{R5}/values"
    arrays[values] = arrays[values].copy()
    arrays[values][:6] = 1 - arrays[values][:6]
    np.savez_compressed(second / "held_out.npz", **arrays)
    change(second, epochs=1)
    metric = compare([first, second]).groups[1].metrics[R5]
    width = metric.over_items[1] - metric.over_items[0]
    paired = metric.difference_over_items[1] - metric.difference_over_items[0]
    assert 0 < paired < 0.6 * width


def test_seeds_become_one_group_with_a_t_interval(tmp_path):
    clips = [write_run(tmp_path / f"clip{seed}", 8, seed=seed) for seed in range(3)]
    slips = [write_run(tmp_path / f"slip{seed}", 12, seed=seed + 5, method="slip") for seed in range(4)]
    # in any order: the first run given is the one that others are compared with
    clip, slip = compare([clips[1], slips[0], clips[0], *slips[1:], clips[2]]).groups
    assert (clip.name, clip.runs, clip.seeds) == ("clip", ["clip1", "clip0", "clip2"], [1, 0, 2])
    assert (slip.name, slip.seeds) == ("slip", [5, 6, 7, 8])
    assert slip.seconds == pytest.approx(106.5)
    assert slip.samples_seen == 60 * 256
    assert slip.parameters == 1000
    values = [[read_outcomes(folder)[1][R5].values.mean() for folder in group] for group in (clips, slips)]
    metric = slip.metrics[R5]
    assert metric.value == pytest.approx(np.mean(values[1]))
    assert clip.metrics[R5].over_seeds == pytest.approx(
        tuple(stats.ttest_1samp(values[0], 0).confidence_interval(0.95))
    )
    welch = stats.ttest_ind(values[1], values[0], equal_var=False).confidence_interval(0.95)
    assert metric.difference_over_seeds == pytest.approx(tuple(welch))
    assert metric.difference == pytest.approx(np.mean(values[1]) - np.mean(values[0]))
    ranks = [np.median(read_outcomes(folder)[1][RANK].values) for folder in slips]
    assert slip.metrics[RANK].value == pytest.approx(np.mean(ranks))


def test_metrics_equal_those_the_run_reported(trained, tmp_path):
    """The comparison recomputes from the items what the run reported at its end."""
    other = shutil.copytree(trained, tmp_path / "other")
    change(other, seed=1)
    (group,) = compare([trained, other]).groups
    results = json.loads((trained / "results.json").read_text())
    reported = results["tasks"]["retrieval"]["metrics"]
    assert len(reported) == 6  # of five held-out pairs, R@5 and R@10 are not reported
    for name, entry in reported.items():
        metric = group.metrics[f"retrieval.{name}"]
        interval = metric.over_items or (None, None)  # the modality gap has none
        assert (metric.value, *interval) == pytest.approx((entry["value"], entry["low"], entry["high"]))
        assert (metric.title, metric.chance, metric.count) == (entry["title"], entry["chance"], entry["count"])
        assert metric.over_seeds == (metric.value, metric.value)
    assert group.parameters == sum(results["parameters"].values())
    assert len(group.validations[0]) == 2
    assert group.validations[0][-1]["samples"] == results["run"]["step"] * 8
    steps = {row["step"]: row["seconds"] for row in tiny.rows(trained / "metrics.jsonl") if "seconds" in row}
    assert group.validations[0][-1]["seconds"] == steps[results["run"]["step"] - 1]


def test_zero_shot_is_compared_if_all_runs_have_it(tmp_path):
    with_it = [write_run(tmp_path / f"run{seed}", seed=seed, zero_shot=True, epochs=seed + 1) for seed in range(2)]
    first, second = compare(with_it).groups
    correct = [read_outcomes(folder)[1][CLASSES] for folder in with_it]
    by_class = [np.mean([c.values[c.groups == label].mean() for label in range(5)]) for c in correct]
    assert second.metrics[CLASSES].difference == pytest.approx(by_class[1] - by_class[0])
    assert second.metrics["zeroshot.acc1"].value == correct[1].values.mean()
    assert (first.metrics[CLASSES].kind, first.metrics[CLASSES].chance) == ("rate", 0.2)
    both = compare([*with_it, write_run(tmp_path / "without", seed=7)])
    assert not [name for group in both.groups for name in group.metrics if name.startswith("zeroshot")]


# ---------------------------------------------------------------- groups and settings


def change(folder, **changes):
    """Other settings in a run's config.json."""
    saved = json.loads((folder / "config.json").read_text())
    saved["config"].update(changes)
    (folder / "config.json").write_text(json.dumps(saved))


def test_differing_and_shared_settings_are_separated(tmp_path):
    one = write_run(tmp_path / "one", epochs=5, data=str(tmp_path / "photos"))
    other = write_run(tmp_path / "other", epochs=9, seed=3, data="/elsewhere/photos")
    slip = write_run(tmp_path / "slip", method="slip", epochs=9, data="/elsewhere/photos")
    comparison = compare([one, other, slip])
    assert [group.name for group in comparison.groups] == ["one", "other", "slip"]
    own = [group.settings for group in comparison.groups]
    assert [settings["epochs"] for settings in own] == [5, 9, 9]
    assert [settings["method"] for settings in own] == ["clip", "clip", "slip"]
    assert "method_config.ssl_scale" not in own[0]
    assert own[2]["method_config.ssl_scale"] == 1.0
    general = {name for name in own[0] if not name.startswith("method_config.")}
    assert general == {"epochs", "method"}  # neither seed nor workers, nor the folder of the same data
    assert comparison.settings["data"] == "photos"
    assert comparison.settings["optimizer.lr"] == 2e-3
    assert not set(comparison.settings) & set(own[2])
    values = comparison.to_json()
    assert str(tmp_path) not in json.dumps(values)
    assert flatten(values["held_out"])["images"] == len(CAPTIONS)


def test_names_are_not_parsed_as_markup(tmp_path, capsys):
    folders = [write_run(tmp_path / "[red]x", epochs=1), write_run(tmp_path / "[bold]y", epochs=2)]
    assert cli.main(["compare", *map(str, folders)]) == 0
    printed = capsys.readouterr().out
    assert "[red]x " in printed
    assert "[bold]y " in printed


def test_groups_of_one_method_have_distinct_names(tmp_path):
    folders = [
        write_run(tmp_path / f"{name}{seed}", seed=seed, epochs=epochs)
        for name, epochs in (("short", 5), ("long", 9))
        for seed in (0, 1)
    ]
    assert [group.name for group in compare(folders).groups] == ["short0 + 1", "long0 + 1"]
    twins = [write_run(tmp_path / parent / "run", epochs=number) for number, parent in enumerate(("x", "y"), 1)]
    assert [group.name for group in compare(twins).groups] == [str(twin) for twin in twins]


# ---------------------------------------------------------------- output


def test_the_command_prints_and_writes(two, tmp_path, capsys):
    page, values = tmp_path / "compare.html", tmp_path / "compare.json"
    assert cli.main(["compare", *map(str, two), "--report", str(page), "--json", str(values)]) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    found = json.loads(values.read_text())
    second = found["groups"][1]["metrics"][R5]
    assert re.search(rf"bad +{100 * second['value']:.1f} %", printed)
    assert f"{100 * second['difference']:+.1f}".replace("-", "−") in printed
    html = page.read_text()
    assert html.count("data:image/png;base64,") == 3  # figures, differences, curves
    assert 'src="http' not in html
    assert list(tmp_path.glob("*.png")) == []


def test_the_table_fits_a_hundred_columns_with_seeds(tmp_path):
    folders = [
        write_run(tmp_path / f"{method}{seed}", level, seed=seed, method=method)
        for method, level in (("clip", 60), ("slip", 200))
        for seed in range(3)
    ]
    with open(tmp_path / "printed", "w") as file:
        print_comparison(compare(folders), Console(width=100, file=file, highlight=False))
    lines = (tmp_path / "printed").read_text().splitlines()
    assert max(map(len, lines)) <= 100
    rows = [line for line in lines if line.split()[:1] in (["clip"], ["slip"])]
    assert len(rows) == 2 + 2 * 8  # none is folded
    assert len([line for line in rows if line.count("–") == 2]) == 16


def test_the_terminal_leaves_metrics_without_look_alikes_to_the_page(tmp_path):
    comparison = compare(
        [write_run(tmp_path / name, level, method=name) for name, level in (("clip", 60), ("slip", 200))]
    )
    printed = []
    for _ in range(2):
        with open(tmp_path / "printed", "w") as file:
            print_comparison(comparison, Console(width=100, file=file, highlight=False))
        printed.append((tmp_path / "printed").read_text())
        for group in comparison.groups:
            group.metrics["retrieval_without_look_alikes.r"] = group.metrics[R5]
    assert printed[1].startswith(printed[0])
    assert "--report also compares without" in printed[1].removeprefix(printed[0])


@pytest.mark.parametrize("numbers", [(5, 5), (5, 9), (9, 5), (5, 0), (0, 5)])
def test_metrics_without_look_alikes_are_compared_on_the_same_items_only(tmp_path, numbers):
    """Which items have look-alikes depends on the training pairs, such as a fraction of them. The other metrics are compared anyway."""
    runs = [
        write_run(tmp_path / f"run{n}", seed=n, epochs=n + 1, look_alikes=number) for n, number in enumerate(numbers)
    ]
    for group in compare(runs).groups:
        found = [name for name in group.metrics if "without_look_alikes" in name]
        assert bool(found) == (numbers[0] == numbers[1])
        assert R5 in group.metrics


# ---------------------------------------------------------------- refusals


def error_of(capsys, *runs):
    assert cli.main(["compare", *map(str, runs)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys, two, pairs):
    good = two[0]
    assert "two runs or more" in error_of(capsys, good)
    assert "is given twice" in error_of(capsys, good, two[1], tmp_path / "bad" / ".." / "good")
    assert "is not a run" in error_of(capsys, good, pairs)
    twin = shutil.copytree(good, tmp_path / "twin")
    assert "the same run twice" in error_of(capsys, good, twin)
    (twin / "results.json").unlink()
    assert f"The run {twin} is not finished" in error_of(capsys, twin, good)
    other = write_run(tmp_path / "other", items=np.arange(len(CAPTIONS)), epochs=1)
    assert "good and other were evaluated on different held-out samples, classes or foils (retrieval)" in error_of(
        capsys, good, two[1], other
    )
    (other / "held_out.npz").write_bytes(b"PK")
    assert "held_out.npz is damaged" in error_of(capsys, good, other)
    (other / "held_out.npz").unlink()
    assert "--resume auto" in error_of(capsys, good, other)
    np.savez(other / "held_out.npz")
    assert "held out no pairs" in error_of(capsys, good, other)
    (two[1] / "results.json").write_text("{}")
    assert "results.json is not a valid results file" in error_of(capsys, *two)


def test_runs_evaluated_on_different_pixels_are_refused(two):
    for folder, version in zip(two, (3, 2)):
        results = json.loads((folder / "results.json").read_text())
        (folder / "results.json").write_text(json.dumps({**results, "evaluation_view": version}))
    with pytest.raises(
        UserError, match=r"resize images otherwise; evaluate bad again with `coalign train … --resume auto`\."
    ):
        compare(two)


def test_runs_with_different_classes_are_refused(tmp_path):
    one = write_run(tmp_path / "one", zero_shot=True)
    other = write_run(tmp_path / "other", zero_shot=True, epochs=1)
    with np.load(other / "held_out.npz") as file:
        arrays = dict(file)
    np.savez(other / "held_out.npz", **{**arrays, "zeroshot/items": arrays["zeroshot/items"] + 1})
    with pytest.raises(UserError, match=r"classes or foils \(zeroshot\)"):
        compare([one, other])


@pytest.mark.parametrize("name", ["results.json", "config.json", "held_out.npz", "report.html", "metrics.jsonl"])
@pytest.mark.parametrize("option", ["--json", "--report"])
def test_files_of_a_run_are_not_overwritten(two, capsys, option, name):
    one, other = two
    (one / name).touch()
    before = {path: path.read_bytes() for path in one.iterdir()}
    assert cli.main(["compare", str(one), str(other), option, str(one / name)]) == 2
    assert f"{one / name} belongs to the run in {one}; choose another file name." in capsys.readouterr().err
    assert {path: path.read_bytes() for path in one.iterdir()} == before


def test_the_folder_of_a_report_is_created_before_the_work(two, tmp_path, capsys):
    out = tmp_path / "new" / "folder" / "compare.json"
    assert cli.main(["compare", *map(str, two), "--json", str(out)]) == 0
    assert json.loads(out.read_text())["groups"]
    (tmp_path / "file").touch()
    capsys.readouterr()
    assert cli.main(["compare", *map(str, two), "--json", str(tmp_path / "file" / "compare.json")]) == 2
    printed = capsys.readouterr()
    assert (printed.out, printed.err.count("\n")) == ("", 1)
    assert "cannot be created" in printed.err


def test_results_are_written_atomically_or_to_a_device(tmp_path, capsys):
    assert cli.main(["compare", "nothing", "else", "--json", str(tmp_path)]) == 2
    assert f"{tmp_path} is a folder; give the path of a file." in capsys.readouterr().err
    write_results({"a": 1}, tmp_path / "out.json")
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]
    device = Path("/dev/null")
    write_results({"a": 1}, device)
    assert device.is_char_device()
