"""The script with a paper's own commands: every one of them gives the settings that the table means."""

import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from coalign.cli import main as cli
from coalign.cli.train import TrainCommand, _parse_settings
from coalign.config import DataConfig
from coalign.experiments.tables.launch_script import options
from coalign.experiments.tables.registry import TABLES
from coalign.methods import recipe
from coalign.methods.defaults import with_start

OF_PAPERS = [name for name, sweep in TABLES.items() if sweep.paper_recipe]


@pytest.mark.parametrize("name", OF_PAPERS)
def test_every_command_gives_the_settings_of_its_arm(name, tmp_path, capsys):
    sweep, out = TABLES[name], tmp_path / "two words"
    seeds = 2 if name == "oner-emoji" else 1
    command = ["reproduce", name, "--data", "web/{00..10}.tar", "--out", str(out), "--scale", "paper"]
    command += ["--seeds", str(seeds)]
    assert cli.main(command) == 0
    arms = [arm for arm in sweep.arms if sweep.paper_config(arm, 0)]
    printed = capsys.readouterr().out
    assert ("Omitted" in printed) == (len(arms) < len(sweep.arms))
    assert {path.name for path in out.iterdir()} == {"launch.sh"}
    script = out / "launch.sh"
    assert subprocess.run(["sh", "-n", str(script)]).returncode == 0
    lines = script.read_text().splitlines()
    trained = [shlex.split(line) for line in lines if line.startswith("torchrun")]
    assert len(trained) == seeds * len(arms)
    for number, words in enumerate(trained):
        assert words[:6] == ["torchrun", "--nproc-per-node", "$GPUS", "-m", "coalign", "train"]
        command, config = _parse_settings(words[6:], 1_000_000, "train", TrainCommand)
        recipe, expected = sweep.paper_config(arms[number % len(arms)], number // len(arms))
        assert (command.recipe, command.data, command.resume, config) == (recipe, "web/{00..10}.tar", "auto", expected)
        assert Path(command.out).parent == out
    evaluated = [shlex.split(line) for line in lines if line.startswith("coalign eval")]
    assert [words[2] for words in evaluated] == [words[words.index("--out") + 1] for words in trained]
    assert len({words[2] for words in evaluated}) == len(trained)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"image_tower": "a", "text_tower": "b", "image_tuning": "locked", "text_tuning": "locked"}, 8),
        ({"image_tower": "a", "max_grad_norm": 0.5}, 4),
        ({"max_grad_norm": 0.5}, 2),
    ],
)
def test_options_are_those_that_differ_from_the_defaults_of_the_start(settings, words):
    """Of pretrained encoders, the temperature is None by default, and new parts have their own rate unless all others are locked."""

    def parsed(options):
        return _parse_settings(["--data", "x", "--out", "y", *options], 5000, "train", TrainCommand)[1]

    default = recipe("clip")(5000)
    config = with_start(default, replace(default, **settings))
    config = replace(config, **settings)
    found = options("clip", config, 5000)
    assert len(found) == words
    assert "None" not in found
    assert parsed(found) == config
    other = replace(config, optimizer=replace(config.optimizer, new_lr=None if config.optimizer.new_lr else 1e-4))
    found = options("clip", other, 5000)
    assert parsed(found) == other
    assert ("None" in found) == (config.optimizer.new_lr is not None)


def test_the_papers_rows_differ_as_the_papers_say():
    sweep = TABLES["declip-emoji"]
    _, once = sweep.paper_config("CLIP", 0)
    _, longer = sweep.paper_config("CLIP, twice the epochs", 0)
    _, larger = sweep.paper_config("CLIP, twice the batch", 0)
    assert (once.epochs, once.batch_size) == (32, 1024)
    assert (longer.epochs, larger.batch_size) == (64, 2048)


def test_the_commands_read_the_data_as_given(tmp_path):
    name, reading = OF_PAPERS[0], DataConfig("where", ("words", "more words"), separator=";")
    columns = ["--image-column", "where", "--caption-column", "words", "more words", "--separator", ";"]
    command = ["reproduce", name, "--data", "pairs.csv", "--out", str(tmp_path), "--scale", "paper", *columns]
    assert cli.main(command) == 0
    trained = [shlex.split(line) for line in (tmp_path / "launch.sh").read_text().splitlines() if "torchrun" in line]
    for words in trained:
        assert _parse_settings(words[6:], 1_000_000, "train", TrainCommand)[1].reading == reading


def test_tables_without_a_paper_have_no_launch_script(tmp_path, capsys):
    command = ["reproduce", "scenes", "--data", "x", "--out", str(tmp_path / "out")]
    assert cli.main([*command, "--scale", "paper"]) == 2
    assert "has no recipes at the paper's scale" in capsys.readouterr().err
