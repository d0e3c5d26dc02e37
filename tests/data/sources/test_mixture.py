from collections import Counter

import numpy as np
import pytest
from helpers import tiny

from coalign.data.sources.base import Source
from coalign.data.sources.mixture import Mixture
from coalign.data.sources.open import open_source
from coalign.data.splits import assign_splits
from coalign.errors import UserError
from coalign.types import Record


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


class Few(Source):
    def __init__(self, name, captions, splits=None):
        self.name, self.captions, self.splits = name, captions, splits

    def __len__(self):
        return len(self.captions)

    def record(self, index):
        return Record(str(index), (self.captions[index],))

    def image(self, index):
        return f"{self.name} {index}".encode()


def test_samples_are_concatenated_in_order():
    mixture = Mixture([Few("a", ["one", "two"]), Few("b", ["three"])], [1, 1])
    assert len(mixture) == 3
    assert [mixture.record(i).captions[0] for i in range(6)] == ["one", "two", "three"] * 2
    assert [mixture.image(i) for i in (2, 3, 5)] == [b"b 0", b"a 0", b"b 0"]
    assert len({mixture.record(i).key for i in range(3)}) == 3  # although both sources have the key "0"


@pytest.mark.parametrize("weight", [0.25, 1, 2, 2.5])
def test_weights_set_how_often_samples_repeat_per_epoch(weight):
    mixture = Mixture([Few("a", [str(i) for i in range(100)]), Few("b", [str(i) for i in range(60)])], [1, weight])
    train = np.arange(10, 140)  # parts of both sources are held out
    indices = mixture.epoch_indices(train)
    assert len(set(indices.tolist())) == len(indices)  # repeated samples have different views
    seen = Counter((indices % 160).tolist())
    assert set(seen) <= set(train.tolist())
    assert sum(count for index, count in seen.items() if index < 100) == 90
    counts_of_b = [count for index, count in seen.items() if index >= 100]
    assert sum(counts_of_b) == round(40 * weight)
    assert set(counts_of_b) <= {int(weight), int(weight) + 1}


def test_splits_separate_captions_across_sources():
    captions = [f"caption {i}" for i in range(200)]
    mixture = Mixture([Few("a", captions), Few("b", captions[::-1])], [1, 3])
    parts, _ = assign_splits(mixture, val_fraction=0.2)
    sides = [{mixture.record(i).captions[0] for i in parts[name].tolist()} for name in ("train", "val")]
    assert sides[1]
    assert not sides[0] & sides[1]


def test_own_splits_are_kept_and_a_source_without_any_is_for_training():
    own = {"train": np.array([0]), "val": np.array([1])}
    mixture = Mixture([Few("a", ["one", "two"]), Few("b", ["three", "four"], own)], [1, 1])
    parts, _ = assign_splits(mixture)
    assert {name: indices.tolist() for name, indices in parts.items()} == {"train": [0, 1, 2], "val": [3]}
    with pytest.raises(UserError, match="remove --val-by style"):
        assign_splits(mixture, by="style")


def test_weights_are_parsed_from_the_spec(tmp_path):
    folder = tiny.write_pairs(tmp_path / "pairs", 12)
    mixture = open_source(f"{folder} + 0.5*scenes:20,size=24")
    assert isinstance(mixture, Mixture)
    assert mixture.weights == [1, 0.5]
    assert mixture.sources[0].name == open_source(str(folder)).name
    assert mixture.image(len(mixture) - 1).shape == (24, 24, 3)


def test_a_folder_with_a_plus_in_its_name_is_not_a_mixture(tmp_path):
    folder = tiny.write_pairs(tmp_path / "cats + dogs", 12)
    assert not isinstance(open_source(str(folder)), Mixture)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("0*scenes:8 + scenes:9", "The weight of scenes:8 is 0, but must be greater than 0"),
        (" + scenes:8", "Empty source"),
        ("scenes:8 + absent", "No such file or folder: absent"),
    ],
)
def test_invalid_mixtures_are_rejected(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)
