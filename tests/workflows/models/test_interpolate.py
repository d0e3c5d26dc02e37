"""interpolate(): the weights of the runs it writes, what it refuses, and how it chooses α."""

import json
import shutil

import pytest
import torch
from helpers import tiny
from helpers.equal_runs import assert_equal_weights

from coalign.cli import main as cli
from coalign.errors import UserError
from coalign.experiments.compare.compare import compare
from coalign.runs.card import card
from coalign.runs.folder import read_results
from coalign.runs.run import load
from coalign.training import checkpoint
from coalign.workflows.evaluate.evaluate import evaluate
from coalign.workflows.models.export import export
from coalign.workflows.models.interpolate import interpolate
from coalign.workflows.train import run_report

TEXTS = ["red apple standing", "a green boat", "", "blue"]
PIXELS = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
RESNET = {**tiny.MODEL, "vision_cfg": {"image_size": 32, "timm_model_name": "test_resnet"}}


def go(pairs, out, model, **options):
    return cli.main(tiny.train_args(pairs, out, model, **{"evals": 0, "epochs": 1} | options))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, pairs):
    """A run of a ResNet with BatchNorm, its export, a run from the export, and one that continues the first."""
    root = tmp_path_factory.mktemp("runs")
    (root / "resnet.json").write_text(json.dumps(RESNET))
    with pytest.MonkeyPatch.context() as context:
        context.setattr(run_report, "write_run_report", lambda data, out, *rest: ("verdict", out / "report.html"))
        group = {"batch-norm-group": 4, "val-fraction": 0.25}
        assert go(pairs, root / "first", root / "resnet.json", epochs=3, **group) == 0
        export(root / "first", "open_clip", root / "exported")
        options = group | {"pretrained": root / "exported", "tokenizer": root / "first/tokenizer.json", "seed": 1}
        assert go(pairs, root / "tuned", root / "exported", **options) == 0
        assert go(pairs, root / "more", root / "resnet.json", **group, **{"init-from": root / "first"}) == 0
    return root


def embeds(folder):
    encoder = load(folder).encoder()
    return encoder.encode_image(PIXELS), encoder.encode_text(TEXTS)


def weights(folder, name="last"):
    return checkpoint.load(folder / name).model


@pytest.fixture(scope="module")
def between(runs, tmp_path_factory):
    return interpolate(
        runs / "first", runs / "more", tmp_path_factory.mktemp("out") / "between", [0.5, 0, 1, 0.5, 0.25]
    )


def test_the_ends_are_start_and_run_bit_for_bit(runs, between):
    assert list(between.runs) == [0, 0.25, 0.5, 1]
    for alpha, name in ((0, "first"), (1, "more")):
        for ours, theirs in zip(embeds(between.runs[alpha]), embeds(runs / name)):
            assert torch.equal(ours, theirs)


def test_weights_between_are_those_of_the_formula(runs, between):
    """Each number by itself: (1 − α)·start + α·run, running statistics included; counters are the run's."""
    start, run = weights(runs / "first"), weights(runs / "more")
    assert any("running_var" in name for name in start)
    for alpha in (0.25, 0.5):
        mixed = weights(between.runs[alpha])
        assert mixed.keys() == run.keys()
        for name, value in mixed.items():
            if not value.is_floating_point():
                assert torch.equal(value, run[name])
                continue
            pairs = zip(start[name].flatten().tolist(), run[name].flatten().tolist())
            expected = torch.tensor([(1 - alpha) * a + alpha * b for a, b in pairs]).reshape(value.shape)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-8)
    assert between.taken_from_run == []


def test_from_an_export_and_from_the_stored_start(runs, tmp_path):
    """A run that started from an export: both name the same start, and the temperature, which an export does not set, is the run's."""
    exported, stored = (
        interpolate(start, runs / "tuned", tmp_path / name, [0, 0.5])
        for name, start in (("exported", runs / "exported"), ("stored", "start"))
    )
    for alpha in (0, 0.5):
        assert_equal_weights(weights(exported.runs[alpha]), weights(stored.runs[alpha]))
    assert exported.taken_from_run == stored.taken_from_run
    own = [name for name in stored.taken_from_run if weights(runs / "tuned")[name].is_floating_point()]
    assert own
    assert not [name for name in own if name.startswith(("image.", "text."))]
    for name in own:
        assert torch.equal(weights(stored.runs[0])[name], weights(runs / "tuned")[name])
    for ours, theirs in zip(embeds(stored.runs[0]), embeds(runs / "first")):
        torch.testing.assert_close(ours, theirs)
    shutil.rmtree(runs / "exported")  # the source may be gone
    again = interpolate("start", runs / "tuned", tmp_path / "again", [0.5])
    assert_equal_weights(weights(again.runs[0.5]), weights(stored.runs[0.5]))


def test_alpha_is_chosen_by_the_score_of_validation_on_held_out_pairs(runs, between, tmp_path, pairs):
    for alpha, folder in between.runs.items():
        found = evaluate(folder, [f"retrieval:{pairs}"])[f"retrieval:{pairs}"]
        assert found["split"] == "val"
        recalls = [each["value"] for each in found["metrics"].values() if each["kind"] == "rate"]
        assert between.scores[alpha] == pytest.approx(sum(recalls) / len(recalls))
        assert {metric.name for metric in between.metrics[alpha]} == set(found["metrics"])
    best = max(between.scores.values())
    assert between.chosen == min(alpha for alpha, score in between.scores.items() if score == best)
    same = interpolate(runs / "more", runs / "more", tmp_path / "same", [1, 0.5, 0])
    assert len(set(same.scores.values())) == 1
    assert same.chosen == 0  # of equals, the smallest


def test_the_runs_are_like_any_other(runs, between, tmp_path, capsys, pairs):
    folder = between.runs[0.5]
    assert read_results(folder)["tasks"]["retrieval"]["images"] > 2
    assert export(folder, "open_clip", tmp_path / "exported").is_dir()
    comparison = compare([runs / "more", folder])
    assert comparison.groups[1].metrics["retrieval.image_to_text.r1"].difference_over_items is not None
    assert "- weights: 0.5 × first + 0.5 × more, WiSE-FT" in card(folder)
    capsys.readouterr()
    options = {"batch-norm-group": 4, "val-fraction": 0.25, "init-from": runs / "first", "resume": "auto"}
    assert go(pairs, folder, runs / "resnet.json", **options) == 2
    assert (
        "were interpolated (0.5 × first + 0.5 × more, WiSE-FT), so there is no training to resume"
        in capsys.readouterr().err
    )
    assert go(pairs, tmp_path / "on", runs / "resnet.json", **{"init-from": folder, "batch-norm-group": 4}) == 0


def test_the_command_prints_a_table(runs, tmp_path, capsys):
    capsys.readouterr()
    assert (
        cli.main(
            [
                "interpolate",
                str(runs / "first"),
                str(runs / "more"),
                "--alpha",
                "0",
                "1",
                "--out",
                str(tmp_path / "out"),
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    assert "Image → text R@1" in printed
    assert "95 % bootstrap intervals" in printed
    assert "Chosen on the validation pairs: α = " in printed
    assert cli.main(["interpolate", "start", str(runs / "more"), "--alpha", "2", "--out", str(tmp_path / "other")]) == 2
    assert "--alpha is 2, but must be between 0 and 1." in capsys.readouterr().err


def test_what_cannot_be_interpolated(runs, tmp_path, pairs, model_file, trained, capsys):
    def refused(start, run, message, out="out"):
        with pytest.raises(UserError, match=message):
            interpolate(start, run, tmp_path / out)
        assert not (tmp_path / out).exists()

    assert go(pairs, tmp_path / "wide", tmp_path / "wide.json", **_wide(tmp_path)) == 0
    refused("start", runs / "first", "has not stored what it started from, as its first weights were random")
    refused(tmp_path / "nothing", runs / "more", "does not exist; give a run, a folder in open_clip's format, or")
    refused(tmp_path, runs / "more", "holds no model; give a run, a folder in open_clip's format")
    refused(trained, runs / "more", "have different models: image.trunk.* is in one of them only")
    refused(tmp_path / "wide", trained, "has the shape .* in wide and .*; interpolation needs equal shapes")
    copy = tmp_path / "copy"
    shutil.copytree(runs / "more", copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = tokenizer["model"]["merges"][:-1]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    refused(copy, runs / "more", "have different tokenizers")
    data = tmp_path / "data"
    shutil.copytree(pairs, data)
    assert go(data, tmp_path / "run", model_file) == 0
    next(data.rglob("*.png")).unlink()
    refused(tmp_path / "run", tmp_path / "run", "has changed since")


def _wide(folder):
    model = {**tiny.MODEL, "embed_dim": 24}
    (folder / "wide.json").write_text(json.dumps(model))
    return {}


def test_a_run_without_held_out_pairs_has_no_chosen_alpha(tmp_path, pairs, model_file, capsys):
    options = {"val-fraction": 0, "epochs": 1, "evals": 0}
    args = [*tiny.train_args(pairs, tmp_path / "run", model_file, **options), "--skip-data-checks"]
    assert cli.main(args) == 0
    result = interpolate(tmp_path / "run", tmp_path / "run", tmp_path / "out", [0.5])
    assert result.chosen is None
    assert not (result.runs[0.5] / "results.json").exists()
    assert load(result.runs[0.5])
