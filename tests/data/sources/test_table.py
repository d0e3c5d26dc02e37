from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from helpers.data_files import write_coco, write_images

from coalign.data.sources.coco import open_coco
from coalign.data.sources.table import open_table
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample, UserError


def table(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def reasons(source) -> list[str]:
    """The reason why each sample is bad, or "" if it is not."""
    result = []
    for i in range(len(source)):
        try:
            require_captions(source.record(i))
            source.image(i)
            result.append("")
        except BadSample as bad:
            result.append(bad.reason)
    return result


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_any_delimiter_against_the_csv_module(tmp_path: Path, delimiter: str, suffix: str) -> None:
    write_images(tmp_path, "a b.jpg", "c,d.jpg", "e;f.jpg")
    captions = ['with "quotes", commas; semicolons\tand tabs', "two\nlines | bar", "plain"]
    path = tmp_path / f"data{suffix}"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "File_Name", "Caption", "Tags", "license"])
        for i, name in enumerate(["a b.jpg", "c,d.jpg", "e;f.jpg"]):
            writer.writerow([i, name, captions[i], "red, round" if i else "", "cc0"])
    source = open_table(path)
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter=delimiter))
    assert len(source) == len(rows) == 3
    for i, row in enumerate(rows):
        record = source.record(i)
        assert record.key == row["File_Name"]
        assert record.captions == (" ".join(row["Caption"].split()),)
        assert record.tags == (("red", "round") if i else ())
        assert record.facts == {"id": row["id"], "license": "cc0"}
        assert source.image(i) == f"bytes of {row['File_Name']}".encode()


@pytest.mark.parametrize(
    "header", ["image,caption", "IMAGE_PATH,Text", "Filename,title", "path,sentence", " filepath , Captions "]
)
def test_column_names(tmp_path: Path, header: str) -> None:
    write_images(tmp_path, "a.jpg")
    source = open_table(table(tmp_path / "x.csv", f"{header}\na.jpg,an apple\n"))
    assert source.record(0).captions == ("an apple",)
    assert source.image(0) == b"bytes of a.jpg"


def test_several_captions(tmp_path: Path) -> None:
    source = open_table(
        table(tmp_path / "x.csv", 'caption_1,image,caption_2\none,a.jpg,"[""two"", ""three""]"\n,b.jpg,four\n')
    )
    assert source.record(0).captions == ("one", "two", "three")
    assert source.record(1).captions == ("four",)
    rows = "image,caption\na.jpg,one\nb.jpg,two\na.jpg,three\na.jpg,\n"  # one row per caption, as in Flickr8k
    source = open_table(table(tmp_path / "y.csv", rows))
    assert [source.record(i).captions for i in range(len(source))] == [("one", "three"), ("two",)]


def test_given_columns(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", "image;words;caption;mine;kw\na.jpg;first;second;b.jpg;t1|t2\n")
    write_images(tmp_path, "b.jpg")
    source = open_table(path, image_column="mine", caption_columns=["words"], tags_column="kw")
    assert source.record(0).captions == ("first",)
    assert source.record(0).tags == ("t1", "t2")
    assert source.image(0) == b"bytes of b.jpg"
    with pytest.raises(UserError, match="no column 'nope'; its columns are: image, words, caption, mine, kw"):
        open_table(path, image_column="nope")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo,bar\n1,2\n", "image paths.* its columns are: foo, bar"),
        ("image,bar\na.jpg,2\n", "captions.* its columns are: image, bar"),
        ("caption,bar\nx,2\n", "image paths.* its columns are: caption, bar"),
        ("image#caption\na.jpg#x\n", "its columns are: image#caption"),
        ("url,caption\nhttp://x/a.jpg,x\n", "image URLs.* its columns are: url, caption"),
        ("", "its columns are: none"),
        ("image,caption\n", "has no rows"),
    ],
)
def test_tables_without_required_columns_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_table(table(tmp_path / "x.csv", text))


def test_bad_rows(tmp_path: Path) -> None:
    write_images(tmp_path, "ok.jpg", "latin.jpg", "nul.jpg", "huge.jpg", "empty.jpg", "blank.jpg")
    lines = [
        b"image,caption",
        b"ok.jpg,an apple",
        b"gone.jpg,a pear",
        b"few.jpg",
        b"many.jpg,a,b",
        b",no path",
        b"latin.jpg,gr\xfcn",
        b"nul.jpg,a\0b",
        b"huge.jpg," + b"word " * 200_000,
        b"empty.jpg,",
        b"blank.jpg,   ",
        b"",
        b"ok.jpg/nothing,below a file",
    ]
    source = open_table(table(tmp_path / "x.csv", b"\n".join(lines)))
    assert reasons(source) == [
        "",
        "image file is missing",
        "wrong number of columns",
        "wrong number of columns",
        "no image path",
        "caption is not UTF-8",
        "caption contains NUL",
        "caption too long",
        "empty caption",
        "empty caption",
        "image file cannot be read",
    ]
    with pytest.raises(BadSample, match=r"x.csv line 4 has 1, expected 2"):
        source.record(2)


def test_rows_swallowed_by_an_unclosed_quotation_mark_are_reported(tmp_path: Path) -> None:
    text = 'image\tcaption\na.jpg\t"open\n' + "".join(f"{i}.jpg\tcaption {i}\n" for i in range(100))
    source = open_table(table(tmp_path / "x.tsv", text))
    assert source.problems == [("x.tsv line 2", "one row spans 101 lines; is a closing quotation mark missing?")]


def test_absolute_and_relative_paths_and_images_in_a_subfolder(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "sub/a.jpg")
    write_images(tmp_path / "far", "b.jpg")
    text = f"image,caption\nsub/a.jpg,one\n{tmp_path}/far/b.jpg,two\n../far/b.jpg,three\n"
    source = open_table(table(tmp_path / "data" / "x.csv", text))
    assert [source.image(i) for i in range(3)] == [b"bytes of sub/a.jpg", b"bytes of b.jpg", b"bytes of b.jpg"]
    write_images(tmp_path / "kaggle", "Images/1.jpg", "Images/2.jpg")
    source = open_table(table(tmp_path / "kaggle" / "x.csv", "image,caption\ngone.jpg,zero\n1.jpg,one\n2.jpg,two\n"))
    assert reasons(source) == ["image file is missing", "", ""]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_encodings_of_spreadsheets(tmp_path: Path, encoding: str) -> None:
    source = open_table(table(tmp_path / "x.csv", "image;caption\r\na.jpg;grüner Apfel\r\n".encode(encoding)))
    assert source.record(0).captions == ("grüner Apfel",)
    assert source.record(0).key == "a.jpg"


def test_jsonl(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg")
    lines = [
        json.dumps(
            {
                "image": "a.jpg",
                "captions": ["one", None, " ", "two"],
                "tags": ["t", "u"],
                "style": "flat",
                "facts": {"n": 3},
            }
        ),
        json.dumps({"image": "b.jpg", "captions": [], "tags": None}),
        '{"image": "b.jpg", "captions"',
        "[1, 2]",
        json.dumps({"captions": ["x"]}),
        json.dumps({"image": 3, "captions": ["x"]}),
        '{"image": "c.jpg", "captions": "half an emoji \\ud83d"}',
        "[" * 100_000,
    ]
    source = open_table(table(tmp_path / "metadata.jsonl", "\n".join(lines)))
    record = source.record(0)
    assert (record.captions, record.tags, record.facts) == (("one", "two"), ("t", "u"), {"style": "flat", "n": 3})
    assert reasons(source) == [
        "",
        "no caption",
        "broken JSON",
        "broken JSON",
        "no image path",
        "no image path",
        "caption is not UTF-8",
        "broken JSON",
    ]
    assert pickle.loads(pickle.dumps(source)).record(0) == record


def test_json_list(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.json",
        json.dumps([{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": ["two", "three"]}]),
    )
    assert [open_table(path).record(i).captions for i in range(2)] == [("one",), ("two", "three")]
    with pytest.raises(UserError, match="not valid JSON"):
        open_table(table(tmp_path / "y.json", '[{"image": '))


def test_split_column(tmp_path: Path) -> None:
    rows = [
        f"{i}.jpg,caption {i},{name}" for i, name in enumerate(["train", "Validation", "test", "", "restval", "train"])
    ]
    source = open_table(table(tmp_path / "x.csv", "image,caption,Split\n" + "\n".join(rows)))
    assert {name: indices.tolist() for name, indices in source.splits.items()} == {
        "train": [0, 3, 4, 5],
        "val": [1],
        "test": [2],
    }
    assert source.record(0).facts == {}
    assert open_table(table(tmp_path / "y.csv", "image,caption,split\na.jpg,x,train\n")).splits is None
    assert open_table(table(tmp_path / "z.csv", "image,caption,split\na.jpg,x,fold1\n")).splits is None


def test_parquet_against_pyarrow(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

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
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_table(table(tmp_path / "y.parquet", b"PAR1 nonsense"))
    parquet.write_table(pyarrow.table({"image": [b"jpeg"], "caption": ["x"]}), path)
    with pytest.raises(UserError, match="open it as hf:"):
        open_table(path)


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r'pip install "coalign\[hf\]"'):
        open_table(table(tmp_path / "x.parquet", b"PAR1"))


# ---------------------------------------------------------------- COCO


def test_coco_keeps_all_five_captions_and_finds_the_images(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "annotations" / "captions_train2017.json")
    write_images(tmp_path / "val2017", "000001.jpg")
    write_images(tmp_path / "train2017", "000003.jpg", "000007.jpg")
    source = open_coco(path)
    assert [source.record(i).captions for i in range(2)] == [
        tuple(f"caption {j} of {i}" for j in range(5)) for i in (7, 3)
    ]
    assert source.image(1) == b"bytes of 000003.jpg"
    assert source.record(0).facts == {"image_id": 7}
    assert source.record(2).captions == ()
    with pytest.raises(BadSample, match="image file is missing"):
        source.image(2)
    assert source.problems == [(str(path), "5 captions have an unknown image_id")]


def test_coco_with_a_given_folder_and_errors(tmp_path: Path) -> None:
    path = write_coco(tmp_path / "a" / "b" / "x.json")
    with pytest.raises(UserError, match="Cannot find the images"):
        open_coco(path)
    write_images(tmp_path / "far", "000007.jpg")
    assert open_coco(path, tmp_path / "far").image(0) == b"bytes of 000007.jpg"
    with pytest.raises(UserError, match="does not exist"):
        open_coco(path, tmp_path / "nowhere")
    with pytest.raises(UserError, match="contains no captions"):
        open_coco(write_coco(path, annotations=[{"image_id": 7, "bbox": [0, 0, 1, 1]}]), tmp_path / "far")
    with pytest.raises(UserError, match="not COCO captions"):
        open_coco(write_coco(path, annotations=None), tmp_path / "far")
