from __future__ import annotations

import csv
import json
import pickle
from pathlib import Path

import pytest
from helpers.data_files import write_coco, write_images
from PIL import Image

from coalign.config import DETECT, DataConfig
from coalign.data.sources.base import LeftOut
from coalign.data.sources.coco import open_coco
from coalign.data.sources.open import open_source
from coalign.data.sources.tables.table import open_table
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample, UserError
from coalign.workflows.data import check_data


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
    "header",
    [
        "image,caption",
        "IMAGE_PATH,Text",
        "Filename,title",
        "path,sentence",
        " filepath , Captions ",
        "imageName,captionText",
        "ImagePath,Alt Text",
        "image-file-name,caption_en",
        "'image','caption'",
        "image_id,Long Caption",
        "fname,report",
        "caption_id,photo,caption_text",
        "num_comments,pic,comment",
        "caption_embedding,pic,caption_blip",
    ],
)
def test_column_names(tmp_path: Path, header: str) -> None:
    write_images(tmp_path, "a.jpg")
    row = "7,a.jpg,an apple" if header.count(",") == 2 else "a.jpg,an apple"
    source = open_table(table(tmp_path / "x.csv", f"{header}\n{row}\n"))
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


def test_a_row_with_several_images_is_a_sample_of_each(tmp_path: Path) -> None:
    rows = """image,caption,split\n"['a.jpg', 'b.jpg']",one,val\n"[""b.jpg""]",two,val\nc.jpg,three,train\n"""
    source = open_table(table(tmp_path / "x.csv", rows))
    expected = {"a.jpg": ("one",), "b.jpg": ("one", "two"), "c.jpg": ("three",)}
    assert {source.record(i).key: source.record(i).captions for i in range(len(source))} == expected
    assert source.splits is not None
    assert {name: indices.tolist() for name, indices in source.splits.items()} == {"val": [0, 1], "train": [2]}
    objects = [
        {"image_path": ["a.jpg", "b.jpg"], "report": "one"},
        {"image_path": [{"path": "c.jpg"}], "report": "two"},
    ]
    source = open_table(table(tmp_path / "x.jsonl", "\n".join(map(json.dumps, objects))))
    assert [source.record(i).captions for i in range(len(source))] == [("one",), ("one",), ("two",)]


@pytest.mark.parametrize("between", ["|", ", ", "; ", "\n", ","])
def test_a_cell_with_several_images_is_a_sample_of_each(tmp_path: Path, between: str) -> None:
    path = tmp_path / "x.csv"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["image", "caption"], [f"a b.jpg{between}c.PNG", "one"], ["d,e.jpg", "two"]])
    source = open_table(path)
    expected = {"a b.jpg": ("one",), "c.PNG": ("one",), "d,e.jpg": ("two",)}
    assert {source.record(i).key: source.record(i).captions for i in range(len(source))} == expected


def test_captions_and_image_columns_that_are_not_used_are_noted(tmp_path: Path) -> None:
    rows = "photo_1;photo_2;title;description;photographer\na.jpg;b.jpg;Tür;grün;x\nc.jpg;;Tor;weiß;y\n"
    source = open_table(table(tmp_path / "x.csv", rows.encode("cp1252")))
    assert reasons(source)[0] == "caption is not UTF-8"
    assert source.record(1).captions == ("Tor",)
    assert source.record(1).unusable == ("caption is not UTF-8",)
    assert source.left_out == [
        LeftOut(
            "x.csv line 2",
            "images are read from 'photo_1', not from 'photo_2'; to use those, write a row for each image",
            0,
        ),
    ]
    assert open_table(table(tmp_path / "x.csv", rows.replace("photo_2", "photos"))).left_out == []
    with pytest.raises(UserError, match="not UTF-8, so save the table as UTF-8"):
        open_table(table(tmp_path / "x.csv", "Bild;Größe\na.jpg;x\n".encode("cp1252")))


def test_a_repeated_row_is_noted_and_used_once(tmp_path: Path) -> None:
    rows = "image,caption\na.jpg,one\na.jpg,two\na.jpg,one\nb.jpg,one\nb.jpg,one\na.jpg,\n"
    source = open_table(table(tmp_path / "x.csv", rows))
    assert [source.record(i).captions for i in range(len(source))] == [("one", "two"), ("one",)]
    reason = "captions that other rows of their image repeat are used once (2)"
    assert source.left_out == [LeftOut("x.csv line 4", reason, 0)]
    objects = [{"image": "a.jpg", "captions": ["one", "one", "two"]}]  # COCO has equal captions by two writers
    source = open_table(table(tmp_path / "x.json", json.dumps(objects)))
    assert source.record(0).captions == ("one", "one", "two")


def test_many_rows_of_one_image(tmp_path: Path) -> None:
    captions = [f"number {number % 2500}" for number in range(3000)]  # 500 are repeated
    lines = [f"{'none' if number % 10 else number}.jpg,{caption}" for number, caption in enumerate(captions)]
    source = open_table(table(tmp_path / "x.csv", "\n".join(["image,caption", *lines])))
    expected = dict.fromkeys(caption for number, caption in enumerate(captions) if number % 10)
    assert source.record(1).captions == tuple(expected)
    assert len(source) == 301
    (note,) = source.left_out
    assert "used once (450)" in note.reason


def test_many_rows_are_counted_and_the_first_named(tmp_path: Path) -> None:
    lines = [*["a.jpg,one"] * 2, *["a,b,c,d"] * 1000, *["b.jpg,two", "x,y,z"]]
    source = open_table(table(tmp_path / "x.csv", "\n".join(["caption,image", *lines])))
    assert sum(each.count for each in source.left_out) == 1001
    assert source.left_out[0] == LeftOut("x.csv line 4", "wrong number of columns")
    assert len(source.left_out) < 300
    with pytest.raises(UserError, match=r"no rows that can be read: wrong number of columns \(1,000\)"):
        open_table(table(tmp_path / "y.csv", "\n".join(["caption,image", *lines[2:1002]])))


@pytest.mark.parametrize("cell", ["nan", "NaN", "None", "NULL", "null", "<NA>", "N/A", "\\N", "", "  "])
def test_cells_that_say_that_they_are_empty(tmp_path: Path, cell: str) -> None:
    rows = f"image,caption_0,caption_1,split\na.jpg,one,{cell},{cell}\nb.jpg,{cell},{cell},val\n{cell},three,,val\n"
    source = open_table(table(tmp_path / "x.csv", rows))
    assert [source.record(i).captions for i in range(3)] == [("one",), (), ("three",)]
    assert source.image_path(2) is None
    assert source.splits is not None
    assert {name: indices.tolist() for name, indices in source.splits.items()} == {"train": [0], "val": [1, 2]}


def test_given_columns(tmp_path: Path) -> None:
    path = table(tmp_path / "x.csv", "image;words;caption;mine;kw\na.jpg;first;second;b.jpg;t1|t2\n")
    write_images(tmp_path, "b.jpg")
    source = open_table(path, DataConfig("mine", ("words",), "kw"))
    assert source.record(0).captions == ("first",)
    assert source.record(0).tags == ("t1", "t2")
    assert source.image(0) == b"bytes of b.jpg"
    with pytest.raises(UserError, match="no column 'nope'; its columns are: image, words, caption, mine, kw"):
        open_table(path, DataConfig("nope"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("foo,bar\n1,2\n", "image paths.* its columns are: foo, bar"),
        ("image,bar\na.jpg,2\n", "captions.* its columns are: image, bar"),
        ("caption,bar\nx,2\n", "image paths.* its columns are: caption, bar"),
        ("image#caption\na.jpg#x\n", "its columns are: image#caption"),
        ("url,caption\nhttp://x/a.jpg,x\n", "image URLs.* its columns are: url, caption"),
        ("", "its columns are: none"),
        ("image_id,url,caption\n1,http://x/a.jpg,x\n", "image URLs"),
        ("a red circle,http://x/a\na blue circle,http://x/b\n", "image URLs"),
        ("image,caption\nhttps://x/a.jpg,x\n", "image URLs.* for example with img2dataset$"),
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
        "image file is missing",
        "no image path",
        "caption is not UTF-8",
        "caption contains NUL",
        "caption too long",
        "empty caption",
        "empty caption",
        "image file cannot be read",
    ]
    assert source.left_out == [
        LeftOut("x.csv line 4", "wrong number of columns"),
    ]
    assert source.record(2).captions == ("a,b",)
    with pytest.raises(UserError, match=r"has no rows that can be read: wrong number of columns \(2\)"):
        open_table(table(tmp_path / "x.csv", "image,caption\na.jpg\nb.jpg\n"))


def test_absolute_and_relative_paths_and_images_in_a_subfolder(tmp_path: Path) -> None:
    write_images(tmp_path / "data", "sub/a.jpg")
    write_images(tmp_path / "far", "b.jpg")
    text = f"image,caption\nsub/a.jpg,one\n{tmp_path}/far/b.jpg,two\n../far/b.jpg,three\n"
    source = open_table(table(tmp_path / "data" / "x.csv", text))
    assert [source.image(i) for i in range(3)] == [b"bytes of sub/a.jpg", b"bytes of b.jpg", b"bytes of b.jpg"]
    write_images(tmp_path / "kaggle", "Images/1.jpg", "Images/2.jpg")
    source = open_table(table(tmp_path / "kaggle" / "x.csv", "image,caption\ngone.jpg,zero\n1.jpg,one\n2.jpg,two\n"))
    assert reasons(source) == ["image file is missing", "", ""]
    (tmp_path / "kaggle" / "texts").mkdir()
    rows = "image,caption\n.\\1.jpg,one\n2.jpg,two\n"  # written on Windows, beside the folder of images
    source = open_table(table(tmp_path / "kaggle" / "texts" / "x.csv", rows))
    assert [source.image(i) for i in range(2)] == [b"bytes of Images/1.jpg", b"bytes of Images/2.jpg"]


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
    assert reasons(source) == ["", "no caption", "no image path", "image file is missing", "caption is not UTF-8"]
    assert source.left_out == [LeftOut(f"metadata.jsonl line {number}", "broken JSON") for number in (3, 4, 8)]
    assert pickle.loads(pickle.dumps(source)).record(0) == record


def test_json_list(tmp_path: Path) -> None:
    path = table(
        tmp_path / "x.json",
        json.dumps([{"image": "a.jpg", "caption": "one"}, {"image": "b.jpg", "caption": ["two", "three"]}]),
    )
    assert [open_table(path).record(i).captions for i in range(2)] == [("one",), ("two", "three")]
    with pytest.raises(UserError, match="not valid JSON"):
        open_table(table(tmp_path / "y.json", '[{"image": '))


ROWS = [{"image": "a.jpg", "caption": ["one", "two"]}, {"image": "b.jpg", "caption": "three"}]
JSON_FORMS = {
    "lines": "\n".join(map(json.dumps, ROWS)),
    "a list": json.dumps(ROWS, indent=1),
    "a list in one line": json.dumps(ROWS),
    "rows besides metadata": json.dumps({"info": {"version": 1}, "data": ROWS}),
    "captions by image": json.dumps({row["image"]: row["caption"] for row in ROWS}),
    "objects by image": json.dumps({row["image"]: {"captions": row["caption"]} for row in ROWS}),
    "columns": json.dumps({name: [row[name] for row in ROWS] for name in ("image", "caption")}),
    "columns by row": json.dumps({name: {str(i): row[name] for i, row in enumerate(ROWS)} for name in ROWS[0]}),
    "rows by number": json.dumps({str(i): row for i, row in enumerate(ROWS)}),
    "rows by split": json.dumps({"train": ROWS[:1], "val": ROWS[1:]}),
    "captions by image, by split": json.dumps({row["image"]: {row["image"]: row["caption"]} for row in ROWS})
    .replace('"a.jpg": {', '"train": {')
    .replace('"b.jpg": {', '"test": {'),
    "rows in an object in an object": json.dumps({"version": 3, "data": {"rows": ROWS}}),
    "rows besides other lists": json.dumps({"licenses": [{"id": 1, "name": "x"}], "data": ROWS}),
    "captions by image in an object": json.dumps({"captions": {row["image"]: row["caption"] for row in ROWS}}),
    "captions by image without extension": json.dumps({row["image"][:-4]: row["caption"] for row in ROWS}),
    "captions by image in lines": "\n".join(json.dumps({row["image"]: row["caption"]}) for row in ROWS),
    "pairs": json.dumps([[row["image"], row["caption"]] for row in ROWS]),
    "pairs in lines": "\n".join(json.dumps([row["caption"], row["image"]]) for row in ROWS),
    "pandas, orient=split": json.dumps(
        {"columns": [*ROWS[0]], "index": [0, 1], "data": [[*row.values()] for row in ROWS]}
    ),
    "lines with commas": ",\n".join(map(json.dumps, ROWS)),
    "indented objects": "\n".join(json.dumps(row, indent=2) for row in ROWS),
    "objects one after the other": "".join(map(json.dumps, ROWS)),
    "conversations": json.dumps(
        [
            {
                "id": row["image"],
                "image": row["image"],
                "conversations": [
                    {"from": "human", "value": "<image>\nDescribe it."},
                    {"from": "gpt", "value": row["caption"]},
                ],
            }
            for row in ROWS
        ]
    ),
    "objects of captions": json.dumps([row | {"caption": [{"raw": row["caption"], "id": 1}]} for row in ROWS]),
    "objects of images": json.dumps([row | {"image": {"path": row["image"]}} for row in ROWS]),
}


@pytest.mark.parametrize("form", list(JSON_FORMS))
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_forms_of_json(tmp_path: Path, form: str, encoding: str, suffix: str) -> None:
    if form == "lines with commas" and suffix == ".json":
        pytest.skip("not JSON")
    lines = form.startswith("lines") or form.endswith("in lines") or JSON_FORMS[form].startswith(("[", "{\n"))
    if suffix == ".jsonl" and not lines:
        pytest.skip("one object is one line")
    write_images(tmp_path, "a.jpg", "b.jpg")
    source = open_source(str(table(tmp_path / f"x{suffix}", JSON_FORMS[form].encode(encoding))))
    assert [source.record(i).captions for i in range(len(source))] == [("one", "two"), ("three",)]
    assert [source.image(i) for i in range(len(source))] == [b"bytes of a.jpg", b"bytes of b.jpg"]
    assert source.left_out == []


def test_names_that_are_no_images_among_captions_by_image(tmp_path: Path) -> None:
    captions = {"a.jpg": "one", "b.jpg": "two", "info": {"version": 1}, "c.jpg": "three"}
    source = open_table(table(tmp_path / "x.json", json.dumps(captions)))
    assert {source.record(i).key: source.record(i).captions for i in range(len(source))} == {
        "a.jpg": ("one",),
        "b.jpg": ("two",),
        "info": (),
        "c.jpg": ("three",),
    }


def test_what_is_used_and_left_out_adds_up(tmp_path: Path) -> None:
    """Images count, with the captions of all their rows; so does each row without an image and each that cannot be read."""
    for name in "abc":
        Image.new("RGB", (9, 8), f"#{name * 6}").save(tmp_path / f"{name}.jpg")
    rows = [
        "image,caption,tags",
        "a.jpg,one,",
        "a.jpg,two,t",
        "b.jpg,three,",
        "c.jpg,,",
        "d.jpg,gone,",
        ",four,",
        "x,y,z,w",
        "e",
    ]
    data, account = table(tmp_path / "x.csv", "\n".join(rows)), tmp_path / "account.json"
    check_data(str(data), None, None, account, 10, DETECT)
    found = json.loads(account.read_text())
    assert found["used"] == 2
    assert found["left_out"] == {
        "empty caption": 1,
        "image file is missing": 1,
        "no image path": 1,
        "wrong number of columns": 2,
    }
    assert [(sample["key"], sample["captions"]) for sample in found["samples"]] == [
        ("a.jpg", ["one", "two"]),
        ("b.jpg", ["three"]),
    ]


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
    assert source.left_out == [LeftOut(str(path), "caption of an unknown image_id", 5)]


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
