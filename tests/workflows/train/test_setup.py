"""Checks across ranks before training: if one rank fails or has different settings or data, all ranks report it."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny
from helpers.processes import on_two_processes

from coalign.config import DataConfig
from coalign.errors import UserError
from coalign.methods import recipe
from coalign.training.distributed import join_world
from coalign.workflows.evaluate.samples import open_as_trained, reading_of
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


def test_the_test_pairs_are_split_by_a_column_with_separate_validation_data(folders, tmp_path):
    one, other, _ = folders
    table = tmp_path / "pairs.csv"
    images = sorted(Path(other).rglob("*.png"))
    rows = [f"{path},pair {number},author {number % 9}" for number, path in enumerate(images)]
    table.write_text("\n".join(["image,caption,author", *rows]) + "\n")
    config = replace(
        recipe("clip")(64),
        val_data=one,
        val_by="author",
        test_fraction=0.3,
        test_splits=("test",),
        group_look_alikes=False,
    )
    pairs, _ = open_data(str(table), lambda _: config, join_world("cpu"))
    test = pairs.test_splits["test"]
    authors = [{pairs.source.record(i).facts["author"] for i in part.tolist()} for part in (pairs.train, test)]
    assert len(pairs.train) + len(test) == len(images)
    assert authors[1]
    assert not authors[0] & authors[1]
    assert len(pairs.val) == 24
    alone, _ = open_data(str(table), lambda _: replace(config, val_data=None), join_world("cpu"))
    assert alone.test_splits["test"].tolist() == test.tolist()


def test_options_on_columns_need_an_effect_on_the_training_or_the_validation_data(folders, tmp_path):
    """Also a run whose training data has no columns reads it again with its own settings."""
    one, other, _ = folders
    table, coco = tmp_path / "pairs.csv", tmp_path / "captions.json"
    images = sorted(Path(other).rglob("*.png"))
    rows = [f"{path},no,caption {number},tag" for number, path in enumerate(images)]
    table.write_text("\n".join(["picture,caption,words,topics", *rows]) + "\n")
    entries = [{"id": number, "file_name": str(path)} for number, path in enumerate(images)]
    captions = [{"id": number, "image_id": number, "caption": f"drawing {number}"} for number in range(len(images))]
    coco.write_text(json.dumps({"images": entries, "annotations": captions}))
    reading = DataConfig("picture", ("words",), "topics")
    for data, val_data in ((str(table), str(coco)), (str(table), one), (str(coco), str(table)), (one, str(table))):
        config = replace(recipe("clip")(64), val_data=val_data, reading=reading, group_look_alikes=False)
        pairs, _ = open_data(data, lambda _, config=config: config, join_world("cpu"))
        source = pairs.source if data == str(table) else pairs.val_source
        record = source.record(3)
        assert (record.captions, record.tags) == (("caption 3",), ("tag",))
        assert len(pairs.train) > 20
        trained = SimpleNamespace(data=data, config=config)
        assert len(open_as_trained(data, trained)) == len(pairs.source)
        assert reading_of(data, trained) == reading
    message = r"one and .*captions.json have no table with columns, which --image-column needs"
    with pytest.raises(UserError, match=message):
        open_data(one, lambda _: replace(config, val_data=str(coco)), join_world("cpu"))
    with pytest.raises(UserError, match="one has no table with columns, which --image-column needs"):
        open_as_trained(one, trained, reading)  # what is given needs an effect on the data itself


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
