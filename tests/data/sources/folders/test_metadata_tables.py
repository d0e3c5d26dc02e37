"""Folders of images with metadata tables, such as Hugging Face's imagefolder."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import pytest
from helpers.data_files import account, left_out_by_reason, splits_by_key, write_files, write_images

from coalign.config import DataConfig
from coalign.data.account import account_lines
from coalign.data.sources.folders.folder import FolderSource
from coalign.data.sources.folders.metadata_tables import TablesSource
from coalign.data.sources.open import open_source
from coalign.errors import UserError

Rows = list[dict[str, object]]


def table(kind: str, rows: Rows) -> bytes:
    """The content of a table file."""
    if kind == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        from pyarrow import Table

        file = io.BytesIO()
        parquet.write_table(Table.from_pylist(rows), file)
        return file.getvalue()
    if kind in ("jsonl", "ndjson"):
        return "\n".join(map(json.dumps, rows)).encode()
    if kind == "json":
        return json.dumps(rows).encode()
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def rows_of(folder: str, names: str, extra: dict[str, object] | None = None) -> Rows:
    return [{"file_name": f"{name}.png", "text": f"{name} of {folder}"} | (extra or {}) for name in names]


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "ndjson", "json", "parquet"])
@pytest.mark.parametrize("name", ["metadata", "captions", "Metadata"])
@pytest.mark.parametrize("validation", ["dev", "val", "Valid", "validation"])
def test_tables_in_split_folders(tmp_path: Path, kind: str, name: str, validation: str) -> None:
    if kind == "parquet" and validation != "dev":
        pytest.skip("once is enough")
    for folder in ("train", validation, "test"):
        write_images(tmp_path, *(f"{folder}/{each}.png" for each in "abc"))
        write_files(tmp_path, {f"{folder}/{name}.{kind}": table(kind, rows_of(folder, "abc"))})
    source = open_source(str(tmp_path))
    assert account(source) == {
        f"{folder}/{each}.png": (f"{each} of {folder}",) for folder in ("train", validation, "test") for each in "abc"
    }
    assert splits_by_key(source) == {
        split: [f"{folder}/{each}.png" for each in "abc"]
        for split, folder in [("train", "train"), ("val", validation), ("test", "test")]
    }
    assert not source.left_out
    assert not source.unread


def test_tables_at_any_depth(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "data/train/cats/a.png", "data/train/cats/deep/b.png", "data/dogs/a.png")
    files = {
        "metadata.csv": table("csv", rows_of("top", "a")),
        "data/train/cats/metadata.jsonl": table(
            "jsonl", [{"file_name": "a.png", "text": "x"}, {"file_name": "deep/b.png", "text": "y"}]
        ),
        "data/dogs/captions.tsv": table("tsv", rows_of("dogs", "a")),
    }
    source = open_source(str(write_files(tmp_path, files)))
    assert account(source) == {
        "a.png": ("a of top",),
        "data/dogs/a.png": ("a of dogs",),
        "data/train/cats/a.png": ("x",),
        "data/train/cats/deep/b.png": ("y",),
    }
    assert source.splits is None


def test_nothing_is_lost(tmp_path: Path) -> None:
    """Images in no table, rows without an image and with unusable captions: all are counted once."""
    images = ["train/a.png", "train/b.png", "train/empty.png", "train/extra.png", "test/a.png", "lone/a.png"]
    write_images(tmp_path, *images, "train/photo.dcm", "train/named.dcm")
    rows = [*rows_of("train", "ab"), *rows_of("train", ["missing"]), {"file_name": "empty.png", "text": " "}]
    rows.append({"file_name": "named.dcm", "text": "a scan"})
    files = {
        "train/metadata.csv": table("csv", rows),
        "test/metadata.csv": table("csv", rows_of("test", "a")),
        "train/a.txt": "a caption file",
        "train/captions.csv": table("csv", rows_of("train", "ab")),
        "labels.csv": "image,label\n",
        "README.md": "",
    }
    source = open_source(str(write_files(tmp_path, files)))
    assert account(source) == {
        "test/a.png": ("a of test",),
        "train/a.png": ("a of train",),
        "train/b.png": ("b of train",),
        "train/missing.png": "image file is missing",
        "train/empty.png": "empty caption",
        "train/named.dcm": ("a scan",),  # not an image when decoded
    }
    assert left_out_by_reason(source) == {
        "image that is not in any of 2 tables": 2,  # train/extra.png, lone/a.png
        ".dcm files cannot be opened; convert them to PNG": 1,
    }
    assert source.unread == [
        f"labels.csv (open {tmp_path}/labels.csv to read it)",
        "train/captions.csv",
        "train/a.txt (captions are read from test/metadata.csv)",
    ]
    assert splits_by_key(source)["test"] == ["test/a.png"]
    assert account_lines(source)[0].startswith("Left out 3 of 9: image that is not in any of 2 tables (2), .dcm files")


def test_an_image_in_several_tables_has_all_captions(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "train/b.png")
    top = [{"image": f"./train/{name}.png", "caption": f"{name} of top", "tags": "x"} for name in "ab"]
    own = [{"image": "a.png", "caption": caption, "tags": "x;y"} for caption in ("a of train", "a of top")]
    files = {"metadata.csv": table("csv", top), "train/metadata.csv": table("csv", own)}
    source = open_source(str(write_files(tmp_path, files)))
    assert sorted(account(source).values()) == [("a of top", "a of train"), ("b of top",)]
    assert source.record(0).tags == ("x", "y")


def test_splits_by_column_and_by_folder(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "train/b.png", "test/a.png", "more/a.png", "more/b.png")
    split = [{"file_name": f"{name}.png", "text": name, "split": part} for name, part in [("a", "dev"), ("b", "train")]]
    files = {
        "more/metadata.csv": table("csv", split),
        "train/metadata.csv": table("csv", rows_of("train", "ab")),
        "test/metadata.csv": table("csv", rows_of("test", "a")),
    }
    assert splits_by_key(open_source(str(write_files(tmp_path, files)))) == {
        "val": ["more/a.png"],
        "train": ["more/b.png", "train/a.png", "train/b.png"],
        "test": ["test/a.png"],
    }


def test_a_top_level_table_names_images_in_split_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "train/a.png", "validation/b.png")
    rows = [{"file_name": name, "text": "x y"} for name in ("train/a.png", "validation/b.png")]
    source = open_source(str(write_files(tmp_path, {"metadata.jsonl": table("jsonl", rows)})))
    assert splits_by_key(source) == {"train": ["train/a.png"], "val": ["validation/b.png"]}


def test_images_outside_the_folder_of_the_table(tmp_path: Path) -> None:
    write_images(tmp_path, "outside/a.png", "data/images/a.png")
    texts = {"../images/a.png": "up", "../../outside/a.png": "out", "": "no image"}
    rows: Rows = [{"file_name": name, "text": text} for name, text in texts.items()]
    write_files(tmp_path, {"data/meta/metadata.csv": table("csv", rows)})
    source = open_source(str(tmp_path / "data"))
    assert account(source) == {
        "images/a.png": ("up",),
        "../outside/a.png": ("out",),
        "meta/metadata.csv line 4": "no image path",
    }
    assert not left_out_by_reason(source)


def test_flickr8k_layout(tmp_path: Path) -> None:
    write_images(tmp_path, "Images/1_a.jpg", "Images/2_b.jpg")
    source = open_source(
        str(write_files(tmp_path, {"captions.txt": "image,caption\n1_a.jpg,one\n1_a.jpg,uno\n2_b.jpg,two\n"}))
    )
    assert account(source) == {"Images/1_a.jpg": ("one", "uno"), "Images/2_b.jpg": ("two",)}
    assert not source.left_out
    with pytest.raises(UserError, match=r"captions\.txt has no column 'captoin'; its columns are: image, caption"):
        open_source(str(tmp_path), reading=DataConfig(caption_column=("captoin",)))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
@pytest.mark.parametrize(
    ("tables", "images"),
    [
        ({"{split}": "{split}{number}.png"}, "images/{split}{number}.png"),
        ({"{split}_metadata": "{number}.png"}, "{split}/{number}.png"),
        ({"annotations/captions_{split}2017": "{number}.png"}, "{split}2017/{number}.png"),
    ],
)
def test_tables_of_any_name(tmp_path: Path, kind: str, tables: dict[str, str], images: str) -> None:
    expected = {}
    for split in ("train", "test"):
        ((file, cell),) = tables.items()
        rows: Rows = []
        for number in range(3):
            name = images.format(split=split, number=number)
            write_images(tmp_path, name)
            rows.append({"image": cell.format(split=split, number=number), "caption": f"{split} {number}"})
            expected[name] = (f"{split} {number}",)
        write_files(tmp_path, {f"{file.format(split=split)}.{kind}": table(kind, rows)})
    write_files(tmp_path, {"notes.csv": "a,b\n1,2\n", "README.txt": "image,caption\n"})
    source = open_source(str(tmp_path))
    assert account(source) == expected
    assert {name: len(keys) for name, keys in splits_by_key(source).items()} == {"train": 3, "test": 3}
    assert left_out_by_reason(source) == {}
    assert source.unread == [f"notes.csv (open {tmp_path}/notes.csv to read it)"]
    assert any("captions are read from" in line for line in account_lines(source))


def test_caption_files_come_before_tables_of_any_name(tmp_path: Path) -> None:
    write_files(
        write_images(tmp_path, "a.png"), {"a.txt": "an apple", "x.csv": "image,caption,label\na.png,other,red\n"}
    )
    assert account(open_source(str(tmp_path))) == {"a.png": ("an apple",)}
    assert account(open_source(str(tmp_path), reading=DataConfig(caption_column=("label",)))) == {"a.png": ("red",)}
    with pytest.raises(UserError, match=r"x\.csv has no column 'nothing'; its columns are: image, caption, label"):
        open_source(str(tmp_path), reading=DataConfig(caption_column=("nothing",)))
    write_images(tmp_path / "classes", "cat/1.png", "dog/2.png")
    with pytest.raises(UserError, match="has no table with columns, which --separator needs"):
        open_source(str(tmp_path / "classes"), reading=DataConfig(captions_from="folder", separator=";"))
    (tmp_path / "x.csv").write_text("Bild;Titel\na.png;ein Apfel\n")
    with pytest.raises(UserError, match=r"Cannot detect the column of x\.csv with the image paths"):
        open_source(str(tmp_path), reading=DataConfig(caption_column=("Titel",)))


def test_images_of_another_dataset_are_not_used(tmp_path: Path) -> None:
    write_files(
        write_images(tmp_path, "other/1.png", "mine/b.png"), {"mine/captions.csv": "image,caption\n1.png,one\n"}
    )
    assert list(account(open_source(str(tmp_path / "mine"))).values()) == ["image file is missing"]
    write_images(tmp_path, "my photos/1.png")
    assert account(open_source(str(tmp_path / "mine"))) == {"../my photos/1.png": ("one",)}


def test_tables_that_cannot_be_read(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png")
    write_files(tmp_path, {"metadata.csv": "file_name,label\na.png,3\n"})
    with pytest.raises(UserError, match=r"Cannot detect the column of metadata\.csv with the captions"):
        open_source(str(tmp_path))
    write_files(tmp_path, {"a.txt": "an apple", "b.txt": "a pear", "captions.json": '{"license": "CC0"}'})
    source = open_source(str(tmp_path))
    assert type(source) is FolderSource
    assert account(source) == {"a.png": ("an apple",), "b.png": ("a pear",)}
    assert source.unread == ["captions.json", f"metadata.csv (open {tmp_path}/metadata.csv to read it)"]
    with pytest.raises(UserError, match="has no column 'note'"):
        open_source(str(tmp_path), reading=DataConfig(caption_column=("note",)))
    write_files(tmp_path, {"captions.csv": "file_name,caption\na.png,an apple\n"})  # the next by precedence
    assert account(open_source(str(tmp_path))) == {"a.png": ("an apple",)}


def test_what_img2dataset_downloaded_is_no_unread_data(tmp_path: Path) -> None:
    write_images(tmp_path, "files/00000/0.png", "files/00000/1.png", "files/00000/2.png")
    write_files(tmp_path, {"files/00000/0.txt": "one", "files/00000/1.txt": "two", "files/00000/2.txt": "three"})
    names = ("files/00000", "shards/00000", "parquet/00000")  # only the last holds data
    write_files(tmp_path, {f"{name}_stats.json": "{}" for name in names} | {"shards/00000.tar": ""})
    for name in names:
        (tmp_path / f"{name}.parquet").write_bytes(b"PAR1")
    assert [line.split()[0] for line in open_source(str(tmp_path)).unread] == [
        "parquet/00000.parquet",
        "shards/00000.tar",
    ]


def test_image_named_as_a_table(tmp_path: Path) -> None:
    write_files(write_images(tmp_path, "metadata.png", "x.png"), {"metadata.txt": "image,caption", "x.txt": "x"})
    assert account(open_source(str(tmp_path))) == {"metadata.png": ("image,caption",), "x.png": ("x",)}


def test_coco_json_in_a_folder(tmp_path: Path) -> None:
    coco = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "caption": "one"}, {"image_id": 1, "caption": "two"}],
    }
    write_files(write_images(tmp_path, "train/a.png", "train/b.png"), {"train/captions.json": json.dumps(coco)})
    source = open_source(str(tmp_path))
    assert type(source) is TablesSource
    assert account(source) == {"train/a.png": ("one", "two")}
    assert left_out_by_reason(source) == {"image that is not in train/captions.json": 1}
