from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coalign.config import DataConfig
from coalign.data.sources.open import open_source
from coalign.errors import BadSample, UserError

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")


def encoded(color: int) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(np.full((8, 9, 3), color, dtype=np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def make(count: int, first: int = 0) -> datasets.Dataset:
    numbers = range(first, first + count)
    return datasets.Dataset.from_dict(
        {
            "image": [{"bytes": encoded(i), "path": f"{i}.png"} for i in numbers],
            "caption": [[f"one {i}", "", f"two {i}"] for i in numbers],
            "keywords": [["a", "b"] for _ in numbers],
            "label_id": list(numbers),
        },
        features=datasets.Features(
            {
                "image": datasets.Image(),
                "caption": datasets.Sequence(datasets.Value("string")),
                "keywords": datasets.Sequence(datasets.Value("string")),
                "label_id": datasets.Value("int64"),
            }
        ),
    )


def test_a_saved_dataset_returns_encoded_images(tmp_path: Path) -> None:
    make(6).save_to_disk(str(tmp_path / "one"))
    source = open_source(str(tmp_path / "one"))
    assert len(source) == 6
    assert source.splits is None
    for i in range(6):
        assert source.image(i) == encoded(i)
        record = source.record(i)
        assert (record.captions, record.tags, record.facts) == ((f"one {i}", f"two {i}"), ("a", "b"), {"label_id": i})
    copy = pickle.loads(pickle.dumps(source))
    assert copy.record(5) == source.record(5)
    assert copy.image(5) == encoded(5)
    assert len({source.record(i).key for i in range(6)}) == 6


def test_a_saved_dict_has_splits(tmp_path: Path) -> None:
    parts = {"train": make(4), "validation": make(3, first=4)}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "two"))
    source = open_source(str(tmp_path / "two"))
    assert {name: indices.tolist() for name, indices in source.splits.items()} == {
        "train": [0, 1, 2, 3],
        "val": [4, 5, 6],
    }
    for spec in (str(tmp_path / "two"), f"hf:{tmp_path / 'two'}"):
        val = open_source(spec, "val")
        assert [val.record(i).facts["label_id"] for i in range(3)] == [4, 5, 6]
        assert [val.image(i) for i in range(3)] == [encoded(i) for i in (4, 5, 6)]


def test_parquet_with_embedded_images(tmp_path: Path) -> None:
    make(3).to_parquet(str(tmp_path / "x.parquet"))
    for spec in (str(tmp_path / "x.parquet"), f"hf:{tmp_path / 'x.parquet'}"):
        source = open_source(spec)
        assert [source.image(i) for i in range(3)] == [encoded(i) for i in range(3)]
        assert [source.record(i).captions for i in range(3)] == [(f"one {i}", f"two {i}") for i in range(3)]


@pytest.mark.parametrize("kind", ["binary", "struct", "list", "path"])
def test_images_of_other_types(tmp_path: Path, kind: str) -> None:
    values = {
        "binary": encoded,
        "struct": lambda i: {"bytes": encoded(i), "path": None},
        "list": lambda i: list(encoded(i)),
        "path": lambda i: str(tmp_path / f"{i}.png"),
    }
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(encoded(i))
    features = {
        "binary": datasets.Value("binary"),
        "struct": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
        "list": datasets.List(datasets.Value("uint8")),
        "path": datasets.Value("string"),
    }
    columns = {"Photo": [values[kind](i) for i in range(3)], "words": list("abc"), "split": ["train", "dev", "test"]}
    data = datasets.Dataset.from_dict(
        columns,
        datasets.Features(
            {"Photo": features[kind], "words": datasets.Value("string"), "split": datasets.Value("string")}
        ),
    )
    data.save_to_disk(str(tmp_path / "data"))
    source = open_source(str(tmp_path / "data"), reading=DataConfig("photo", ("words",)))
    assert [source.image(i) for i in range(3)] == [encoded(i) for i in range(3)]
    assert [source.record(i).captions for i in range(3)] == [("a",), ("b",), ("c",)]
    assert {name: indices.tolist() for name, indices in source.splits.items()} == {
        "train": [0],
        "val": [1],
        "test": [2],
    }


def test_invalid_datasets_are_rejected(tmp_path: Path) -> None:
    make(2).remove_columns("caption").save_to_disk(str(tmp_path / "bare"))
    with pytest.raises(UserError, match=r"captions.* its columns are: image, keywords, label_id"):
        open_source(str(tmp_path / "bare"))
    with pytest.raises(UserError, match="Cannot open the Hugging Face dataset nobody/nothing-at-all"):
        open_source("hf:nobody/nothing-at-all")
    columns = {"image": [str(tmp_path / "gone.png"), None], "text": ["a", None]}
    datasets.Dataset.from_dict(columns).save_to_disk(str(tmp_path / "paths"))
    source = open_source(str(tmp_path / "paths"))
    with pytest.raises(BadSample, match="image file is missing"):
        source.image(0)
    with pytest.raises(BadSample, match="no image"):
        source.image(1)
    assert source.record(1).captions == ()


def test_without_the_extra(monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r'pip install "coalign\[hf\]"'):
        open_source("hf:owner/name")


@pytest.mark.parametrize("form", ["image", "list", "extra", "path", "beside"])
def test_images_in_every_form(tmp_path, form):
    contents = [encoded(number) for number in range(4)]
    cells = [{"bytes": each, "path": None} for each in contents]
    features = {"image": datasets.Image(), "caption": datasets.Value("string")}
    columns = {"image": cells, "caption": list("abcd")}
    if form == "list":
        columns = {"images": [[each] for each in cells], "caption": list("abcd")}
        features = {"images": datasets.List(datasets.Image()), "caption": datasets.Value("string")}
    if form == "extra":  # images that are not read
        columns |= {"mask": cells, "crops": [[each] for each in cells]}
        features |= {"mask": datasets.Image(), "crops": datasets.List(datasets.Image())}
    if form in ("path", "beside"):
        columns["image"] = [f"{number}.png" for number in range(4)]
        features["image"] = datasets.Value("string")
    data = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    data.save_to_disk(tmp_path / "saved")
    for number, content in enumerate(contents):
        ((tmp_path / "saved" if form == "path" else tmp_path) / f"{number}.png").write_bytes(content)
    source = open_source(str(tmp_path / "saved"))
    assert [source.image(i) for i in range(4)] == contents
    assert [(source.record(i).captions, source.record(i).facts) for i in range(4)] == [((each,), {}) for each in "abcd"]


def test_urls_are_refused(tmp_path):
    columns = {"image": ["https://x/a.jpg"], "caption": ["a"]}
    datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match="image URLs"):
        open_source(str(tmp_path / "saved"))
