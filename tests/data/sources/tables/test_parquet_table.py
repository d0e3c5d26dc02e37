from __future__ import annotations

import json
import pickle
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from helpers.data_files import write_images

from coalign.config import DataConfig
from coalign.data.fingerprints import fingerprints
from coalign.data.sources.open import open_source
from coalign.data.sources.tables.parquet_table import ParquetSource
from coalign.data.sources.tables.table import open_table
from coalign.errors import BadSample, NoImage, UserError

pyarrow = pytest.importorskip("pyarrow")
import pyarrow.parquet as parquet  # noqa: E402


def write(path: Path, columns: dict, **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def encoded(*numbers: int) -> list[bytes]:
    return [f"bytes of {number}".encode() for number in numbers]


def test_parquet_against_pyarrow(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns = {
        "filepath": [f"{i}.jpg" for i in range(5000)],
        "captions": [[f"caption {i} {j}" for j in range(rng.integers(1, 4))] for i in range(5000)],
        "keywords": [["k", str(i)] for i in range(5000)],
        "score": rng.random(5000),
    }
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns), path)
    source = open_table(path)
    assert len(source) == 5000
    for i in (0, 1, 4095, 4096, 4999):
        record = source.record(i)
        assert (record.key, list(record.captions), list(record.tags)) == (
            f"{i}.jpg",
            columns["captions"][i],
            ["k", str(i)],
        )
        assert record.facts == {"score": columns["score"][i]}
    path.write_bytes(b"PAR1 nonsense")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_table(path)


@pytest.mark.parametrize("images", [["a.jpg", "b.jpg"], [b"1", b"2"]])
def test_embeddings_are_not_held_in_memory(tmp_path: Path, images: list) -> None:
    vectors = [[0.1] * 768, [0.2] * 768]
    columns = {
        "image": images,
        "text": ["one", "two"],
        "similarity": [0.3, 0.4],
        "words": [["a"], ["b"]],
        "a": vectors,
        "b": pyarrow.array(vectors, pyarrow.list_(pyarrow.float32(), 768)),
    }
    source = open_table(write(tmp_path / "x.parquet", columns))
    assert source.record(1).facts == {"similarity": 0.4, "words": ["b"]}


def test_images_are_hashed_once(tmp_path: Path, monkeypatch) -> None:
    reads: list[int] = []
    image = ParquetSource.image
    monkeypatch.setattr(ParquetSource, "image", lambda self, index: reads.append(index) or image(self, index))
    path = write(tmp_path / "x.parquet", {"jpg": encoded(1, 2, 1), "text": ["one", "two", "one"]})
    first, second = fingerprints(open_table(path)), fingerprints(open_table(path))
    assert sorted(reads) == [0, 1, 2]
    for found in (first, second):
        assert found.images[0] == found.images[2] != found.images[1]
        assert found.captions[0] == found.captions[2] != found.captions[1]
        assert found.caption_counts.tolist() == [1, 1, 1]
    write(tmp_path / "x.parquet", {"jpg": encoded(1, 2, 3), "text": ["one", "two", "three!"]})
    assert len(set(fingerprints(open_table(path)).images.tolist())) == 3


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r'pip install "coalign\[hf\]"'):
        open_table(tmp_path / "x.parquet")


STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
IMAGES = {
    "image": pyarrow.array(encoded(*range(10)), pyarrow.binary()),
    "jpg": pyarrow.array(encoded(*range(10)), pyarrow.large_binary()),
    "img": pyarrow.array([{"bytes": each, "path": f"{i}.png"} for i, each in enumerate(encoded(*range(10)))], STRUCT),
    "photo": pyarrow.array([{"bytes": None, "path": f"sub/{i}"} for i in range(10)], STRUCT),
    "webp": pyarrow.array([list(each) for each in encoded(*range(10))], pyarrow.list_(pyarrow.uint8())),
    "images": pyarrow.array([[each] for each in encoded(*range(10))], pyarrow.list_(pyarrow.binary())),
    "picture": pyarrow.array([{"name": "x", "data": each} for each in encoded(*range(10))]),
    "pic": pyarrow.array(encoded(*range(10))).dictionary_encode(),
    "anything": pyarrow.array(encoded(*range(10)), pyarrow.binary()),
    "image_path": pyarrow.array([f"sub/{i}" for i in range(10)]),
}


@pytest.mark.parametrize("column", list(IMAGES))
@pytest.mark.parametrize("group", [3, 1000])
def test_images_as_bytes_as_structs_and_as_paths(tmp_path: Path, column: str, group: int) -> None:
    for i, content in enumerate(encoded(*range(10))):
        (tmp_path / "sub").mkdir(exist_ok=True)
        (tmp_path / "sub" / str(i)).write_bytes(content)
    captions = [[f"one {i}", f"two {i}"] for i in range(10)]
    columns = {"id": list(range(10)), column: IMAGES[column], "caption": captions, "tags": ["a,b"] * 10}
    path = write(tmp_path / "x.parquet", columns, row_group_size=group)
    source = open_source(str(path))
    assert [source.image(i) for i in (9, 0, 5, 1, 8, 2, 7, 3, 6, 4)] == encoded(9, 0, 5, 1, 8, 2, 7, 3, 6, 4)
    assert [list(source.record(i).captions) for i in range(10)] == captions
    assert (source.record(3).tags, source.record(3).facts) == (("a", "b"), {"id": 3})
    assert len({source.record(i).key for i in range(10)}) == 10
    assert [pickle.loads(pickle.dumps(source)).image(i) for i in (4, 2)] == encoded(4, 2)


def test_forked_workers_open_their_own_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"jpg": encoded(*range(50)), "caption": ["x"] * 50}, row_group_size=5)
    source = open_table(path)
    assert source.image(0) == b"bytes of 0"
    with get_context("fork").Pool(2) as pool:
        assert pool.map(source.image, range(50)) == encoded(*range(50))


def test_image_bytes_are_not_held_in_memory(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (80, 1 << 20), dtype=np.uint8)
    path = write(
        tmp_path / "x.parquet", {"jpg": [row.tobytes() for row in noise], "text": ["x"] * 80}, row_group_size=4
    )
    source = open_table(path)
    assert isinstance(source, ParquetSource)
    before = pyarrow.total_allocated_bytes()
    for i in [*range(80), *range(0, 80, 7)]:
        assert source.image(i) == noise[i].tobytes()
        assert pyarrow.total_allocated_bytes() - before < 75 << 20
    assert len(pickle.dumps(source)) < 100_000


def img2dataset(numbers: range) -> dict:
    """The columns that img2dataset writes with output_format=parquet; every third download fails."""
    failed = [number % 3 == 2 for number in numbers]
    return {
        "url": [f"https://x/{number}.jpg" for number in numbers],
        "key": [f"{number:09}" for number in numbers],
        "status": ["failed_to_download" if each else "success" for each in failed],
        "error_message": ["HTTP Error 404" if each else None for each in failed],
        "width": [None if each else 256 for each in failed],
        "caption": [f"caption {number}" for number in numbers],
        "jpg": [None if each else content for each, content in zip(failed, encoded(*numbers))],
    }


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_folder_that_img2dataset_wrote(tmp_path: Path, prefix: str, monkeypatch) -> None:
    if prefix:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    write(tmp_path / "data" / "00000.parquet", img2dataset(range(6)))
    write(tmp_path / "data" / "00001.parquet", img2dataset(range(6, 12)))
    (tmp_path / "data" / "00000_stats.json").write_text("{}")
    source = open_source(f"{prefix}{tmp_path / 'data'}")
    kept = [0, 1, 3, 4, 6, 7, 9, 10]
    assert [source.record(i).captions for i in range(len(source))] == [(f"caption {number}",) for number in kept]
    assert [source.image(i) for i in range(len(source))] == encoded(*kept)
    assert source.record(2).facts["key"] == "000000003"
    assert {each.reason for each in source.left_out} == {"img2dataset: failed to download"}
    assert sum(each.count for each in source.left_out) == 4
    assert source.splits is None
    with pytest.raises(UserError, match="image URLs"):  # img2dataset's metadata beside its files
        open_table(write(tmp_path / "x.parquet", {name: img2dataset(range(2))[name] for name in ("url", "caption")}))


@pytest.mark.parametrize(
    "names",
    [
        ["data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001", "data/test"],
        ["train/0000", "train/0001", "val/0000", "test/0000"],
        ["train", "training", "dev_0", "test-0"],
    ],
)
@pytest.mark.parametrize("as_paths", [False, True])
def test_file_names_give_the_splits(tmp_path: Path, names: list[str], as_paths: bool) -> None:
    for number, name in enumerate(names):
        keys = [f"{number}-{row}.jpg" for row in range(2)]
        write_images(tmp_path, *keys)
        images = keys if as_paths else [f"bytes of {key}".encode() for key in keys]
        write(tmp_path / f"{name}.parquet", {"image": images, "text": [f"caption of {key}" for key in keys]})
    source = open_source(str(tmp_path))
    for split, parts in {"train": (0, 1), "val": (2,), "test": (3,)}.items():
        chosen = open_source(str(tmp_path), split)
        captions = [chosen.record(i).captions[0] for i in range(len(chosen))]
        assert sorted(captions) == [f"caption of {part}-{row}.jpg" for part in parts for row in range(2)]
    for i in range(len(source)):
        assert source.image(i).decode() == source.record(i).captions[0].replace("caption of", "bytes of")


def test_images_beside_parquet_files_are_accounted_for(tmp_path: Path) -> None:
    write_images(tmp_path, "images/a.jpg", "images/b.jpg", "c.jpg")
    (tmp_path / "scan.dcm").write_bytes(b"")
    (tmp_path / "other.csv").write_text("image,caption\n")
    folder = write(tmp_path / "0.parquet", {"image": ["images/a.jpg", "c.jpg"], "text": ["a", "c"]}).parent
    source = open_source(str(folder))
    assert [source.record(i).captions for i in range(len(source))] == [("a",), ("c",)]
    assert {each.where: each.count for each in source.left_out} == {"images/b.jpg": 1, "scan.dcm": 1}
    assert [line.split(" (")[0] for line in source.unread] == ["other.csv"]
    write(tmp_path / "0.parquet", {"image": encoded(1, 2), "text": ["a", "c"]})
    source = open_source(str(folder))
    assert [source.image(i) for i in range(len(source))] == encoded(1, 2)
    assert [each.where for each in source.left_out] == ["scan.dcm"]
    assert [line.split(" (")[0] for line in source.unread] == ["c.jpg", "images/a.jpg", "images/b.jpg", "other.csv"]


def test_class_numbers_are_read_by_their_names(tmp_path: Path) -> None:
    features = {"label": {"names": ["cat", "big_dog"], "_type": "ClassLabel"}, "image": {"_type": "Image"}}
    columns = {"image": encoded(0, 1, 2), "label": [1, 0, -1], "number": [1, 0, 1]}
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.table(columns).replace_schema_metadata(metadata), path)
    source = open_source(str(path), reading=DataConfig(captions_from="label", prompts=("a photo of a {}",)))
    captions = [source.record(i).captions for i in range(3)]
    assert captions == [("a photo of a big dog",), ("a photo of a cat",), ()]
    assert source.record(0).facts["number"] == 1
    source = open_source(str(path), reading=DataConfig(caption_column=("label",)))
    assert [source.record(i).captions for i in range(3)] == [("big_dog",), ("cat",), ()]


def test_rows_of_several_images_are_bad(tmp_path: Path) -> None:
    columns = {"images": [encoded(0), encoded(1, 2), []], "text": ["a", "b", "c"]}
    source = open_table(write(tmp_path / "x.parquet", columns))
    assert source.image(0) == b"bytes of 0"
    with pytest.raises(BadSample, match="several images in a row"):
        source.image(1)
    with pytest.raises(NoImage):
        source.image(2)


@pytest.mark.parametrize("suffix", ["arrow", "feather"])
def test_arrow_files(tmp_path: Path, suffix: str, monkeypatch) -> None:
    import pyarrow.feather

    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    path = tmp_path / f"x.{suffix}"
    pyarrow.feather.write_feather(pyarrow.table({"jpg": encoded(0, 1), "caption": [["a", "b"], ["c"]]}), str(path))
    source = open_source(str(path))
    assert [source.record(i).captions for i in range(2)] == [("a", "b"), ("c",)]
    assert [source.image(i) for i in range(2)] == encoded(0, 1)


def test_columns_can_be_given(tmp_path: Path) -> None:
    columns = {"mask": encoded(5), "Pixels": encoded(1), "words": ["x"], "caption": ["y"], "kw": ["t"]}
    path = write(tmp_path / "x.parquet", columns)
    source = open_table(path, DataConfig("pixels", ("words",), "kw"))
    assert (source.image(0), source.record(0).captions, source.record(0).tags) == (b"bytes of 1", ("x",), ("t",))
    assert source.record(0).facts == {"caption": "y"}
    with pytest.raises(UserError, match="no column 'nope'; its columns are: mask, Pixels, words, caption, kw"):
        open_table(path, DataConfig("nope"))
    with pytest.raises(UserError, match=r"Cannot detect the column of x\.parquet with the image paths"):
        open_table(path)


def test_rows_without_an_image_and_damaged_files(tmp_path: Path) -> None:
    path = write(tmp_path / "x.parquet", {"image": [b"", None, *encoded(2)], "text": ["a", "b", None]})
    source = open_table(path)
    for i in (0, 1):
        with pytest.raises(NoImage):
            source.image(i)
    assert source.record(2).captions == ()
    content = path.read_bytes()
    source = open_table(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(BadSample, match="Parquet file cannot be read"):
        source.image(2)
    write(tmp_path / "f" / "a.parquet", {"image": encoded(0), "text": ["a"]})
    write(tmp_path / "f" / "b.parquet", {"image": encoded(0), "caption": ["a"]})
    with pytest.raises(UserError, match=r"b.parquet has other columns than .*a.parquet"):
        open_source(str(tmp_path / "f"))
    write(tmp_path / "g" / "a.parquet", {"a": [1], "b": ["a"]})
    with pytest.raises(UserError, match="columns are: a, b"):
        open_source(str(tmp_path / "g"))
    write_images(tmp_path / "g", "a.jpg")  # then it is a folder of images
    assert len(open_source(str(tmp_path / "g"))) == 1
