"""profile(): stages add up to the step, and a slow stage is detected and gets advice."""

import re
import tempfile
import time
from dataclasses import replace

import pytest
from helpers import tiny

from coalign.cli import main as cli
from coalign.data.loading import train as loader
from coalign.methods import recipe
from coalign.runs.run import build_method
from coalign.training import checkpoint
from coalign.workflows.train import setup
from coalign.workflows.train.profile import advice, profile


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    config = replace(
        recipe("declip")(64),
        model=str(tiny.write_model(folder / "model.json")),
        batch_size=16,
        workers=0,
        val_fraction=0.1,
    )
    return str(tiny.write_pairs(folder / "pairs", 64)), config


def test_stages_add_up_to_the_step(settings):
    data, config = settings
    result = profile(data, lambda _: config, steps=6)
    assert sum(result.stages.values()) == pytest.approx(result.seconds, rel=1e-6)
    assert result.pairs_per_second == pytest.approx(16 / result.seconds)
    expected = {
        "data loading",
        "encoder forward",
        "objective forward",
        "backward",
        "optimizer, teacher and queue updates",
    }
    assert expected <= set(result.stages)
    assert list(result.stages.values()) == sorted(result.stages.values(), reverse=True)


def test_no_checkpoint_is_saved(settings, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda *_: saved.append(1))
    profile(settings[0], lambda _: settings[1], steps=1)
    assert not saved


def test_no_features_are_left_in_a_shared_folder(settings, tmp_path, capsys, monkeypatch):
    def pretrained(*args):
        method = build_method(*args)
        method.image.starts["trunk"] = "weights"
        return method

    monkeypatch.setattr(setup, "build_method", pretrained)
    config = replace(
        recipe("clip")(64),
        model=settings[1].model,
        batch_size=16,
        workers=0,
        image_tuning="locked",
        feature_folder=tmp_path / "features",
    )
    profile(settings[0], lambda _: config, steps=1)
    printed = capsys.readouterr().out
    assert re.search(
        r"The features of the locked image tower are computed once: \d+ images\. They take \S+ \w+\.", printed
    )
    assert tempfile.gettempdir() not in printed
    assert not list(tmp_path.iterdir())


def test_slow_data_loading_is_detected(settings, monkeypatch):
    data, config = settings
    chunk = loader.PairLoader._chunk

    def slow(self, task):
        time.sleep(1.5)
        return chunk(self, task)

    monkeypatch.setattr(loader.PairLoader, "_chunk", slow)
    result = profile(data, lambda _: config, steps=2)
    assert next(iter(result.stages)) == "data loading"
    assert result.stages["data loading"] > 0.5
    assert "of a step is waiting for data" in result.advice[0]
    assert "raise --workers (now 0; " in result.advice[0]


def test_advice_is_given_for_expensive_stages():
    config = recipe("clip")(5000)
    stages = {"communication": 3.0, "backward": 5.0, "optimizer, teacher and queue updates": 2.0}
    sentences = advice(stages, 10.0, config, cores=4)
    assert [sentence.split(" ")[0] for sentence in sentences] == ["30%", "20%"]
    assert advice({"backward": 10.0}, 10.0, config, 4) == [
        "Nearly all of a step is spent in the encoders and their gradients, as it should be."
    ]


def test_command(settings, tmp_path, capsys, monkeypatch):
    data, config = settings
    monkeypatch.chdir(tmp_path)
    options = ["--batch-size", "16", "--model", config.model, "--workers", "0", "--steps", "2"]
    assert cli.main(["profile", "--data", data, *options, "--micro-batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "encoder recompute (--micro-batch)" in out
    assert "pairs per second" in out
    assert not list(tmp_path.iterdir())  # nothing is written
    assert cli.main(["profile", "--data", data, "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
