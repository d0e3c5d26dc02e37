from __future__ import annotations

from pathlib import Path

import pytest
from helpers.data_files import account, left_out_by_reason, write_files, write_images

from coalign.data.sources.open import open_source
from coalign.data.sources.tables.image_paths import ImagePaths
from coalign.errors import UserError


def read(path: Path) -> list[str]:
    """What each image of a table holds, in order; the table is read without a loss."""
    source = open_source(str(path))
    assert left_out_by_reason(source) == {}
    assert all(isinstance(each, tuple) for each in account(source).values())
    return [bytes(source.image(i)).decode().removeprefix("bytes of ") for i in range(len(source))]


@pytest.mark.parametrize("where", ["", "images/", "a/b/"])
@pytest.mark.parametrize(
    ("file", "written"),
    [
        ("10{}.jpg", "10{}"),
        ("10{}.PNG", "10{}"),
        ("10{}.jpg", "10{}.JPG"),
        ("10{}.jpg", "10{}.Jpg"),
        ("a b {}.jpg", "a%20b%20{}.jpg"),
        ("s/{}.jpg", "s\\{}.jpg"),
        ("{}.jpg", "data/train/{}.jpg"),
        ("{}.jpg", "/home/me/data/{}.jpg"),
        ("s/{}.jpg", "C:\\me\\data\\s\\{}.jpg"),
        ("{}.jpg", "../data/{}"),
        ("{}.jpg", "'{}.jpg'"),
        ("{}.jpg", "['{}.jpg']"),
    ],
)
def test_images_are_found_however_their_paths_are_written(tmp_path: Path, where: str, file: str, written: str) -> None:
    names = [where + file.format(number) for number in range(4)]
    write_images(tmp_path, *names)
    rows = "".join(f"{written.format(number)}\tcaption {number}\n" for number in range(4))
    write_files(tmp_path, {"x.tsv": f"image\tcaption\n{rows}"})
    assert read(tmp_path / "x.tsv") == names


def test_absolute_paths_and_urls_of_files(tmp_path: Path) -> None:
    write_images(tmp_path / "far", "a b.jpg", "c.jpg")
    rows = f"file://{tmp_path}/far/a%20b.jpg,one\n{tmp_path}/far/c.jpg,two\n"
    write_files(tmp_path, {"near/x.csv": f"image,caption\n{rows}"})
    assert read(tmp_path / "near" / "x.csv") == ["a b.jpg", "c.jpg"]


def test_a_removed_prefix_is_named_and_never_mixes_folders(tmp_path: Path) -> None:
    write_images(tmp_path, "train/cat/1.jpg", "train/dog/1.jpg")
    rows = "/data/me/train/cat/1.jpg,a cat\n/data/me/train/dog/1.jpg,a dog\n"
    write_files(tmp_path, {"x.csv": f"image,caption\n{rows}"})
    assert read(tmp_path / "x.csv") == ["train/cat/1.jpg", "train/dog/1.jpg"]
    (note,) = open_source(str(tmp_path / "x.csv")).left_out
    assert note.reason == f"images are read from {tmp_path} without /data/me/ in their paths"
    rows = "cow/1.jpg,a cow\nsheep/1.jpg,a sheep\n"  # folders that are not there; another one has a file of this name
    write_files(tmp_path, {"y.csv": f"image,caption\n{rows}"})
    found = account(open_source(str(tmp_path / "y.csv")))
    assert set(found.values()) == {"image file is missing"}


def test_images_in_the_folder_of_the_table_come_before_those_beside_it(tmp_path: Path) -> None:
    write_images(tmp_path, "mine/images/1.jpg", "another/images/0.jpg", "another/images/1.jpg")
    paths = ImagePaths(tmp_path / "mine", ["0.jpg", "1.jpg"])
    assert paths.path("0.jpg") == str(tmp_path / "mine/images/0.jpg")


def test_images_as_text_are_refused(tmp_path: Path) -> None:
    write_files(tmp_path, {"x.tsv": f"image\tcaption\n{'/9j/' * 400}\tone\n"})
    with pytest.raises(UserError, match=r"images as text in the column 'image'"):
        open_source(str(tmp_path / "x.tsv"))
