"""profile(): the parts add up to the step, and a part that is slowed down is the one that is found."""

import time

import pytest
import tiny

from coalign import cli
from coalign.data import loader
from coalign.recipes import recipe
from coalign.run.profile import advice, profile
from coalign.training import checkpoint


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("profile")
    from dataclasses import replace

    config = replace(
        recipe("declip")(64),
        model=str(tiny.write_model(folder / "model.json")),
        batch_size=16,
        workers=0,
        val_fraction=0.1,
    )
    return str(tiny.write_pairs(folder / "pairs", 64)), config


def test_the_parts_are_the_step(settings):
    data, config = settings
    found = profile(data, lambda _: config, steps=6)
    assert sum(found.parts.values()) == pytest.approx(found.seconds, rel=1e-6)
    assert found.pairs_per_second == pytest.approx(16 / found.seconds)
    expected = {
        "waiting for data",
        "encoders, forward",
        "objective, forward",
        "backward",
        "optimiser, teachers and queues",
    }
    assert expected <= set(found.parts)
    assert list(found.parts.values()) == sorted(found.parts.values(), reverse=True)


def test_nothing_that_was_learnt_is_written(settings, monkeypatch):
    written = []
    monkeypatch.setattr(checkpoint, "save", lambda *_: written.append(1))
    profile(settings[0], lambda _: settings[1], steps=1)
    assert not written


def test_what_is_slow_is_found(settings, monkeypatch):
    data, config = settings
    chunk = loader.PairLoader._chunk

    def slow(self, task):
        time.sleep(0.5)
        return chunk(self, task)

    monkeypatch.setattr(loader.PairLoader, "_chunk", slow)
    found = profile(data, lambda _: config, steps=2)
    assert next(iter(found.parts)) == "waiting for data"
    assert found.parts["waiting for data"] > 0.5
    assert "waits for data" in found.advice[0]
    assert "--workers 0" in found.advice[0]


def test_advice_names_what_helps():
    config = recipe("clip")(5000)
    parts = {"communication": 3.0, "backward": 5.0, "optimiser, teachers and queues": 2.0}
    said = advice(parts, 10.0, config, cores=4)
    assert [line.split(" ")[0] for line in said] == ["30%", "20%"]
    assert advice({"backward": 10.0}, 10.0, config, 4) == [
        "Encoders and their gradients take nearly all of a step, as they should."
    ]


def test_command(settings, tmp_path, capsys, monkeypatch):
    data, config = settings
    monkeypatch.chdir(tmp_path)
    options = ["--batch-size", "16", "--model", config.model, "--workers", "0", "--steps", "2"]
    assert cli.main(["profile", "--data", data, *options, "--micro-batch", "8"]) == 0
    out = capsys.readouterr().out
    assert "encoders once more" in out
    assert "pairs a second" in out
    assert not list(tmp_path.iterdir())  # nothing is kept
    assert cli.main(["profile", "--data", data, "--steps", "0"]) == 2
    assert "--steps is 0" in capsys.readouterr().err
