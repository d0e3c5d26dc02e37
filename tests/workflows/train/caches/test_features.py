"""Locked towers compute their features once: the run is the one that computes them in every step, and takes no tower pass."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.builders import build_method, make_batch
from helpers.equal_runs import assert_equal_runs, assert_equal_weights, untimed
from PIL import Image

from coalign.cli import main as cli
from coalign.config import OptimizerConfig
from coalign.data.images import evaluation_view
from coalign.data.images.decode import OpenedImage
from coalign.data.loading.cached_views import to_float
from coalign.data.loading.feature_file import MISSING, FeatureFile
from coalign.data.loading.order import order
from coalign.methods import recipe
from coalign.networks.towers.image import ImageTower
from coalign.networks.towers.text import TextTower
from coalign.training import checkpoint
from coalign.training.trainer import Trainer
from coalign.types import AugmentationPolicy, StepInfo
from coalign.workflows.train import setup
from coalign.workflows.train.caches import features as run_features
from coalign.workflows.train.train import train

LOCKED = {"image_tuning": "locked", "text_tuning": "locked"}
METHODS = ["clip", "slip", "uniclip", "declip", "mcd", "mct"]


@pytest.fixture(autouse=True)
def quick(without_run_reports, monkeypatch):
    """Runs of towers that count as pretrained, with random weights, and end without a report."""
    build = setup.build_method

    def pretrained(*args):
        method = build(*args)
        method.image.starts["trunk"] = method.text.starts["trunk"] = "weights"
        return method

    monkeypatch.setattr(setup, "build_method", pretrained)


# `coalign` with such towers, in another process
COMMAND = """
import sys
from coalign.cli.main import main
from coalign.workflows.train import setup
build = setup.build_method
def pretrained(*args):
    method = build(*args)
    method.image.starts["trunk"] = method.text.starts["trunk"] = "weights"
    return method
setup.build_method = pretrained
"""


def go(pairs, out, model, **options):
    return cli.main(tiny.train_args(pairs, out, model, **LOCKED | options))


def config_for(model, recipe_name="clip", **changes):
    """Settings of a short run with plain SGD at a constant rate, without warm-up."""

    def config(num_pairs):
        settings = replace(
            recipe(recipe_name)(num_pairs),
            model=str(model), context_length=12, batch_size=8, epochs=3, workers=0, val_fraction=0.1, evals=2,
            image_size=None, precision="fp32",
            optimizer=OptimizerConfig("sgd", lr=0.05, new_lr=0.05, start_lr=0.05, final_lr=0.05, weight_decay=0.0, momentum=0.0),
        )  # fmt: skip
        return replace(settings, **LOCKED | changes)

    return config


def evaluation_views(config):
    """The configuration of a method whose image views are the evaluation view."""
    views = {
        name: AugmentationPolicy()
        for name, value in vars(config.method_config).items()
        if isinstance(value, AugmentationPolicy)
    }
    return replace(config, method_config=replace(config.method_config, **views))


@pytest.fixture
def towers(monkeypatch):
    """Counts the samples that pass through the towers' trunks, by tower and whether the method is in training mode."""
    counts = {"image": 0, "text": 0, "decoded": 0}

    def counting(name, original):
        def forward(self, inputs, *rest, **options):
            counts[name] += len(inputs) if inputs.ndim == 4 or not inputs.is_floating_point() else 0
            return original(self, inputs, *rest, **options)

        return forward

    def decode(self, *args, **options):
        counts["decoded"] += 1
        return original_decode(self, *args, **options)

    original_decode = OpenedImage.decode
    monkeypatch.setattr(ImageTower, "forward", counting("image", ImageTower.forward))
    monkeypatch.setattr(TextTower, "forward", counting("text", TextTower.forward))
    monkeypatch.setattr(OpenedImage, "decode", decode)
    return counts


@pytest.fixture
def kept(monkeypatch):
    """Keeps the files of features after a run."""
    monkeypatch.setattr(run_features.RunFeatures, "remove", lambda self: None)


# ---------------------------------------------------------------- equal to a run without a cache


def test_a_cached_run_is_the_uncached_run_on_evaluation_views(tmp_path, pairs, model_file):
    for name, views in (("cached", 1), ("uncached", 0)):
        settings = config_for(model_file, feature_views=views)
        train(str(pairs), tmp_path / name, lambda num, settings=settings: evaluation_views(settings(num)))
    weights = [checkpoint.load(tmp_path / name / "last").model for name in ("cached", "uncached")]
    for one, other in zip(untimed(tmp_path / "cached"), untimed(tmp_path / "uncached"), strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() & {"loss", "val/loss", "grad_norm"}:
            assert one[name] == pytest.approx(other[name], rel=0.02)  # bfloat16 has a relative precision of 0.4 %
    start = recipe_weights(tmp_path, pairs, model_file)
    for name, value in weights[0].items():
        if torch.equal(start[name], weights[1][name]):
            assert torch.equal(value, start[name])  # locked
        else:
            moved = (weights[1][name] - start[name]).norm()
            assert (value - weights[1][name]).norm() < 0.02 * moved
    assert sum(not torch.equal(start[name], value) for name, value in weights[0].items()) == 3  # projections and scale


def recipe_weights(tmp_path, pairs, model_file):
    """The weights before the first step: those after a step at a rate of zero."""
    zero = OptimizerConfig("sgd", lr=0.0, new_lr=0.0, start_lr=0.0, final_lr=0.0, weight_decay=0.0, momentum=0.0)
    train(str(pairs), tmp_path / "start", config_for(model_file, optimizer=zero, epochs=0.2, evals=0))
    return checkpoint.load(tmp_path / "start" / "last").model


@pytest.mark.parametrize("name", METHODS)
def test_every_method_encodes_features_as_it_encodes_pixels_and_ids(name, tmp_path):
    off = {"declip": {"text_ss": False}, "mcd": {"mlm": False}}.get(name, {})
    method = build_method(name, tmp_path, **off).eval()
    batch, step = make_batch(method.view_plan, 6), StepInfo(1, 10)
    with torch.no_grad():
        images = {view: replace(each, pixels=method.image(each.pixels).pooled) for view, each in batch.images.items()}
        texts = {
            view: replace(
                each, ids=method.text(each.ids, each.lengths).pooled, lengths=torch.zeros(6, dtype=torch.int64)
            )
            for view, each in batch.texts.items()
        }
        for part in (
            replace(batch, images=images),
            replace(batch, texts=texts),
            replace(batch, images=images, texts=texts),
        ):
            for encode in (method.encode, method.encode_targets):
                expected, values = encode(batch, step), encode(part, step)
                assert values.keys() == expected.keys()
                for feature, value in values.items():
                    torch.testing.assert_close(value, expected[feature], rtol=1e-9, atol=1e-9, msg=feature)


# ---------------------------------------------------------------- a naive transcription


def test_linear_heads_train_as_in_a_transcription_to_numpy(tmp_path, pairs, model_file, kept):
    """InfoNCE of both directions on the stored features, with its gradient by hand, and plain gradient descent."""
    settings = config_for(model_file, evals=0, epochs=2)
    plain = lambda num: replace(settings(num), method_config=replace(settings(num).method_config, multi_positive=False))  # noqa: E731
    start = recipe_weights(tmp_path, pairs, model_file)
    train(str(pairs), tmp_path / "run", plain)
    trained = checkpoint.load(tmp_path / "run" / "last").model
    images, texts = (stored(tmp_path / "run" / "features" / f"train_{kind}s") for kind in ("image", "text"))
    assert len(images) == len(texts) - 1 == 59  # a caption each, and the empty caption

    w, v = start["image.projection.weight"].double().numpy(), start["text.projection.weight"].double().numpy()
    (scale_name,) = (name for name in start if name.startswith("logit_scale"))
    scale, losses = float(start[scale_name]), []
    for step in range(14):
        epoch, batch = divmod(step, 7)
        rows = order(59, 0, epoch)[np.arange(8 * batch, 8 * batch + 8)]  # rows are in the order of the training pairs
        x, y = images[rows], texts[rows]
        a, b = x @ w.T, y @ v.T
        a_norm, b_norm = np.linalg.norm(a, axis=1, keepdims=True), np.linalg.norm(b, axis=1, keepdims=True)
        a, b = a / a_norm, b / b_norm
        logits = np.exp(scale) * a @ b.T
        p, q = softmax(logits), softmax(logits.T).T
        losses.append(-(np.log(np.diag(p)) + np.log(np.diag(q))).mean() / 2)
        gradient = (p + q - 2 * np.eye(8)) / 16
        a_gradient, b_gradient = np.exp(scale) * gradient @ b, np.exp(scale) * gradient.T @ a
        a_gradient = (a_gradient - a * (a_gradient * a).sum(1, keepdims=True)) / a_norm
        b_gradient = (b_gradient - b * (b_gradient * b).sum(1, keepdims=True)) / b_norm
        w, v = w - 0.05 * a_gradient.T @ x, v - 0.05 * b_gradient.T @ y
        scale = min(max(scale - 0.05 * (gradient * logits).sum(), 0), np.log(100))
    logged = [row["loss"] for row in tiny.rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    np.testing.assert_allclose(logged, losses, rtol=1e-5)
    np.testing.assert_allclose(trained["image.projection.weight"], w, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trained["text.projection.weight"], v, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(trained[scale_name], scale, rtol=1e-5)


def softmax(logits):
    exponentials = np.exp(logits - logits.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def stored(path):
    """The features in a file of one variant, read from its end, where they are."""
    width, params = (32, 11) if path.name.endswith("images") else (16, 0)
    size = path.stat().st_size
    rows = next(rows for rows in range(1, 1000) if FeatureFile(path, rows, 1, width, params).num_bytes == size)
    numbers = np.frombuffer(path.read_bytes()[-2 * rows * width :], np.uint16).reshape(rows, width)
    return to_float(numbers.copy()).double().numpy()


# ---------------------------------------------------------------- what runs, and when


def test_towers_run_once_for_each_sample_and_each_validation_reads_features(
    tmp_path, pairs, model_file, towers, monkeypatch
):
    monkeypatch.setattr("coalign.workflows.train.train.evaluate_held_out", lambda *_: {})
    estimate = 2 * (1 + run_features._TIMED)  # rows of which the time is taken, of training and of held-out pairs
    for epochs in (3, 6):
        towers.update(image=0, text=0)
        assert (
            go(pairs, tmp_path / str(epochs), model_file, epochs=epochs, evals=2 * epochs, group_look_alikes=None) == 0
        )
        # the training pairs; the held-out pairs for the loss and for retrieval
        assert towers["image"] <= 59 + 5 + 5 + estimate
        assert towers["text"] <= 60 + 6 + 5 + estimate
        assert not (tmp_path / str(epochs) / "features").exists()


@pytest.mark.parametrize("locked", ["image", "text"])
def test_one_locked_tower(tmp_path, pairs, model_file, towers, locked, monkeypatch):
    batches = []
    one_step = Trainer._one_step

    def recording(self, step, loader, signal):
        def recorded():
            for loaded in loader:
                batches.append(loaded.batch)
                yield loaded

        return one_step(self, step, recorded(), signal)

    monkeypatch.setattr(Trainer, "_one_step", recording)
    tuning = {"image_tuning": "full", "text_tuning": "full", f"{locked}_tuning": "locked"}
    assert go(pairs, tmp_path / "run", model_file, **tuning, epochs=1) == 0
    assert batches[0].images["image"].pixels.dtype == (torch.float32 if locked == "image" else torch.uint8)
    assert batches[0].texts["caption"].ids.dtype == (torch.float32 if locked == "text" else torch.int64)
    assert batches[0].images["image"].params[:, 2:4].max() <= 1


def test_no_image_is_decoded_by_a_step(tmp_path, pairs, model_file, towers, monkeypatch):
    one_step = Trainer._one_step
    during = []

    def watched(self, *args):
        before = towers["decoded"]
        result = one_step(self, *args)
        during.append(towers["decoded"] - before)
        return result

    monkeypatch.setattr(Trainer, "_one_step", watched)
    assert go(pairs, tmp_path / "run", model_file) == 0
    assert (len(during), sum(during)) == (21, 0)
    assert towers["decoded"] > 0


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_two_views(tmp_path, pairs, model_file, name):
    off = {"declip": ["--no-text-ss"], "mcd": ["--no-mlm"], "mct": ["--no-j-tag"]}.get(name, [])
    args = tiny.train_args(pairs, tmp_path / "run", model_file, **LOCKED, feature_views=2, recipe=name, epochs=2)
    assert cli.main([*args, *off]) == 0
    losses = [row["loss"] for row in tiny.rows(tmp_path / "run" / "metrics.jsonl") if "loss" in row]
    assert len(losses) == 14
    assert np.isfinite(losses).all()


# ---------------------------------------------------------------- the same run: resumed, with ranks, in micro-batches


def stop_at(monkeypatch, step):
    """Sends Ctrl-C in a step."""
    one_step = Trainer._one_step

    def stopping(self, number, *args):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return one_step(self, number, *args)

    monkeypatch.setattr(Trainer, "_one_step", stopping)


def test_an_interrupted_run_keeps_its_features_and_resumes_bit_for_bit(
    tmp_path, pairs, model_file, monkeypatch, towers, capsys
):
    options = {"recipe": "uniclip", "feature_views": 3, "save_every": 5, "evals": 1}
    assert go(pairs, tmp_path / "whole", model_file, **options) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert go(pairs, tmp_path / "parts", model_file, **options) == cli.INTERRUPTED
    assert (
        f"The features of the locked towers are kept in {tmp_path / 'parts' / 'features'}." in capsys.readouterr().out
    )
    towers.update(image=0, text=0)
    assert go(pairs, tmp_path / "parts", model_file, resume="auto", **options) == 0
    assert towers["image"] <= 5 + 5  # of the last validation and the final evaluation
    assert "computed once" not in capsys.readouterr().out
    assert_equal_runs(tmp_path / "whole", tmp_path / "parts")
    assert not (tmp_path / "parts" / "features").exists()


def test_micro_batches_give_the_same_run(tmp_path, pairs, model_file):
    for name, options in (("whole", {}), ("slices", {"micro_batch": 3})):
        assert go(pairs, tmp_path / name, model_file, precision="fp32", **options) == 0
    weights = [checkpoint.load(tmp_path / name / "last").model for name in ("whole", "slices")]
    assert_equal_weights(*weights, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
def test_two_processes_make_the_same_features_and_the_same_run(tmp_path, pairs, model_file, shared):
    options = {**LOCKED, "precision": "fp32", "feature_views": 2, "epochs": 4}
    script = tmp_path / "command.py"
    script.write_text(COMMAND + "sys.exit(main(sys.argv[1:]))")
    launcher = ["-m", "torch.distributed.run", "--standalone"]
    for name, processes in (("one", 1), ("two", 2)):
        folder = {"feature_folder": tmp_path / f"features of {name}"} if shared else {}
        args = tiny.train_args(pairs, tmp_path / name, model_file, **options, **folder)
        command = [sys.executable, *launcher, f"--nproc-per-node={processes}", str(script), *args]
        ended = subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
        )
        assert ended.returncode == 0, ended.stdout + ended.stderr
    weights = [checkpoint.load(tmp_path / name / "last").model for name in ("one", "two")]
    assert_equal_weights(*weights, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- the pass: killed, damaged, bad samples

# The features of a run in chunks of two images, with a pause after each.
PASS = f"""{COMMAND}
import time
from coalign.data.loading.feature_file import FeatureFile
from coalign.workflows.train.caches import features
features.CHUNK = 2
write = FeatureFile.write
def slowly(self, *args):
    write(self, *args)
    time.sleep(float(sys.argv[1]))
FeatureFile.write = slowly
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_killed_pass_goes_on_where_it_was(tmp_path, pairs, model_file, monkeypatch, kept, towers, capsys):
    out, whole = tmp_path / "killed", tmp_path / "whole"
    args = tiny.train_args(pairs, out, model_file, **LOCKED, resume="auto", epochs=1, evals=0)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([sys.executable, "-c", PASS, "0.2", *args], env=environment, stdout=subprocess.DEVNULL)
    file, deadline = FeatureFile(out / "features" / "train_images", 59, 1, 32, 11), time.monotonic() + 120
    while not file.path.exists() or np.count_nonzero(file.state) < 10:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    done = np.count_nonzero(file.state != MISSING)
    assert 10 <= done < 59

    monkeypatch.setattr(run_features, "CHUNK", 2)
    monkeypatch.setattr(run_features, "_TIMED", 0)
    monkeypatch.setattr(run_features.RunFeatures, "_estimate", lambda *_: 0.0)  # runs the towers
    monkeypatch.setattr("coalign.workflows.train.train.evaluate_held_out", lambda *_: {})
    assert cli.main(args) == 0
    assert 59 - done <= towers["image"] <= 59 - done + 2
    assert "computed again" not in capsys.readouterr().out
    assert go(pairs, whole, model_file, epochs=1, evals=0) == 0
    for name in ("train_images", "train_texts"):
        assert (out / "features" / name).read_bytes() == (whole / "features" / name).read_bytes()
    assert_equal_runs(out, whole)


def test_features_of_other_weights_are_computed_again(tmp_path, pairs, model_file, kept, capsys):
    out = tmp_path / "run"
    assert go(pairs, out, model_file, epochs=1) == 0
    before = (out / "features" / "train_images").read_bytes()
    for path in out.iterdir():  # only the features of an abandoned run are left
        if path.name != "features":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert go(pairs, out, model_file, epochs=1, seed=1) == 0
    output = capsys.readouterr()
    assert f"{out / 'features' / 'train_images'} is computed again: it was made with other weights." in output.out
    assert (out / "features" / "train_images").read_bytes() != before


def test_runs_share_the_features_of_a_folder(tmp_path, pairs, model_file, towers, capsys):
    """The second run runs no tower for them, another start computes its own, and the results are those without sharing."""
    alone, shared, folder = tmp_path / "alone", tmp_path / "shared", tmp_path / "features"
    assert go(pairs, alone, model_file, epochs=2, evals=0) == 0
    assert not (alone / "features").exists()
    passed = []
    for name, seed in (("first", 0), ("shared", 0), ("other", 1)):
        towers.update(image=0, text=0)
        options = {"feature_folder": folder, "seed": seed}
        assert go(pairs, tmp_path / name, model_file, epochs=2, evals=0, **options) == 0
        passed.append(towers["image"])
    assert passed[0] == passed[2] > passed[1]
    assert len([path for path in folder.iterdir() if path.suffix != ".lock"]) == 4
    assert "computed again" not in capsys.readouterr().out
    assert_equal_runs(alone, shared)


def test_runs_that_need_the_same_features_at_once_wait_for_each_other(tmp_path, pairs, model_file):
    args = tiny.train_args(
        pairs, tmp_path / "run", model_file, **LOCKED, feature_folder=tmp_path / "features", epochs=1
    )
    place = args.index(str(tmp_path / "run"))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", f"{COMMAND}\nraise SystemExit(main(sys.argv[1:]))", *args[:place], str(out), *args[place + 1 :]],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for out in (tmp_path / "run", tmp_path / "second")
    ]  # fmt: skip
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert sum("are computed once" in output for output in outputs) == 1
    assert_equal_runs(tmp_path / "run", tmp_path / "second")


def test_a_run_that_is_validated_on_its_training_pairs_shares_one_file_for_both(tmp_path, pairs, model_file, capsys):
    """It does not wait for itself."""
    folder = tmp_path / "features"
    assert go(pairs, tmp_path / "run", model_file, val_data=pairs, feature_folder=folder, epochs=1, evals=1) == 0
    assert len([path for path in folder.glob("texts-*") if path.suffix != ".lock"]) == 1
    assert "Waiting for another run" not in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, pairs, model_file, capsys):
    (tmp_path / "file").write_text("")
    assert go(pairs, tmp_path / "run", model_file, feature_folder=tmp_path / "file" / "features", epochs=1) == 2
    assert "choose another --feature-folder" in tiny.error_line(capsys)


def test_features_of_other_evaluation_views_are_computed_again(tmp_path, pairs, model_file, monkeypatch, capsys):
    """Such as those that an older version of coalign made."""
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        patch.setattr(evaluation_view, "VERSION", 1)
        assert go(pairs, tmp_path / "run", model_file) == cli.INTERRUPTED
    assert go(pairs, tmp_path / "run", model_file, resume="auto") == 0
    printed = capsys.readouterr().out
    folder = tmp_path / "run" / "features"
    assert f"{folder / 'train_images'} is computed again: it was made with other views." in printed
    assert f"{folder / 'train_texts'} is computed again" not in printed


def test_a_truncated_file_is_computed_again(tmp_path, pairs, model_file, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        stop_at(patch, 8)
        assert go(pairs, tmp_path / "run", model_file) == cli.INTERRUPTED
    path = tmp_path / "run" / "features" / "train_texts"
    os.truncate(path, path.stat().st_size // 2)
    assert go(pairs, tmp_path / "run", model_file, resume="auto") == 0
    assert f"{path} is computed again: it has " in capsys.readouterr().out
    assert go(pairs, tmp_path / "whole", model_file) == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "run")


def test_bad_samples_are_replaced_and_listed_as_without_a_cache(tmp_path, model_file):
    data = tiny.write_pairs(tmp_path / "data")
    broken = sorted(data.glob("*/*.png"))[::13]
    for number, path in enumerate(broken):
        path.write_bytes(path.read_bytes()[:90] if number % 2 else b"no image")
    options = {"max_bad_fraction": 0.5, "epochs": 2, "group_look_alikes": None}
    for name, views in (("cached", 1), ("uncached", 0)):
        arguments = tiny.train_args(data, tmp_path / name, model_file, **LOCKED, feature_views=views, **options)
        assert cli.main([*arguments, "--no-group-look-alikes"]) == 0
    lists = [tiny.rows(tmp_path / name / "bad_samples.jsonl") for name in ("cached", "uncached")]
    assert lists[0] == lists[1]
    assert 3 <= len(lists[0]) <= 5


def test_features_that_are_not_finite(tmp_path, pairs, model_file, monkeypatch, capsys):
    forward = ImageTower.forward
    monkeypatch.setattr(
        ImageTower, "forward", lambda self, x: forward(self, x)._replace(pooled=forward(self, x).pooled * float("nan"))
    )
    assert go(pairs, tmp_path / "run", model_file) == 2
    assert "coalign: The features of the locked image tower are not finite; its weights" in capsys.readouterr().err


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("options", "flags", "words"),
    [
        ({"recipe": "filip"}, [], "filip needs the patches of the image tower, but of a locked tower only the pooled"),
        ({"recipe": "filip", "image_tuning": "full"}, [], "filip needs the tokens of the text tower"),
        ({"recipe": "mcd", "feature_views": 2}, [], "The term mlm of mcd masks words by a token that is new to the text encoder"),
        ({"recipe": "declip", "feature_views": 0}, [], "The term text_ss of declip masks words by a token that is new to the text encoder"),
        ({"recipe": "slip"}, [], "slip compares 3 views of an image (image, ssl_1, ssl_2), which are equal with"),
        ({"recipe": "uniclip"}, [], "uniclip compares 3 views of an image"),
        ({"image_tuning": "full", "text_tuning": "full", "feature_views": 2}, [], "--feature-views 2 needs a locked tower"),
        (
            {"recipe": "mct", "feature_views": 2, "train_fraction": 0.5},
            ["--unpaired-captions", "--no-j-tag"],
            "--unpaired-captions has samples without images",
        ),
    ],
)  # fmt: skip
def test_what_features_cannot_do_is_refused(tmp_path, pairs, model_file, capsys, options, flags, words):
    args = tiny.train_args(pairs, tmp_path / "run", model_file, **LOCKED | options)
    assert cli.main([*args, *flags]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_refuses_it_too(tmp_path, pairs, model_file, capsys):
    args = tiny.train_args(pairs, tmp_path / "run", model_file, **LOCKED, recipe="slip")
    assert cli.main([*args, "--dry-run"]) == 2
    assert "use --feature-views 2 or more" in capsys.readouterr().err


def test_a_dry_run_says_the_size_and_counts_no_pass(tmp_path, pairs, model_file, capsys):
    args = tiny.train_args(pairs, tmp_path / "run", model_file, **LOCKED)
    assert cli.main([*args, "--dry-run"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    found = re.search(r"computed once: (\d+) images; (\d+) texts\. They take", printed)
    assert found
    assert int(found[1]) == int(re.search(r"(\d+) pairs for training", printed)[1])
    assert "Encoder passes per pair: ; teacher" not in printed
    assert "Encoder passes per pair: none; teacher passes: none." in printed


def test_without_a_cache_patches_and_tokens_train(tmp_path, pairs, model_file):
    assert go(pairs, tmp_path / "run", model_file, recipe="filip", feature_views=0, epochs=1) == 0
    assert not (tmp_path / "run" / "features").exists()


# ---------------------------------------------------------------- what is printed


def test_size_and_time_are_said_before_and_progress_meanwhile(
    tmp_path, pairs, model_file, monkeypatch, capsys, kept, every_update
):
    monkeypatch.setattr(run_features, "CHUNK", 16)
    assert go(pairs, tmp_path / "run", model_file, epochs=1) == 0
    output, errors = capsys.readouterr()
    lines = [line for line in output.splitlines() if "eatures of" in line]
    assert lines[0].startswith(
        "The features of the locked image and text towers are computed once: 64 images; 66 texts. They take 13 kB in "
    )
    size = sum(path.stat().st_size for path in (tmp_path / "run" / "features").iterdir())
    assert round(size / 1000) == 13
    assert re.search(r"^Features of images: 16 of 59, .* left$", errors, re.MULTILINE)
    assert re.search(r"^Features of texts: \d+ of \d+, .* left$", errors, re.MULTILINE)


def test_a_full_disk_ends_the_run_with_one_sentence(tmp_path, pairs, model_file, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("coalign.data.loading.feature_file.os.pwrite", full)
    assert go(pairs, tmp_path / "run", model_file, image_cache=0) == 2
    error = capsys.readouterr().err
    assert "could not be written (No space left on device); free some disk space" in error
    assert error.count("\n") == 1


def test_a_large_image_does_not_matter(tmp_path, model_file):
    """Its views are made from a reduced decoding, as in a step."""
    data = tiny.write_pairs(tmp_path / "data", 16)
    Image.new("RGB", (900, 700), (1, 2, 3)).save(data / "red" / "red_large_picture.jpg")
    assert go(data, tmp_path / "run", model_file, batch_size=4, epochs=1, feature_views=2) == 0
