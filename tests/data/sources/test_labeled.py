"""Images with class labels: captions of class names, in folders, tables, Hugging Face datasets and mixtures."""

from __future__ import annotations

import csv
import json
import tarfile

import numpy as np
import pytest
from helpers.data_files import write_images
from PIL import Image

from coalign.config import DataConfig
from coalign.data.account import account_lines, class_lines
from coalign.data.sources.labeled import label_by_captions
from coalign.data.sources.open import open_source
from coalign.errors import UserError


def captions(source):
    return {source.record(i).key: source.record(i).captions for i in range(len(source))}


def from_folder(path, *prompts):
    return open_source(str(path), reading=DataConfig(captions_from="folder", prompts=prompts))


def from_column(path, column, *prompts):
    return open_source(str(path), reading=DataConfig(captions_from=column, prompts=prompts))


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (("red_circle/IMG_1.jpg", "blue square/IMG_2.jpg"), ["red circle", "blue square"]),
        (("animals/cat/1.jpg", "animals/dog/2.jpg"), ["cat", "dog"]),
        (("train/cat/1.jpg", "val/dog/2.jpg"), ["cat", "dog"]),
        (("cat/train/1.jpg", "dog/test/2.jpg"), ["cat", "dog"]),
        (("cat/images/1.jpg", "dog/images/2.jpg"), ["cat", "dog"]),
        (("data/train/cat/1.jpg", "data/val/dog/2.jpg"), ["cat", "dog"]),
        (("cat/train/images/1.jpg", "dog/test/images/2.jpg"), ["cat", "dog"]),
        (("001.Sparrow/1.jpg", "002.House_Wren/2.jpg"), ["Sparrow", "House Wren"]),
        (("n02085620-Chihuahua/1.jpg", "n02085782-Pug/2.jpg"), ["Chihuahua", "Pug"]),
        (("737-300/1.jpg", "737-400/2.jpg", "A380/3.jpg"), ["737-300", "737-400", "A380"]),
        (("1_euro/1.jpg", "2_euro/2.jpg"), ["1 euro", "2 euro"]),  # the numbers tell the classes apart
        (("car/1.jpg", "train/2.jpg"), ["car", "train"]),  # a class, not a split
        (("猫/1.jpg", "犬/2.jpg"), ["猫", "犬"]),
    ],
)
def test_the_class_is_the_innermost_folder_that_names_one(tmp_path, files, names):
    source = from_folder(write_images(tmp_path, *files), "{}")
    assert captions(source) == {file: (name,) for file, name in zip(files, names)}
    assert sorted(source.classes.names) == sorted(names)
    assert [source.classes.names[number] for number in source.classes.of] == [
        captions(source)[k][0] for k in captions(source)
    ]


@pytest.mark.parametrize("files", [("train/cat/1.jpg", "test/dog/2.jpg"), ("cat/train/1.jpg", "dog/test/2.jpg")])
def test_split_folders_are_the_splits(tmp_path, files):
    source = from_folder(write_images(tmp_path, *files))
    keys = {name: [source.record(int(i)).key for i in indices] for name, indices in source.splits.items()}
    assert keys == {"train": [files[0]], "test": [files[1]]}


def test_prompts_are_templates_names_or_files(tmp_path):
    write_images(tmp_path / "data", "red_circle/1.jpg", "square/2.jpg")
    (tmp_path / "mine.txt").write_text("a drawing of a {}\nthe {}\n")

    def made(*prompts):
        return captions(from_folder(tmp_path / "data", *prompts))["red_circle/1.jpg"]

    assert made() == made("default") == ("a photo of a red circle.",)
    assert made("one {}", "two {}") == ("one red circle", "two red circle")
    assert made(str(tmp_path / "mine.txt"), "the {}") == ("a drawing of a red circle", "the red circle")
    assert len(made("imagenet")) == 80
    with pytest.raises(UserError, match="template"):
        made("a photo of a circle")


def test_images_of_a_split_may_be_in_no_class(tmp_path):
    """As in Tiny ImageNet."""
    source = from_folder(
        write_images(tmp_path, "train/cat/images/1.jpg", "train/dog/images/2.jpg", "val/images/3.jpg"), "{}"
    )
    assert captions(source) == {
        "train/cat/images/1.jpg": ("cat",),
        "train/dog/images/2.jpg": ("dog",),
        "val/images/3.jpg": (),
    }


def test_file_names_are_not_called_captions(tmp_path):
    write_images(tmp_path, "cat/IMG_1.jpg", "dog/IMG_2.jpg")
    assert account_lines(open_source(str(tmp_path)))
    assert not account_lines(open_source(str(tmp_path), reading=DataConfig(captions_from="folder")))


def test_class_folders_replace_other_captions(tmp_path):
    write_images(tmp_path, "cat/1.jpg", "dog/2.jpg")
    (tmp_path / "cat" / "1.txt").write_text("something else")
    assert set(captions(from_folder(tmp_path, "{}")).values()) == {("cat",), ("dog",)}


def test_images_in_no_folder_have_no_class(tmp_path):
    source = from_folder(write_images(tmp_path, "cat/1.jpg", "2.jpg"), "{}")
    assert captions(source) == {"2.jpg": (), "cat/1.jpg": ("cat",)}
    with pytest.raises(UserError, match="class folders"):
        from_folder(write_images(tmp_path / "flat", "1.jpg", "2.jpg"))


def write_table(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("name", ["labels.csv", "labels.tsv", "labels.jsonl"])
@pytest.mark.parametrize("column", ["label", "species", "caption", "labels"])
def test_the_class_is_a_column(tmp_path, name, column):
    """Whatever its name, also that of a caption or a tag column; another caption column is not needed, and not read."""
    write_images(tmp_path, "a/1.jpg", "a/2.jpg", "a/3.jpg")
    rows = [{"image": f"a/{n}.jpg", column: value} for n, value in enumerate(("red_fox", "owl", "red_fox"), 1)]
    source = from_column(write_table(tmp_path / name, rows), column, "a {}")
    assert list(captions(source).values()) == [("a red fox",), ("a owl",), ("a red fox",)]
    with_text = [row | {"text": "words"} for row in rows]
    assert captions(from_column(write_table(tmp_path / name, with_text), column, "a {}")) == captions(source)


def test_a_missing_column_and_empty_cells(tmp_path):
    write_images(tmp_path, "1.jpg", "2.jpg")
    rows = [{"image": "1.jpg", "label": "owl", "text": "x"}, {"image": "2.jpg", "label": "", "text": "y"}]
    table = write_table(tmp_path / "labels.csv", rows)
    assert captions(from_column(table, "label", "{}")) == {"1.jpg": ("owl",), "2.jpg": ()}
    with pytest.raises(UserError, match=r"'species'.*image, label, text"):
        from_column(table, "species")
    with pytest.raises(UserError, match=r"'species'.*folder"):
        from_column(write_images(tmp_path / "folders", "a/1.jpg"), "species")


def test_a_table_of_images_in_class_folders(tmp_path):
    write_images(tmp_path, "images/cat/1.jpg", "images/dog/2.jpg")
    rows = [{"image": "images/cat/1.jpg"}, {"image": "images/dog/2.jpg"}]
    assert set(captions(from_folder(write_table(tmp_path / "list.csv", rows), "{}")).values()) == {("cat",), ("dog",)}


def test_class_labels_of_hugging_face_datasets_are_names(tmp_path):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "red_fox"])})
    write_images(tmp_path, "1.jpg", "2.jpg")
    images = [{"bytes": (tmp_path / name).read_bytes(), "path": None} for name in ("1.jpg", "2.jpg")]
    datasets.Dataset.from_dict({"image": images, "label": [1, 0]}, features).save_to_disk(tmp_path / "saved")
    assert list(captions(from_column(tmp_path / "saved", "label", "{}")).values()) == [("red fox",), ("cat",)]


def test_a_mixture_merges_the_classes(tmp_path):
    write_images(tmp_path / "a", "cat/1.jpg", "dog/2.jpg")
    write_images(tmp_path / "b", "owl/3.jpg", "cat/4.jpg", "5.jpg")
    source = from_folder(f"{tmp_path / 'a'} + {tmp_path / 'b'}", "{}")
    names = [source.classes.names[number] if number >= 0 else None for number in source.classes.of]
    assert names == ["cat", "dog", None, "cat", "owl"]
    assert [next(iter(source.record(i).captions), None) for i in range(5)] == names


@pytest.mark.parametrize(
    ("classes", "images", "found"), [(8, 15, True), (200, 5, True), (100, 4, True), (100, 3, False), (600, 5, True)]
)
def test_repeated_captions_are_class_labels(tmp_path, classes, images, found):
    rows = [{"image": f"{n}.jpg", "caption": f"kind {n % classes}"} for n in range(classes * images)]
    source = open_source(str(write_table(tmp_path / "pairs.csv", rows)))
    labeled = label_by_captions(source)
    assert (labeled.classes is not None) == found
    if found:
        assert captions(labeled) == captions(source)
        assert [labeled.classes.names[number] for number in labeled.classes.of] == [row["caption"] for row in rows]


def test_captions_of_large_data_are_not_all_read(tmp_path):
    rows = [{"image": f"{n}.jpg", "caption": f"words {n}"} for n in range(20_000)]
    source = open_source(str(write_table(tmp_path / "pairs.csv", rows)))
    read = []
    record = source.record
    source.record = lambda index: read.append(index) or record(index)
    assert label_by_captions(source) is source
    assert len(read) <= 2000
    assert np.unique(read).size > 1500


@pytest.mark.parametrize("column", ["label", "Label", "split", "tags"])
def test_any_column_may_hold_the_class_whatever_the_case_of_its_name(tmp_path, column):
    (tmp_path / "x.csv").write_text(f"image,{column}\na.jpg,cat\nb.jpg,big_dog\nc.jpg,\n")
    source = from_column(tmp_path / "x.csv", column.lower(), "a {}")
    assert captions(source) == {"a.jpg": ("a cat",), "b.jpg": ("a big dog",), "c.jpg": ()}
    if column != "tags":
        with pytest.raises(
            UserError, match="the captions" + (".*--captions-from [Ll]abel" if column != "split" else "")
        ):
            open_source(str(tmp_path / "x.csv"))


def test_folders_inside_of_shards_are_classes(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number, name in enumerate(["owl/a.png", "./wren/b.png", "owl/c.png", "d.png"]):
            Image.new("RGB", (8, 8), (50 * number, 0, 0)).save(tmp_path / "image.png")
            tar.add(tmp_path / "image.png", name)
    source = from_folder(tmp_path / "0.tar", "{}")
    named = {source.record(index).key[2:]: source.record(index).captions for index in range(4)}
    assert named == {"owl/a": ("owl",), "wren/b": ("wren",), "owl/c": ("owl",), "d": ()}


def test_what_the_classes_leave_out_is_said(tmp_path):
    files = [f"{name}/IMG_{number}.jpg" for name in ("owl", "wren") for number in range(4)]
    source = from_folder(write_images(tmp_path, *files, "dodo/IMG_1.jpg", "IMG_1.jpg", "IMG_2.jpg"))
    index = {source.record(i).key: i for i in range(len(source))}
    val = np.array([index["owl/IMG_0.jpg"], index["wren/IMG_0.jpg"]])
    train = np.setdiff1d(np.arange(len(source)), val)
    assert class_lines(source, train, val) == [
        "Classes: 3 ('dodo', 'owl', 'wren').",
        "Images without a class, which are not used: 2.",
        "Classes without held-out images, whose recall is not measured: 1 ('dodo').",
    ]
    (line,) = class_lines(source, val[:1], val)[2:]
    assert line == "Classes without training images, which the model does not learn: 1 ('wren')."
    assert len(class_lines(source, train, val[:0])) == 2  # nothing is held out
    assert not account_lines(source)  # file names are no captions here
    assert "captions are the file names" in account_lines(open_source(str(tmp_path)))[0]
