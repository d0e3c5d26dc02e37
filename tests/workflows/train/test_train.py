"""train(): files of a run, options, resuming, and errors in the data, the settings and the run folder."""

import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny

from coalign.cli import main as cli
from coalign.config import TrainConfig, fields_marked
from coalign.data.loading.eval import image_batches
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits
from coalign.errors import NoImage
from coalign.methods import recipe
from coalign.runs.outcomes import read_outcomes
from coalign.runs.run import build_method, image_size, load
from coalign.training import checkpoint
from coalign.training.distributed import World
from coalign.training.trainer import Trainer
from coalign.workflows.evaluate.config import EvalConfig
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.train import run_report, setup
from coalign.workflows.train.caches import images as image_cache
from coalign.workflows.train.resume import check_folder
from coalign.workflows.train.train import train


def go(*args, **options):
    return cli.main(tiny.train_args(*args, **options))


def error_of(capsys, *args, **options):
    """The one-line error message of a command that fails."""
    assert go(*args, **options) == 2
    error = capsys.readouterr().err
    assert error.startswith("coalign: ")
    assert error.count("\n") == 1
    return error


@pytest.fixture
def real_report():
    """Requested by tests that need the real report."""


@pytest.fixture(autouse=True)
def report(request, monkeypatch):
    """Replaces the report in other tests: drawing figures takes far longer than training."""

    def write(data, out, *args):
        (out / "report.html").write_text("report")
        return "verdict", out / "report.html"

    if "real_report" not in request.fixturenames:
        monkeypatch.setattr(run_report, "write_run_report", write)


def reject_constant(text):
    """Rejects NaN and infinity, which are not valid JSON."""
    raise AssertionError(f"{text} in JSON")


# ---------------------------------------------------------------- files of a run


def test_files_of_a_run(trained):
    present = {path.name for path in trained.iterdir()}
    assert present >= {
        "config.json", "tokenizer.json", "last", "best", "metrics.jsonl", "bad_samples.jsonl", "results.json", "report.html",
    }  # fmt: skip
    assert not [name for name in present if name.startswith(".") or name.endswith(".new")]
    steps = [row["step"] for row in tiny.rows(trained / "metrics.jsonl") if "loss" in row]
    assert len(steps) > 10
    assert steps == list(range(len(steps)))
    losses = [row["loss"] for row in tiny.rows(trained / "metrics.jsonl") if "loss" in row]
    assert np.mean(losses[-5:]) < losses[0]
    page = (trained / "report.html").read_text()
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert "R@1" in page
    assert str(len(steps)) in page


def test_results_are_consistent(trained):
    results = json.loads((trained / "results.json").read_text(), parse_constant=reject_constant)
    config = json.loads((trained / "config.json").read_text())
    assert results["run"]["ended"] == "finished"
    assert results["run"]["step"] == len([row for row in tiny.rows(trained / "metrics.jsonl") if "loss" in row])
    assert results["run"]["bad_samples"] == {}
    for side in ("image_to_text", "text_to_image"):
        metrics = results["tasks"]["retrieval"]["metrics"]
        # R@10 among ten captions is 100 % for any model
        recall = [metrics[f"{side}.r{k}"] for k in (1, 5, 10) if k < config["num_val"]]
        assert len([name for name in metrics if name.startswith(f"{side}.r")]) == len(recall)
        for entry in recall:
            assert 0 <= entry["low"] <= entry["value"] <= entry["high"] <= 1
        assert [entry["value"] for entry in recall] == sorted(entry["value"] for entry in recall)
        assert recall[0]["chance"] == pytest.approx(1 / config["num_val"])
        assert 1 <= metrics[f"{side}.median_rank"]["value"] <= config["num_val"]


def test_validation_rows_and_results_agree(trained):
    """The last validation and the results use the final weights and all held-out pairs."""
    row = [row for row in tiny.rows(trained / "metrics.jsonl") if "val/loss" in row][-1]
    metrics = json.loads((trained / "results.json").read_text())["tasks"]["retrieval"]["metrics"]
    for side in ("image_to_text", "text_to_image"):
        recall = {f"r{k}": metrics[f"{side}.r{k}"]["value"] for k in (1, 5, 10) if f"{side}.r{k}" in metrics}
        prefix = f"val/{side}_"
        validated = {name.removeprefix(prefix): row[name] for name in row if name.startswith(f"{prefix}r")}
        assert recall
        assert validated == pytest.approx(recall)


def test_a_loaded_run_embeds_like_the_trained_method(tmp_path, pairs, model_file, monkeypatch):
    methods = []
    original = Trainer.fit

    def fit(self):
        result = original(self)
        methods.append(self.method)
        return result

    monkeypatch.setattr(Trainer, "fit", fit)
    assert go(pairs, tmp_path / "run", model_file, epochs=1) == 0
    run = load(tmp_path / "run")
    texts = ["red apple", "a green boat standing"]
    pixels = next(iter(image_batches(open_source(str(pairs)), np.arange(5), 32)))[1]
    with torch.no_grad():
        ids, lengths = run.tokenizer(texts, 12)
        expected = methods[0].eval()
        assert torch.equal(run.encoder().encode_text(texts), expected.encode_text(ids, lengths))
        assert torch.equal(run.encoder().encode_image(pixels), expected.encode_image(pixels))
    assert run.encoder().logit_scale == pytest.approx(expected.scalars()["logit_scale"].item())
    assert run.checkpoint == "last, step 7"
    assert not run.method.training


def test_training_never_sees_a_held_out_pair(tmp_path, pairs, model_file, monkeypatch):
    trained_on = []
    original = Trainer._one_step

    def one_step(self, step, loader, signal):
        def recorded():
            for loaded in loader:
                trained_on.extend(loaded.batch.indices.tolist())
                yield loaded

        return original(self, step, recorded(), signal)

    monkeypatch.setattr(Trainer, "_one_step", one_step)
    assert go(pairs, tmp_path / "run", model_file, epochs=3, evals=1) == 0
    splits = assign_splits(open_source(str(pairs)), 0.1)[0]
    assert len(trained_on) >= 3 * 48
    assert set(trained_on) <= set(splits["train"].tolist())
    assert len(splits["val"]) >= 2
    assert not set(trained_on) & set(splits["val"].tolist())


def test_the_same_command_gives_the_same_weights(tmp_path, pairs, model_file, trained):
    assert go(pairs, tmp_path / "run", model_file, workers=2) == 0
    one, other = (checkpoint.load(folder / "last").model for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert go(pairs, tmp_path / "other", model_file, seed=1, epochs=1) == 0
    assert not torch.equal(
        one["logit_scale.log"], checkpoint.load(tmp_path / "other" / "last").model["logit_scale.log"]
    )


def test_train_as_a_function(tmp_path, pairs, model_file):
    config = replace(
        recipe("clip")(60),
        model=str(model_file),
        context_length=12,
        batch_size=8,
        epochs=1,
        workers=0,
        tokenizer="captions",
    )
    result = train(str(pairs), tmp_path / "run", config)
    assert (result.ended, result.step) == ("finished", 7)


# ---------------------------------------------------------------- options


def test_dry_run_prints_and_creates_no_run(tmp_path, pairs, model_file, capsys):
    args = tiny.train_args(pairs, tmp_path / "run", model_file)
    assert cli.main([*args, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    source = open_source(str(pairs))
    held_out = len(assign_splits(source, 0.1)[0]["val"])
    assert f"{64 - held_out} pairs for training, {held_out} held out" in printed
    assert "Batch size 8, 7 steps per epoch, 21 steps in total." in printed
    method = build_method(replace(recipe("clip")(60), model=str(model_file), context_length=12), Vocabulary())
    image = sum(p.numel() for p in method.parameter_groups()["image"])
    assert f"{image:,}" in printed
    captions = [source.record(index).captions[0] for index in range(64)]
    assert sum(caption in printed for caption in captions) >= 5
    assert "optimizer.lr" in printed
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"first_batch.png"}
    check_folder(tmp_path / "run", "no")  # the folder can still be used for a run


class Vocabulary:
    """Stands for the tokenizer of `build_method`."""

    vocab_size = 300


def test_dry_run_rejects_invalid_settings(tmp_path, pairs, model_file, capsys):
    args = tiny.train_args(pairs, tmp_path / "run", model_file, lr=-1)
    assert cli.main([*args, "--dry-run"]) == 2
    assert "lr is -1" in capsys.readouterr().err


def test_zero_shot_accuracy_on_classes_is_tracked(tmp_path, pairs, model_file, real_report):
    classes = tmp_path / "classes.txt"
    classes.write_text("red = something red\ngreen = something green\nblue = something blue\n")
    args = tiny.train_args(pairs, tmp_path / "run", model_file, classes=classes, val_fraction=0.3, epochs=2)
    assert cli.main([*args, "--probe"]) == 0
    tracked = [row["val/zero_shot_acc1"] for row in tiny.rows(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row]
    assert len(tracked) == 2
    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=reject_constant)
    assert list(results["tasks"]) == ["retrieval", "zeroshot", "probe"]
    accuracy = results["tasks"]["zeroshot"]["metrics"]["acc1"]
    assert tracked[-1] == pytest.approx(accuracy["value"])
    assert accuracy["chance"] == pytest.approx(1 / 3)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Zero-shot top-1" in page
    assert "Linear probe top-1" in page


def test_separate_validation_data(tmp_path, pairs, model_file):
    other = tiny.write_pairs(tmp_path / "other", count=8, seed=5)
    assert go(pairs, tmp_path / "run", model_file, val_data=other, epochs=1) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["num_train"], config["num_val"]) == (64, 8)
    tasks = json.loads((tmp_path / "run" / "results.json").read_text())["tasks"]
    assert tasks["retrieval"]["metrics"]["image_to_text.r1"]["chance"] == 1 / 8


def test_a_pretrained_tokenizer(tmp_path, pairs, model_file):
    assert cli.main(["data", "tokenizer", str(pairs), "--out", str(tmp_path / "t.json"), "--vocab-size", "280"]) == 0
    assert go(pairs, tmp_path / "run", model_file, tokenizer=tmp_path / "t.json", epochs=1) == 0
    assert load(tmp_path / "run").tokenizer.vocab_size <= 280
    (tmp_path / "t.json").unlink()
    assert load(tmp_path / "run")  # the run has a copy


# ---------------------------------------------------------------- small and bad datasets


def test_no_pairs(tmp_path, model_file, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "No images found" in error_of(capsys, empty, tmp_path / "run", model_file)


def test_one_pair(tmp_path, model_file, capsys):
    data = tiny.write_pairs(tmp_path / "data", 1)
    assert "one training pair" in error_of(capsys, data, tmp_path / "run", model_file)


def test_fewer_pairs_than_the_batch_size(tmp_path, model_file, capsys):
    data = tiny.write_pairs(tmp_path / "data", 6)
    error = error_of(capsys, data, tmp_path / "run", model_file, batch_size=8)
    assert "--batch-size 5" in error
    assert go(data, tmp_path / "run", model_file, batch_size=5, epochs=2) == 0


@pytest.mark.parametrize("count", [3, 12])
def test_a_few_pairs_train_with_default_settings(tmp_path, model_file, count, real_report):
    data = tiny.write_pairs(tmp_path / "data", count)
    options = {"batch_size": None, "val_fraction": None, "evals": None, "lr": None, "workers": None, "epochs": 1}
    assert go(data, tmp_path / "run", model_file, **options) == 0
    results = json.loads((tmp_path / "run" / "results.json").read_text(), parse_constant=reject_constant)
    assert results["run"]["ended"] == "finished"
    assert "<html" in (tmp_path / "run" / "report.html").read_text()


def test_a_fraction_of_the_pairs(tmp_path, pairs, model_file):
    """The held-out pairs do not depend on the fraction, so that fractions are compared on the same pairs."""
    for fraction in (1, 0.5):
        assert go(pairs, tmp_path / str(fraction), model_file, train_fraction=fraction, epochs=1) == 0
    whole, half = (json.loads((tmp_path / str(f) / "config.json").read_text()) for f in (1, 0.5))
    assert half["num_train"] == round(whole["num_train"] / 2)
    assert half["num_val"] == whole["num_val"] > 0
    rows = tiny.rows(tmp_path / "0.5" / "metrics.jsonl")
    assert [row["epoch"] for row in rows if "loss" in row][-1] == pytest.approx(1, abs=0.3)


def test_unpaired_captions(tmp_path, pairs, model_file, capsys):
    config = replace(recipe("mct")(64), train_fraction=0.25, val_fraction=0.1)
    paired, unpaired = (
        setup.open_data(
            str(pairs), lambda _, flag=flag: replace(config, unpaired_captions=flag), World(0, 1, torch.device("cpu"))
        )[0]
        for flag in (False, True)
    )

    def has_image(index):
        try:
            return len(unpaired.source.image(index)) > 0
        except NoImage:
            return False

    assert {index for index in unpaired.train.tolist() if has_image(index)} == set(paired.train.tolist())
    assert len(unpaired.train) > 3 * len(paired.train)
    assert all(unpaired.source.record(index).captions for index in unpaired.train.tolist())
    assert all(map(has_image, unpaired.val.tolist()))

    def train_on(folder, name, fraction):
        args = tiny.train_args(pairs, tmp_path / folder, model_file, recipe=name, train_fraction=fraction, epochs=1)
        return cli.main([*args, "--unpaired-captions"]), capsys.readouterr().err

    assert train_on("run", "mct", 0.25) == (0, "")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_train"] == len(unpaired.train)
    assert not (tmp_path / "run" / "bad_samples.jsonl").read_text()
    assert train_on("clip", "clip", 0.25) == (
        2,
        "coalign: --unpaired-captions needs a method that trains on captions without images, such as mct or oner; "
        "clip with these settings does not.\n",
    )
    assert "needs a --train-fraction below 1; otherwise, no captions are left out" in train_on("all", "mct", 1)[1]


def test_unpaired_captions_of_weighted_sources(tmp_path, pairs):
    """Unpaired captions do not change the number of pairs per source, and have the same weights as the pairs."""
    other = tiny.write_pairs(tmp_path / "other", 64, seed=1)
    config = replace(recipe("mct")(64), train_fraction=0.5, val_fraction=0.1)

    def counts(unpaired_captions):
        settings = replace(config, unpaired_captions=unpaired_captions)
        data = setup.open_data(f"{pairs} + 0.5*{other}", lambda _: settings, World(0, 1, torch.device("cpu")))[0]
        numbers = {}
        for index in data.train.tolist():
            try:
                kind = "pair" if len(data.source.image(index)) else ""
            except NoImage:
                kind = "text"
            key = data.source.record(index).key.partition(":")[0], kind
            numbers[key] = numbers.get(key, 0) + 1
        return numbers

    paired, unpaired = counts(False), counts(True)
    assert {key: unpaired[key] for key in paired} == paired
    for source in ("1", "2"):
        assert unpaired[source, "text"] == pytest.approx(unpaired[source, "pair"], abs=1)


def test_no_held_out_pairs(tmp_path, pairs, model_file, real_report):
    assert go(pairs, tmp_path / "run", model_file, val_fraction=0, epochs=1) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["num_train"] == 64
    assert json.loads((tmp_path / "run" / "results.json").read_text())["tasks"] == {}
    assert not [row for row in tiny.rows(tmp_path / "run" / "metrics.jsonl") if "val/loss" in row]


def test_data_without_a_train_split(tmp_path, model_file, capsys):
    data = tiny.write_pairs(tmp_path / "data" / "test", 8).parent
    error = error_of(capsys, data, tmp_path / "run", model_file)
    assert "nothing to train on" in error
    assert "test" in error


def test_bad_samples_are_replaced_counted_and_listed(tmp_path, model_file, real_report):
    data = tiny.write_pairs(tmp_path / "data", 32)
    broken = sorted(data.rglob("*.png"))[:2]
    broken[0].write_bytes(b"")
    broken[1].write_bytes(broken[1].read_bytes()[:200])
    assert go(data, tmp_path / "run", model_file, epochs=3) == 0
    listed = tiny.rows(tmp_path / "run" / "bad_samples.jsonl")
    assert {row["key"] for row in listed} <= {str(path.relative_to(data)) for path in broken}
    assert len(listed) == len({row["key"] for row in listed}) >= 1
    counted = json.loads((tmp_path / "run" / "results.json").read_text())["run"]["bad_samples"]
    assert sum(counted.values()) == len(listed)
    page = (tmp_path / "run" / "report.html").read_text()
    assert all(reason in page for reason in counted)


def test_all_samples_bad(tmp_path, model_file, capsys):
    data = tiny.write_pairs(tmp_path / "data", 16)
    for path in data.rglob("*.png"):
        path.write_bytes(b"<html>not found</html>")
    error = error_of(capsys, data, tmp_path / "run", model_file)
    assert "unusable" in error
    assert "not an image (" in error
    assert "coalign data check" in error


def test_more_bad_samples_than_the_budget(tmp_path, model_file, capsys, monkeypatch):
    data = tiny.write_pairs(tmp_path / "data", 64)
    for path in sorted(data.rglob("*.png"))[::2]:
        path.write_bytes(b"")
    monkeypatch.setattr(image_cache, "gettempdir", lambda: str(tmp_path / "temporary"))
    error = error_of(capsys, data, tmp_path / "run", model_file, epochs=3, image_cache=1)
    assert "budget of 1 %" in error
    assert "empty file" in error
    assert not list((tmp_path / "temporary").iterdir())  # no decoded images are left
    assert go(data, tmp_path / "run", model_file, epochs=3, resume="auto", max_bad_fraction=1) == 0
    assert "Decoded images are kept in memory: about " in capsys.readouterr().out


# ---------------------------------------------------------------- resuming


@pytest.fixture
def copy(tmp_path, trained):
    return Path(shutil.copytree(trained, tmp_path / "copy"))


@pytest.fixture
def interrupted(tmp_path, pairs, model_file, monkeypatch):
    """A run that was interrupted after its fifth step."""
    original = Trainer._one_step

    def one_step(self, step, loader, stop):
        if step == 4:
            signal.raise_signal(signal.SIGTERM)
        return original(self, step, loader, stop)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", one_step)
        assert go(pairs, tmp_path / "interrupted", model_file) == cli.INTERRUPTED
    return tmp_path / "interrupted"


def test_a_resumed_run_gives_the_same_result(interrupted, pairs, model_file, trained, capsys):
    capsys.readouterr()
    assert not (interrupted / "results.json").exists()
    assert go(pairs, interrupted, model_file, resume="auto", workers=2, save_every=4, micro_batch=None) == 0
    assert "resuming at step 5 of 21" in capsys.readouterr().out
    one, other = (checkpoint.load(folder / "last") for folder in (trained, interrupted))
    assert all(torch.equal(one.model[name], other.model[name]) for name in one.model)
    results = [json.loads((folder / "results.json").read_text()) for folder in (trained, interrupted)]
    assert results[0]["tasks"] == results[1]["tasks"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 2e-3}, ["lr", "0.001", "0.002"]),
        ({"batch_size": 16}, ["batch_size", "8", "16"]),
        ({"seed": 3}, ["seed"]),
        ({"temperature": 0.1}, ["temperature", "0.07", "0.1"]),
        ({"val_fraction": 0.2}, ["val_fraction", "0.1", "0.2"]),
        ({"max_grad_norm": 1}, ["max_grad_norm", "None", "1.0"]),
    ],
)
def test_resuming_with_other_settings_is_refused(interrupted, pairs, model_file, capsys, changes, words):
    capsys.readouterr()
    error = error_of(capsys, pairs, interrupted, model_file, resume="auto", **changes)
    assert "was started with different settings: " in error
    assert all(word in error for word in words)
    assert len(error) < 600  # lists only the differences


def test_resuming_on_other_data_is_refused(interrupted, tmp_path, model_file, capsys):
    capsys.readouterr()
    fewer = tiny.write_pairs(tmp_path / "fewer", 40)
    assert "training pairs" in error_of(capsys, fewer, interrupted, model_file, resume="auto")
    others = tiny.write_pairs(tmp_path / "others", 64)
    for path in others.rglob("*.png"):
        path.rename(path.with_name(path.name.replace("standing", "sitting")))
    error = error_of(capsys, others, interrupted, model_file, resume="auto")
    assert f"{others} has different pairs" in error


def test_the_data_may_be_moved_before_resuming(interrupted, tmp_path, pairs, model_file):
    elsewhere = shutil.copytree(pairs, tmp_path / "elsewhere")
    assert go(elsewhere, interrupted, model_file, resume="auto") == 0


def test_resuming_a_finished_run_trains_nothing(copy, pairs, model_file, capsys):
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "run.lock"}
    capsys.readouterr()
    assert go(pairs, copy, model_file, resume="auto") == 0
    printed = capsys.readouterr().out
    assert "The run is already complete." in printed
    assert str(copy / "report.html") in printed
    after = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file() and path.name != "run.lock"}
    changed = {path.name for path in before if before[path] != after.get(path)}
    assert not changed
    assert all("tfevents" in path.name for path in after.keys() - before.keys())


def test_resuming_a_run_evaluated_on_older_pixels_evaluates_it_again(copy, pairs, model_file, capsys):
    results = json.loads((copy / "results.json").read_text())
    (copy / "results.json").write_text(json.dumps({**results, "evaluation_view": results["evaluation_view"] - 1}))
    rows = (copy / "metrics.jsonl").read_text()
    assert go(pairs, copy, model_file, resume="auto") == 0
    assert "The run is already complete." not in capsys.readouterr().out
    again = json.loads((copy / "results.json").read_text())
    assert again["evaluation_view"] == results["evaluation_view"]
    assert again["tasks"]["retrieval"]["metrics"] == results["tasks"]["retrieval"]["metrics"]
    assert (copy / "metrics.jsonl").read_text() == rows


def test_every_setting_that_may_change_on_resume_may_change(copy, pairs, model_file, capsys):
    changes = {
        "workers": 1, "image_cache": 1, "save_every": 4, "patience": 100, "max_bad_fraction": 0.5, "max_non_finite": 3,
        "micro_batch": 4, "evals": 5, "feature_folder": copy.parent / "features",
    }  # fmt: skip
    # the run has no classes, which --probe needs, and did not track a task from its start
    assert {*changes, "shard", "gradient_checkpointing", "probe", "skip_data_checks", "track", "data_root"} == set(
        fields_marked(TrainConfig, "may_change_on_resume")
    )
    capsys.readouterr()
    flags = ["--shard", "--gradient-checkpointing", "--skip-data-checks"]
    assert cli.main([*tiny.train_args(pairs, copy, model_file, resume="auto", **changes), *flags]) == 0
    assert "The run is already complete." in capsys.readouterr().out


def test_resuming_writes_a_missing_report(copy, pairs, model_file, real_report):
    (copy / "results.json").unlink()
    (copy / "report.html").unlink()
    weights = (copy / "last" / "model.safetensors").read_bytes()
    assert go(pairs, copy, model_file, resume="auto") == 0
    assert (copy / "report.html").exists()
    assert json.loads((copy / "results.json").read_text())["run"]["ended"] == "finished"
    assert (copy / "last" / "model.safetensors").read_bytes() == weights


def test_early_stopping_is_reported_and_can_be_disabled_on_resume(tmp_path, pairs, model_file):
    out = tmp_path / "run"
    # nothing is learned, so the score does not improve
    options = {"epochs": 4, "evals": 14, "lr": 0, "start_lr": 0, "final_lr": 0}
    assert go(pairs, out, model_file, patience=2, **options) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["run"]["ended"], results["run"]["step"], results["run"]["best_step"]) == ("stopped early", 6, 2)
    assert go(pairs, out, model_file, patience=2, resume="auto", **options) == 0
    assert len([row for row in tiny.rows(out / "metrics.jsonl") if "loss" in row]) == 6
    assert go(pairs, out, model_file, resume="auto", **options) == 0
    results = json.loads((out / "results.json").read_text())
    assert (results["run"]["ended"], results["run"]["step"]) == ("finished", 28)


# ---------------------------------------------------------------- damage


def damage(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_damaged_checkpoint_falls_back_with_a_warning(copy, pairs, model_file, capsys):
    damage(copy / "last" / "model.safetensors")
    capsys.readouterr()
    assert go(pairs, copy, model_file, resume="auto") == 0
    printed = capsys.readouterr().out
    assert "checksum" in printed
    assert "resuming at step" in printed
    assert checkpoint.load(copy / "last").trainer["step"] == 21


def test_only_damaged_checkpoints(copy, pairs, model_file, capsys):
    shutil.rmtree(copy / "last.previous")
    path = copy / "last" / "state.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    error = error_of(capsys, pairs, copy, model_file, resume="auto")
    assert "damaged" in error
    assert "state.safetensors has" in error
    assert cli.main(["eval", str(copy), "--tasks", f"retrieval:{pairs}"]) == 2
    assert "damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"data": 1}', '{"config": {"method": "clop"}}', '{"config": {"method": "clip"}}']
)
def test_a_damaged_configuration(copy, pairs, model_file, capsys, content):
    (copy / "config.json").write_text(content)
    assert "config.json" in error_of(capsys, pairs, copy, model_file, resume="auto")


def test_a_configuration_with_an_invalid_setting(copy, pairs, model_file, capsys):
    saved = json.loads((copy / "config.json").read_text())
    saved["config"]["val_fraction"] = 1.5
    (copy / "config.json").write_text(json.dumps(saved))
    error = error_of(capsys, pairs, copy, model_file, resume="auto")
    assert "config.json cannot be read by this version of coalign: --val-fraction is 1.5, but must be" in error


def test_a_damaged_tokenizer(copy, pairs, model_file, capsys):
    (copy / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in error_of(capsys, pairs, copy, model_file, resume="auto")


def test_weights_of_another_model(copy, pairs, model_file, capsys):
    (copy / "model.json").write_text(json.dumps(tiny.MODEL | {"embed_dim": 24}))
    assert cli.main(["eval", str(copy), "--tasks", f"retrieval:{pairs}"]) == 2
    assert "do not fit" in capsys.readouterr().err


# ---------------------------------------------------------------- initialization from a run


@pytest.mark.parametrize("method", ["clip", "mct", "oner"])
def test_a_second_stage_starts_from_the_first_stage_at_another_image_size(method, tmp_path, pairs, model_file):
    first, second = tmp_path / "first", tmp_path / "second"
    common = {"recipe": method, "epochs": 1, "evals": 1}
    assert go(pairs, first, model_file, **common) == 0
    assert (
        go(
            pairs,
            second,
            model_file,
            **common,
            init_from=first,
            image_size=64,
            lr=0,
            start_lr=0,
            final_lr=0,
            weight_decay=0,
        )
        == 0
    )
    before, after = (load(folder).method.state_dict() for folder in (first, second))
    assert before.keys() == after.keys()
    trained = [name for name, p in load(second).method.named_parameters() if p.requires_grad]
    for name in trained:
        if name.endswith("trunk.positional_embedding"):
            assert after[name].shape == (1 + 16, before[name].shape[1])
            assert torch.equal(after[name][0], before[name][0])
        else:
            assert torch.equal(before[name], after[name]), name
    assert image_size(load(second).method) == 64
    assert (second / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()


def test_errors_of_an_incompatible_first_stage(tmp_path, pairs, model_file, capsys):
    first = tmp_path / "first"
    assert go(pairs, first, model_file, epochs=1, evals=1) == 0
    capsys.readouterr()
    assert "of --init-from has the method clip, but this run has slip; use the same method" in error_of(
        capsys, pairs, tmp_path / "slip", model_file, recipe="slip", init_from=first
    )
    assert "does not exist" in error_of(capsys, pairs, tmp_path / "x", model_file, init_from=tmp_path / "absent")
    assert "do not fit the settings of this run" in error_of(
        capsys, pairs, tmp_path / "y", model_file, init_from=first, context_length=20
    )


def test_test_splits_are_evaluated_at_the_end(tmp_path, pairs, model_file, capsys):
    rows = [
        {
            "image": str(path),
            "caption": path.stem.replace("_", " "),
            "split": "test" if "apple" in path.stem else "train",
        }
        for path in sorted(pairs.rglob("*.png"))
    ]
    table = tmp_path / "pairs.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert go(table, tmp_path / "run", model_file, epochs=1, test_splits="test") == 0
    tested = json.loads((tmp_path / "run/results.json").read_text())["tasks"]["retrieval_test"]
    assert tested["images"] == sum(row["split"] == "test" for row in rows)
    evaluated = evaluate(str(tmp_path / "run"), [f"retrieval:{table}"], EvalConfig(split="test"))[f"retrieval:{table}"]
    assert tested["metrics"]["image_to_text.r1"]["title"] == "Test: image → text R@1"
    assert evaluated["metrics"]["image_to_text.r1"]["title"] == "Image → text R@1"
    one, other = (
        [{**metric, "title": None} for metric in results["metrics"].values()] for results in (tested, evaluated)
    )
    assert one == other
    assert evaluated["images"] == tested["images"]
    _, outcomes = read_outcomes(tmp_path / "run")
    assert outcomes["retrieval_test.image_to_text.r1"].values.mean() == pytest.approx(
        evaluated["metrics"]["image_to_text.r1"]["value"]
    )
    error = error_of(capsys, table, tmp_path / "other", model_file, test_splits="shifted")
    assert "has no split 'shifted' for --test-splits; available: test." in error
    error = error_of(capsys, pairs, tmp_path / "other", model_file, test_splits="test")
    assert "it has none besides train and val" in error


def test_the_image_cache_survives_an_interruption_but_not_the_run(
    pairs, model_file, trained, tmp_path, monkeypatch, capsys
):
    """A resumed run trains the same with the cached images, and removes them at its end."""
    monkeypatch.setattr(image_cache, "gettempdir", lambda: str(tmp_path / "temporary"))
    original = Trainer._one_step

    def one_step(self, step, loader, stop):
        if step == 9:  # in the second epoch
            signal.raise_signal(signal.SIGTERM)
        return original(self, step, loader, stop)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "_one_step", one_step)
        assert go(pairs, tmp_path / "run", model_file, image_cache=1) == cli.INTERRUPTED
    (folder,) = (tmp_path / "temporary").iterdir()
    assert f"The decoded images are kept in {folder}." in capsys.readouterr().out
    used, samples = np.fromfile(folder / "images", np.uint64, 2).tolist()
    assert used > 3 * samples * 8
    assert go(pairs, tmp_path / "run", model_file, image_cache=1, resume="auto") == 0
    assert not list((tmp_path / "temporary").iterdir())
    one, other = (checkpoint.load(folder / "last").model for folder in (trained, tmp_path / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("tagged", [False, True])
def test_missing_tags_are_named_at_the_start(tmp_path, capsys, tagged):
    """On COCO captions, which have no tags, and on a table with and without tags."""
    images = sorted(tiny.write_pairs(tmp_path / "images", 16).rglob("*.png"))
    names = [str(image.relative_to(tmp_path / "images")) for image in images]
    rows = [{"image": f"images/{name}", "caption": f"picture {name}"} for name in names]
    if tagged:
        rows[0]["tags"] = ["red"]
        data = tmp_path / "pairs.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        coco = {
            "images": [{"id": number, "file_name": name} for number, name in enumerate(names)],
            "annotations": [{"image_id": number, "caption": f"picture {name}"} for number, name in enumerate(names)],
        }
        (tmp_path / "captions.json").write_text(json.dumps(coco))
        data = f"coco:{tmp_path / 'captions.json'}:{tmp_path / 'images'}"
    model = tiny.write_model(tmp_path / "model")
    args = tiny.train_args(data, tmp_path / "run", model, recipe="mct", epochs=1, evals=1, queue_size=8)
    assert cli.main([*args, "--skip-data-checks"]) == 0
    assert ("No training pair has tags, so the tag loss of mct stays at 0" in capsys.readouterr().out) is not tagged
