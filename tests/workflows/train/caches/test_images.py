"""Decoded images are kept in memory if they fit, and on disk if it is set. Runs do not depend on it."""

import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.pairs import CLIP_PLAN, Pairs

from coalign.cli import main as cli
from coalign.data.sources.folders.folder import FolderSource
from coalign.methods import recipe
from coalign.training.distributed import World
from coalign.types import CLIP_PREPROCESS
from coalign.workflows.train.batches import TrainingData
from coalign.workflows.train.caches import images as image_cache
from coalign.workflows.train.caches.images import RunImageCache
from coalign.workflows.train.setup import resolve_workers

ONE = World(0, 1, torch.device("cpu"))


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "image_size", lambda method: 16)
    monkeypatch.setattr(image_cache, "preprocess", lambda method: CLIP_PREPROCESS)
    monkeypatch.setattr(image_cache, "gettempdir", lambda: str(tmp_path / "temporary"))
    source = Pairs()
    pairs = TrainingData(source, np.arange(40), source, np.arange(0))

    def make(world=ONE, **settings):
        config = replace(recipe("clip")(40), **{"epochs": 3, **settings})
        return RunImageCache(config, SimpleNamespace(view_plan=CLIP_PLAN), pairs, tmp_path / "run", world)

    return make


def image_of(cache, read):
    return cache.open(3, read).decode(1.0)


def unread():
    raise AssertionError("was read again")


def test_images_are_kept_in_memory_if_they_fit(kept, tmp_path, monkeypatch):
    monkeypatch.setattr(image_cache, "available_memory", lambda: 400_000.0)  # a quarter: 100 kB; the images: 72 kB
    images = kept()
    assert images.description == "Decoded images are kept in memory: about 72 kB of the 400 kB available."
    assert images.cache.max_bytes == 100_000
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(image_cache, "available_memory", lambda: 280_000.0)
    images = kept()
    assert images.cache is None
    assert images.description.startswith("Images are decoded in every epoch: together they would take about 72 kB of")


def test_nothing_is_kept_for_one_epoch_or_if_it_is_off(kept):
    for settings in ({"image_cache": 0.0}, {"epochs": 1}):
        images = kept(**settings)
        assert images.cache is None
        assert images.description == ""


def test_images_are_kept_on_disk_if_it_is_set(kept):
    images = kept(image_cache=1.0)
    assert images.description == f"Decoded images are kept in {images.folder}, up to 1.0 GB."
    image_of(images.cache, lambda: Pairs().image(3))
    assert (images.folder / "images").exists()
    image_of(kept(image_cache=1.0).cache, unread)
    images.remove()
    assert not images.folder.exists()


class Processes:
    """Ranks in one process, one after the other, on the machines that are given."""

    def __init__(self, machines):
        self.machines, self.caches = machines, [None] * len(machines)

    def rank(self, rank):
        calls = []

        def gather_objects(value):
            calls.append(value)
            if len(calls) == 1:
                return self.machines
            self.caches[rank] = value
            return pickle.loads(pickle.dumps(self.caches))

        return SimpleNamespace(rank=rank, size=len(self.machines), gather_objects=gather_objects)


def test_ranks_of_a_machine_share_the_memory(kept):
    ranks = Processes(["a", "b", "a"])
    first, other, third = (kept(world=ranks.rank(rank)) for rank in range(3))
    image_of(first.cache, lambda: Pairs().image(3))
    image_of(third.cache, unread)
    with pytest.raises(AssertionError, match="read again"):
        image_of(other.cache, unread)


def test_ranks_that_share_the_memory_have_one_limit(kept, monkeypatch):
    """A rank reads all that the others write, although less memory was available when it started."""
    ranks = Processes(["a", "a"])
    first = kept(world=ranks.rank(0)).cache
    monkeypatch.setattr(image_cache, "available_memory", lambda: 40_000.0)  # a quarter: 10 kB
    second = kept(world=ranks.rank(1)).cache
    second.open(39, lambda: Pairs().image(39))  # maps the memory first
    for index in range(40):
        first.open(index, lambda index=index: Pairs().image(index)).decode(1.0)
    assert all((second.open(index, unread).decode(1.0) == Pairs().image(index)).all() for index in range(1, 40, 2))


def test_a_rank_that_cannot_open_the_memory_decodes(kept):
    ranks = Processes(["a", "a"])
    kept(world=ranks.rank(0))
    ranks.caches[0].shared_path = Path("/proc/0/fd/1")
    images = kept(world=ranks.rank(1))
    for _ in range(2):
        reads = []
        image_of(images.cache, lambda: (reads.append(3), Pairs().image(3))[1])  # noqa: B023
        assert reads == [3]


def test_images_are_read_as_often_for_many_validations_as_for_one(
    tmp_path, pairs, model_file, monkeypatch, without_run_reports
):
    """Validations after the first read kept images. Counts the images of the folder that are read during and after training."""
    reads = []
    original = FolderSource.image

    def image(self, index):
        reads[-1] += 1
        return original(self, index)

    monkeypatch.setattr(FolderSource, "image", image)
    for number, evals in enumerate((1, 1, 6)):  # the first run also reads images to split the data
        reads.append(0)
        args = tiny.train_args(pairs, tmp_path / f"run{number}", model_file, evals=evals)
        assert cli.main([*args, "--no-group-look-alikes"]) == 0
    assert reads[1] == reads[2] > 0


def test_few_pairs_are_loaded_by_a_thread(monkeypatch):
    monkeypatch.setattr("coalign.workflows.train.setup.num_cores", lambda: 12)
    config = recipe("clip")(40)
    assert resolve_workers(config, 10_000, ONE, True).workers == 0
    assert resolve_workers(config, 10_001, ONE, True).workers == 8
    assert resolve_workers(config, 10_001, World(0, 4, torch.device("cpu")), True).workers == 3
    assert resolve_workers(config, 100, ONE, False).workers == 8
    assert resolve_workers(replace(config, workers=2), 100, ONE, True).workers == 2
