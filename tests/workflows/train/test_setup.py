"""Checks across ranks before training: if one rank fails or has different settings or data, all ranks report it."""

from dataclasses import replace

import pytest
from helpers import tiny
from helpers.processes import on_two_processes

from coalign.errors import UserError
from coalign.methods import recipe
from coalign.workflows.train.setup import open_data


def open_on_rank(world, _, data, configs):
    """Returns the number of training pairs of this rank, or the error message."""
    try:
        pairs, _ = open_data(data[world.rank], lambda _: configs[world.rank], world)
    except UserError as error:
        return str(error)
    return len(pairs.train)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("pairs")
    return str(tiny.write_pairs(root / "one", 24)), str(tiny.write_pairs(root / "other", 30)), root


@pytest.mark.slow
def test_ranks_with_equal_settings_and_data_start(folders, tmp_path):
    config = replace(recipe("clip")(64), val_fraction=0.1)
    one, _, _ = folders
    first, second = on_two_processes(open_on_rank, tmp_path, [one, one], [config, config])
    assert first == second > 10


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_report_a_rank_that_cannot_open_its_data(folders, tmp_path, rank):
    one, _, root = folders
    config = recipe("clip")(64)
    data = [one, one]
    data[rank] = str(root / "absent.tar")
    for message in on_two_processes(open_on_rank, tmp_path, data, [config, config]):
        assert message.startswith(f"Rank {rank} of 2: No such file or folder: ")


@pytest.mark.slow
def test_all_ranks_report_different_settings_or_data(folders, tmp_path):
    one, other, _ = folders
    config = recipe("clip")(64)
    for message in on_two_processes(open_on_rank, tmp_path, [one, one], [config, replace(config, seed=7)]):
        assert message.startswith("Rank 1 of 2 differs from rank 0 in seed (seed: 7 instead of 0)")
    again = tmp_path / "again"
    again.mkdir()
    for message in on_two_processes(open_on_rank, again, [one, other], [config, config]):
        assert "differs from rank 0 in data, training pairs (" in message
