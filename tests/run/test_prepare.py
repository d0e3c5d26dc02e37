"""What processes say to each other before they train: one that cannot start, or would train something else, is named by all."""

from dataclasses import replace

import pytest
import tiny
from processes import on_two_processes

from coalign.errors import UserError
from coalign.recipes import recipe
from coalign.run.prepare import open_data


def started(world, _, data, configs):
    try:
        pairs, _ = open_data(data[world.rank], lambda _: configs[world.rank], world)
    except UserError as error:
        return str(error)
    return len(pairs.train)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(tiny.write_pairs(root / "one", 24)), str(tiny.write_pairs(root / "other", 30)), root


def test_processes_that_agree_start(folders, tmp_path):
    config = replace(recipe("clip")(64), val_fraction=0.1)
    one, _, _ = folders
    first, second = on_two_processes(started, tmp_path, [one, one], [config, config])
    assert first == second > 10


@pytest.mark.parametrize("rank", [0, 1])
def test_one_that_cannot_open_its_data_is_named_by_all(folders, tmp_path, rank):
    one, _, root = folders
    config = recipe("clip")(64)
    data = [one, one]
    data[rank] = str(root / "absent.tar")
    for said in on_two_processes(started, tmp_path, data, [config, config]):
        assert said.startswith(f"Process {rank} of 2: there is no ")


def test_other_settings_or_data_are_named_by_all(folders, tmp_path):
    one, other, _ = folders
    config = recipe("clip")(64)
    for said in on_two_processes(started, tmp_path, [one, one], [config, replace(config, seed=7)]):
        assert said.startswith("Process 1 of 2 differs from the first in seed (seed: 7, not 0)")
    again = tmp_path / "again"
    again.mkdir()
    for said in on_two_processes(started, again, [one, other], [config, config]):
        assert "differs from the first in the data, training pairs (" in said
