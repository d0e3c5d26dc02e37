"""`open_source` opens the right kind of source, and explains why data cannot be opened."""

from __future__ import annotations

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.data_files import samples, write_coco, write_images, write_tar

from coalign.config import DataConfig
from coalign.data.sources.folders.folder import FolderSource
from coalign.data.sources.folders.metadata_tables import TablesSource
from coalign.data.sources.open import open_source
from coalign.data.sources.tables.table_source import TableSource
from coalign.data.sources.tar.shards import ShardSource
from coalign.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_every_kind_is_recognized(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "plain", "red_apple.png", "deep/green_pear.png")
    rows = "image,caption\nred_apple.png,a red apple\n"
    assert type(open_source(str(folder))) is FolderSource
    for name in ("x.csv", "X.TSV", "metadata.csv"):
        (folder / name).write_text(rows)
    (folder / "x.jsonl").write_text(json.dumps({"image": "red_apple.png", "caption": "a red apple"}))
    for name in ("x.csv", "X.TSV", "x.jsonl", ""):  # "": the folder, which now contains metadata.csv
        source = open_source(str(folder / name))
        assert type(source) is (TableSource if name else TablesSource)
        assert source.record(0).captions == ("a red apple",)
    write_tar(tmp_path / "shards" / "0.tar", samples(2))
    (tmp_path / "shards" / "0.parquet").write_bytes(b"img2dataset writes these next to the shards")
    for name in ("", "0.tar", "*.tar", "{0..0}.tar"):
        assert type(open_source(str(tmp_path / "shards" / name))) is ShardSource
    path = write_coco(
        write_images(tmp_path / "coco", "train2017/000007.jpg") / "annotations" / "captions_train2017.json"
    )
    for spec in (str(path), f"coco:{path}", f"coco:{path}:{tmp_path / 'coco' / 'train2017'}"):
        source = open_source(spec)
        assert len(source.record(0).captions) == 5
        assert source.image(0) == b"bytes of train2017/000007.jpg"


@pytest.mark.parametrize("name", ["metadata.jsonl", "captions.jsonl"])
def test_a_dataset_written_by_coalign(tmp_path: Path, name: str) -> None:
    folder = write_images(tmp_path, "images/1.png", "images/2.png")
    rows = [
        {
            "image": f"images/{i}.png",
            "captions": [f"one {i}", f"two {i}"],
            "tags": ["t"],
            "split": split,
            "style": "flat",
        }
        for i, split in [(1, "train"), (2, "val")]
    ]
    (folder / name).write_text("\n".join(map(json.dumps, rows)))
    source = open_source(str(folder))
    record = source.record(1)
    assert (record.captions, record.tags, record.facts) == (("one 2", "two 2"), ("t",), {"style": "flat"})
    assert source.image(1) == b"bytes of images/2.png"
    val = open_source(str(folder), split="validation")
    assert len(val) == 1
    assert val.record(0) == record
    assert val.image(0) == source.image(1)
    with pytest.raises(UserError, match="has no split 'test'; available splits: train, val"):
        open_source(str(folder), split="test")


def test_given_columns_are_used(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("p,q,r\na.jpg,words,t1;t2\n")
    source = open_source(str(tmp_path / "x.csv"), reading=DataConfig("p", ("q",), "r"))
    assert source.record(0).captions == ("words",)
    assert source.record(0).tags == ("t1", "t2")


def test_split_of_a_source_without_splits(tmp_path: Path) -> None:
    write_images(tmp_path, *(f"{word}_thing.png" for word in "abcdefghijklmnopqrstuvwxyz"))
    whole = open_source(str(tmp_path))
    train, val = open_source(str(tmp_path), "train"), open_source(str(tmp_path), "val")
    keys = [[source.record(i).key for i in range(len(source))] for source in (whole, train, val)]
    assert len(keys[2]) >= 1
    assert sorted(keys[1] + keys[2]) == sorted(keys[0])


def test_missing_paths_suggest_a_close_match(tmp_path: Path) -> None:
    write_images(tmp_path / "openclipart", "a_b.png")
    with pytest.raises(UserError, match=r"No such file .*openclpart/x\. Did you mean .*/openclipart\?"):
        open_source(str(tmp_path / "openclpart" / "x"))
    with pytest.raises(UserError, match=r"No such file .*zzz\. Supported data: a folder of images, a CSV"):
        open_source(str(tmp_path / "zzz"))
    with pytest.raises(UserError, match="No such file or folder: scense"):
        open_source("scense")
    with pytest.raises(UserError, match=r"No such file or folder: nothing\.json"):
        open_source("coco:nothing.json")


def test_unsupported_data_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="No images found in"):
        open_source(str(tmp_path / "empty"))
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"x\.zip is an archive; extract it"):
        open_source(str(tmp_path / "x.zip"))
    with pytest.raises(UserError, match=r"\(1 \.zip\); extract x\.zip first"):
        open_source(str(tmp_path))
    (tmp_path / "x.docx").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"Unsupported file type: .*x\.docx\. Supported data: .* \.tar shards"):
        open_source(str(tmp_path / "x.docx"))
    plain = write_tar(tmp_path / "packed" / "plain", samples(1))
    packed = plain.with_name("0.tar.gz")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    with pytest.raises(UserError, match="compressed with gzip"):
        open_source(str(packed))
    with pytest.raises(UserError, match=r"contains compressed shards such as 0\.tar\.gz"):
        open_source(str(packed.parent))
    write_tar(tmp_path / "s" / "0.tar", samples(1))
    with pytest.raises(UserError, match=r"1 of 2 shards .* missing, starting with .*1\.tar"):
        open_source(str(tmp_path / "s" / "{0..1}.tar"))
    with pytest.raises(UserError, match=r"does not end with \.tar"):
        open_source(str(tmp_path / "*.jpg"))


def test_a_single_sample_is_in_train(tmp_path: Path) -> None:
    write_images(tmp_path, "red_apple.png")
    assert len(open_source(str(tmp_path), "train")) == 1
    assert len(open_source(str(tmp_path), "val")) == 0


def test_scenes(tmp_path: Path) -> None:
    source = open_source("scenes:64,size=32", "train")
    assert len(source) == 64
    assert source.record(0).captions
    pixels = source.image(0)
    assert isinstance(pixels, np.ndarray)
    assert pixels.shape == (32, 32, 3)


def test_opening_imports_neither_torch_nor_extras(tmp_path: Path) -> None:
    write_images(tmp_path, "red_apple.png")
    code = (
        "import sys; from coalign.data.sources.open import open_source; "
        f"open_source({str(tmp_path)!r}); "
        "print([name for name in ('torch', 'datasets', 'pyarrow', 'scipy') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
