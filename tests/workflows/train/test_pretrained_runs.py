"""Runs that start from a whole open_clip model: their defaults, what they train and how they end."""

import json
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.encoders import write_open_clip
from helpers.equal_runs import assert_equal_runs

import coalign
from coalign.cli import main as cli
from coalign.cli.train import TrainCommand, _parse_settings
from coalign.errors import UserError
from coalign.methods import recipe, recipes
from coalign.methods.defaults import default_config
from coalign.runs.folder import read_config
from coalign.runs.run import load
from coalign.training import checkpoint
from coalign.training.distributed import World
from coalign.workflows.train.setup import resolve

SCALE = 112.0  # SigLIP-SO400M's, above CLIP's limit of 100


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_open_clip(tmp_path_factory.mktemp("weights") / "model", SCALE)


def args(pairs, out, weights, **options):
    return tiny.train_args(pairs, out, weights, **{"pretrained": weights, "tokenizer": "clip", "lr": None} | options)


def settings(*options, num_pairs=10_000):
    """The settings of a command line."""
    return _parse_settings(["--data", "x", "--out", "y", *options], num_pairs, "train", TrainCommand)[1]


# ---------------------------------------------------------------- defaults


def test_without_pretrained_weights_nothing_changes():
    for name, make in recipes().items():
        assert settings("--recipe", name) == make(10_000)
    assert default_config(10_000, "clip", None).optimizer.lr == 2e-3


def test_defaults_fit_the_start():
    full = settings("--pretrained", "openai")
    assert (full.optimizer.lr, full.optimizer.new_lr, full.optimizer.weight_decay, full.epochs) == (1e-5, 1e-3, 0.1, 10)
    assert full.image_layer_decay == 1
    locked = settings("--pretrained", "openai", "--image-tuning", "locked", "--text-tuning", "locked")
    assert (locked.optimizer.lr, locked.optimizer.new_lr, locked.epochs) == (1e-3, None, 30)
    heads = settings("--pretrained", "openai", "--head-epochs", "2")
    assert heads.epochs == 12
    assert settings("--pretrained", "openai", "--image-tuning", "last:0", "--text-tuning", "last:0").epochs == 30


def test_given_options_win():
    config = settings(
        "--pretrained=openai", "--lr", "3e-6", "--epochs", "4", "--temperature", "0.07", "--weight-decay", "0.2"
    )
    assert (config.optimizer.lr, config.epochs, config.optimizer.weight_decay) == (3e-6, 4, 0.2)
    assert config.method_config.temperature == 0.07
    assert config.optimizer.new_lr == 1e-3


def test_the_defaults_of_a_papers_recipe_fit_too():
    """Also one with SGD and rates by role."""
    config = settings("--recipe", "declip-yfcc15m", "--pretrained", "openai")
    rates = {config.optimizer.for_role(role).lr for role in ("image", "text", "scale")}
    assert rates == {1e-5}
    assert config.optimizer.for_role("text").kind == "adamw"


def test_a_recipe_that_starts_from_weights_keeps_its_settings():
    assert settings("--recipe", "mct-coco-bert") == recipe("mct-coco-bert")(10_000)
    assert recipe("mct-coco-bert", seed=1)(10_000) == replace(recipe("mct-coco-bert")(10_000), seed=1)


def test_python_has_the_same_defaults():
    options = {"pretrained": "openai", "image_tuning": "locked"}
    command = settings("--pretrained", "openai", "--image-tuning", "locked")
    assert coalign.recipe("mcd", **options)(10_000) == replace(
        command, method="mcd", method_config=coalign.recipe("mcd", **options)(10_000).method_config
    )
    assert coalign.recipe("clip", **options)(10_000) == command
    assert coalign.recipe("clip", **options, epochs=3)(10_000).epochs == 3
    with pytest.raises(UserError, match="TrainConfig has no setting 'image_tunning'"):
        coalign.recipe("clip", image_tunning="locked")


@pytest.mark.parametrize("lr", ["1e-6", "1e-4", "3e-7"])
def test_any_rate_is_valid_without_a_final_rate(lr):
    for role in ("image", "scale"):
        optimizer = settings("--lr", lr).optimizer.for_role(role)
        assert optimizer.final_lr == pytest.approx(min(1e-5, float(lr) / 10))


# ---------------------------------------------------------------- the temperature


def test_the_temperature_and_its_limit_are_the_pretrained_models(weights, tmp_path):
    config = settings("--model", str(weights), "--pretrained", str(weights))
    assert config.method_config.temperature is None
    resolved = resolve(config, 100, World(0, 1, torch.device("cpu")))
    assert 1 / resolved.method_config.temperature == pytest.approx(SCALE)
    assert resolved.method_config.max_logit_scale == pytest.approx(SCALE)
    given = settings("--model", str(weights), "--pretrained", str(weights), "--temperature", "0.5")
    assert resolve(given, 100, World(0, 1, torch.device("cpu"))).method_config == given.method_config


def test_the_temperature_of_a_trunk_alone_is_clips():
    config = settings("--image-tower", "timm:test_resnet")
    resolved = resolve(config, 100, World(0, 1, torch.device("cpu")))
    assert (resolved.method_config.temperature, resolved.method_config.max_logit_scale) == (0.07, 100)


def test_the_temperature_of_new_heads_is_new(weights):
    own = replace(recipe("clip")(100).method_config, temperature=None)
    config = replace(recipe("clip")(100), model=str(weights), pretrained=str(weights), method_config=own, head="mlp")
    resolved = resolve(config, 100, World(0, 1, torch.device("cpu")))
    assert (resolved.method_config.temperature, resolved.method_config.max_logit_scale) == (0.07, 100)


@pytest.mark.parametrize("option", ["image-tower", "text-tower"])
def test_a_whole_model_does_not_go_with_the_source_of_one_encoder(capsys, option):
    args = ["train", "--data", "x", "--out", "y", "--pretrained", "openai", f"--{option}", "folder"]
    assert cli.main(args) == 2
    assert f"--pretrained loads both encoders, so it does not go with --{option}; give them" in capsys.readouterr().err


def test_weights_that_do_not_exist_are_named_before_their_tokenizer(tmp_path, pairs, capsys):
    assert cli.main(args(pairs, tmp_path / "run", "tiny", pretrained="opena", tokenizer=None)) == 2
    assert "The model tiny has no pretrained weights named 'opena'; use a .safetensors" in capsys.readouterr().err


# ---------------------------------------------------------------- runs


def test_a_run_trains_only_the_projections(tmp_path, pairs, weights, capsys):
    out = tmp_path / "run"
    assert cli.main(args(pairs, out, weights, **{"image-tuning": "last:0", "text-tuning": "locked", "epochs": 1})) == 0
    trained, start = checkpoint.load(out / "last").model, checkpoint_of(weights)
    assert torch.equal(trained["image.trunk.conv1.weight"], start["visual.conv1.weight"])
    assert torch.equal(trained["text.projection.weight"], start["text.text_projection"].T)
    assert not torch.equal(trained["image.projection.weight"], start["visual.proj"].T)
    assert trained["logit_scale.log"].exp().item() == pytest.approx(SCALE, rel=1e-3)  # not clamped to 100
    results = json.loads((out / "results.json").read_text())
    assert results["parameters"] == {"image": 32 * 16, "text": 0, "scale": 1}
    assert results["frozen_parameters"]["text"] == sum(p.numel() for p in load(out).method.text.parameters())
    assert "0.0 M parameters, 0.8 M more frozen" in capsys.readouterr().out
    rows = [row for row in tiny.rows(out / "metrics.jsonl") if "lr" in row]
    assert {name for name in rows[0] if name.startswith("lr/")} == {"lr/image.projection", "lr/scale"}
    assert read_config(out).config.method_config.max_logit_scale == pytest.approx(SCALE)


def checkpoint_of(weights):
    from safetensors.torch import load_file

    return load_file(weights / "open_clip_model.safetensors")


def test_a_resumed_run_does_not_read_the_temperature_again(tmp_path, pairs, weights):
    options = {"image-tuning": "locked", "head": "mlp", "head-epochs": 1, "epochs": 2}
    assert cli.main(args(pairs, tmp_path / "whole", weights, **options)) == 0
    out = tmp_path / "run"
    assert cli.main(args(pairs, out, weights, **options)) == 0
    assert_equal_runs(tmp_path / "whole", out)
    assert cli.main(args(pairs, out, weights, **options, resume="auto")) == 0


def test_both_encoders_of_a_folder_equal_the_whole_model(tmp_path, pairs, weights):
    """Also for a run that continues another one, whose encoders start from weights whenever it is resumed."""
    still = {"lr": 1e-9, "new-lr": 1e-9, "start-lr": 0, "final-lr": 0, "epochs": 1, "evals": 1}
    whole, both, more = tmp_path / "whole", tmp_path / "both", tmp_path / "more"
    assert cli.main(args(pairs, whole, weights, **still)) == 0
    towers = {"model": "tiny", "image-tower": weights, "text-tower": weights, "tokenizer": None, "pretrained": None}
    assert cli.main(args(pairs, both, weights, **still, **towers)) == 0
    one, other = load(whole), load(both)
    assert one.method.image.starts == other.method.image.starts == other.method.text.starts
    for name, value in one.method.state_dict().items():
        if name != "logit_scale.log":
            torch.testing.assert_close(other.method.state_dict()[name], value, atol=1e-6, rtol=0)
    text = ["a red apple"]
    torch.testing.assert_close(other.encoder().encode_text(text), one.encoder().encode_text(text), atol=1e-5, rtol=0)
    options = {"model": "tiny", "init-from": both, "tokenizer": None, "pretrained": None, "image-tuning": "last:1"}
    arguments = args(pairs, more, weights, **still, **options)
    assert cli.main([*arguments, "--dry-run"]) == 0
    assert cli.main(arguments) == 0
    (more / "results.json").unlink()  # so that resuming has something to do
    assert cli.main([*arguments, "--resume", "auto"]) == 0
    assert load(more).method.image.starts["trunk"] == str(weights)  # of the model that the run started from


@pytest.mark.parametrize("head", ["mlp", "glu"])
def test_runs_with_other_heads_load_and_are_exported_to_onnx(tmp_path, pairs, weights, head, capsys):
    out = tmp_path / "run"
    assert cli.main(args(pairs, out, weights, head=head, epochs=1)) == 0
    embeds = load(out).encoder().encode_text(["a red apple"])
    assert embeds.shape == (1, 16)
    assert cli.main(["export", str(out), "--to", "open_clip", "--out", str(tmp_path / "open_clip")]) == 2
    assert (
        f"open_clip holds linear projections only, but this model has --head {head}; use --to onnx"
        in capsys.readouterr().err
    )
    pytest.importorskip("onnxruntime")
    assert cli.main(["export", str(out), "--to", "onnx", "--out", str(tmp_path / "onnx")]) == 0


def test_a_dry_run_shows_parts_and_rates(tmp_path, pairs, weights, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    options = {"image-tuning": "locked", "head": "mlp", "text-layer-decay": 0.5, "lr": 2e-4}
    assert cli.main([*args(pairs, tmp_path / "run", weights, **options), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    rows = {cells[0]: cells[1:] for cells in (
        [cell.strip() for cell in line.strip("│").split("│")] for line in printed.splitlines() if line.startswith("│")
    )}  # fmt: skip
    assert rows["image trunk"][0] == "/".join(weights.parts[-2:])
    assert rows["image trunk"][1] == "frozen"
    assert rows["image projection"][0] == "random values"
    assert rows["image projection"][-1] == "0.001"
    assert rows["text trunk"][-1] == "0.0002"
    assert "The learning rate of the pretrained text encoder, 0.0002, is above 0.0001" in printed


# ---------------------------------------------------------------- BatchNorm


@pytest.mark.parametrize("option", [{"micro-batch": 1}, {"batch-norm-group": 1}])
def test_batch_norm_of_single_samples_is_refused(tmp_path, pairs, capsys, option):
    assert cli.main(tiny.train_args(pairs, tmp_path / "run", "tiny", **{"image-size": 32}, **option)) == 2
    error = capsys.readouterr().err
    assert "tiny has BatchNorm, which cannot train on single samples; set" in error
    assert "--image-tuning locked" in error
    assert "ViT-B-32" in error


# ---------------------------------------------------------------- views


def test_hue_and_flips_are_off_if_captions_name_colors_and_sides():
    from coalign.workflows.train.safe_views import with_safe_views

    captions = ["a red chair", "a lamp to the left", *["a lamp"] * 18]
    config, line = with_safe_views(recipe("slip")(10_000), captions)
    before = recipe("slip")(10_000).method_config
    assert config.method_config == replace(before, ssl_view=replace(before.ssl_view, hue=0.0, flip_p=0.0))
    assert line == (
        "Of the sampled captions, 5% name colors and 5% name sides, so hue shifts and flips of ssl_view are off; "
        "--no-caption-safe-views keeps them."
    )
    assert with_safe_views(config, captions) == (config, None)  # views that are not the method's own are kept
    for kept in (recipe("slip-cc3m")(10_000), settings("--recipe", "slip", "--no-caption-safe-views")):
        assert with_safe_views(kept, captions) == (kept, None)
    own = settings("--recipe", "slip", "--ssl-view.hue", "0.2", "--ssl-view.flip-p", "0.1")
    assert with_safe_views(own, captions) == (own, None)
    plain = recipe("slip")(10_000)
    for others in (["a lamp", "a righteous redneck"], []):
        assert with_safe_views(plain, others) == (plain, None)
    assert with_safe_views(recipe("clip")(10_000), captions)[1] is None  # it has no strong views
    assert "flips of strong_image_view are off" in with_safe_views(recipe("clip-strong")(10_000), captions)[1]


def test_changed_views_are_recorded_and_said(tmp_path, pairs, model_file, capsys):
    """The captions of `pairs` name a color each."""
    out = tmp_path / "run"
    options = {"recipe": "slip", "epochs": 1, "ssl-hidden": 16, "ssl-dim": 8}
    assert cli.main(tiny.train_args(pairs, out, model_file, **options)) == 0
    assert "name colors, so hue shifts of ssl_view are off" in capsys.readouterr().out
    view = read_config(out).config.method_config.ssl_view
    assert (view.hue, view.flip_p) == (0.0, 0.5)
    assert cli.main(tiny.train_args(pairs, out, model_file, **options, resume="auto")) == 0


# ---------------------------------------------------------------- resumed


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("options", [{"image-tuning": "last:0", "text-tuning": "last:0"}, {"head": "mlp"}])
def test_a_run_that_is_killed_before_its_first_checkpoint(tmp_path, pairs, weights, monkeypatch, options):
    """It starts from the pretrained weights again, not from random ones."""
    from coalign.workflows.train.caches.features import RunFeatures

    assert cli.main(args(pairs, tmp_path / "whole", weights, **options, epochs=1)) == 0

    def killed(*args):
        raise StoppedError

    with monkeypatch.context() as patch:
        patch.setattr(RunFeatures, "compute", killed)
        with pytest.raises(StoppedError):
            cli.main(args(pairs, tmp_path / "run", weights, **options, epochs=1))
    assert cli.main(args(pairs, tmp_path / "run", weights, **options, epochs=1, resume="auto")) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_a_run_from_another_run_is_tuned_and_resumed(tmp_path, pairs, model_file, capsys):
    """All parts start from the run, also after an interruption."""
    assert cli.main(tiny.train_args(pairs, tmp_path / "first", model_file, epochs=1)) == 0
    options = {"init-from": tmp_path / "first", "image-tuning": "locked", "text-tuning": "last:0"}
    out = tmp_path / "run"
    assert cli.main(tiny.train_args(pairs, out, model_file, **options)) == 0
    assert "destroys" not in capsys.readouterr().out  # weights from scratch go on at their own rate
    weights = checkpoint.load(out / "last").model
    start = checkpoint.load(tmp_path / "first" / "last").model
    changed = {name for name, value in weights.items() if not torch.equal(value, start[name])}
    assert changed == {"text.projection.weight", "logit_scale.log"}
    assert cli.main(tiny.train_args(pairs, out, model_file, **options, resume="auto")) == 0
    assert "already complete" in capsys.readouterr().out
