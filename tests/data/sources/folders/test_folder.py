from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
from helpers.data_files import (
    account,
    left_out_by_reason,
    samples,
    splits_by_key,
    write_files,
    write_images,
    write_tar,
)
from PIL import Image

from coalign.data.account import account_lines
from coalign.data.sources.folders.folder import FolderSource, caption_from_name
from coalign.data.sources.open import open_source
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample, UserError


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("red_apple-03.png", "red apple"),
        ("red apple (2).JPG", "red apple"),
        ("Red-Apple.jpeg", "Red Apple"),
        ("3_apples_17.png", "3 apples"),
        ("mp3.gif", "mp3"),
        ("a__b - c+d.e.png", "a b c d e"),
        ("grüner_Apfel.webp", "grüner Apfel"),
        ("000123.png", ""),
        ("_.png", ""),
    ],
)
def test_caption_from_name(name: str, caption: str) -> None:
    assert caption_from_name(name) == caption


def test_captions_from_txt_files(tmp_path: Path) -> None:
    root = write_files(
        tmp_path,
        {
            "b/dog.jpg": b"dog",
            "b/dog.txt": b"a dog\n\n  a brown   dog \n",
            "a.png": b"a",
            "a.txt": "ein Hündchen".encode(),
            "bare.tiff": b"bare",
            "bad.gif": b"bad",
            "bad.txt": b"\xff\x00x",
            "blank.bmp": b"blank",
            "blank.txt": b" \n\t\n",
            "half.webp": b"half",
            "half.txt": b"good\n" + "ung\xfcltig".encode("latin-1"),
            "zero.jpeg": b"",
            "zero.txt": b"a file of no bytes",
            "orphan.txt": b"x",
            "readme.md": b"x",
            ".hidden.jpg": b"x",
            ".git/x.jpg": b"x",
        },
    )
    source = FolderSource(root)
    samples = {}
    for i in range(len(source)):
        name = os.path.relpath(source.image_path(i), root)
        try:
            record = source.record(i)
            assert record.key == name
            samples[name] = (source.image(i), require_captions(record), dict(record.facts))
        except BadSample as bad:
            samples[name] = bad.reason
    assert samples == {
        "a.png": (b"a", ("ein Hündchen",), {}),
        "b/dog.jpg": (b"dog", ("a dog", "a brown dog"), {"folder": "b"}),
        "bare.tiff": "no caption",
        "bad.gif": "caption is not UTF-8",
        "blank.bmp": "empty caption",
        "half.webp": (b"half", ("good",), {}),
        "zero.jpeg": (b"", ("a file of no bytes",), {}),
    }
    assert source.splits is None
    assert [(each.where, each.reason, each.count) for each in source.left_out] == [
        ("orphan.txt", "caption file without an image", 1)
    ]
    assert not source.unread


def test_file_names_are_captions_if_no_txt_matches_an_image(tmp_path: Path) -> None:
    source = FolderSource(
        write_files(tmp_path, {"LICENSE.txt": b"x", "fruit/red_apple-03.png": b"1", "fruit/17.png": b"2"})
    )
    assert len(source) == 2
    assert source.record(1).captions == ("red apple",)
    assert source.record(1).facts == {"folder": "fruit"}
    assert source.record(0).captions == ()
    assert source.record(0).no_caption == ("empty caption", "")


def test_split_folders(tmp_path: Path) -> None:
    files = {
        "train/cat/a_cat.png": b"1",
        "train/dog/a_dog.png": b"2",
        "validation/cat/old_cat.png": b"3",
        "test/x_y.png": b"4",
    }
    source = FolderSource(write_files(tmp_path, files))
    assert {name: [source.record(int(i)).key for i in indices] for name, indices in source.splits.items()} == {
        "test": ["test/x_y.png"],
        "train": ["train/cat/a_cat.png", "train/dog/a_dog.png"],
        "val": ["validation/cat/old_cat.png"],
    }
    assert source.record(1).facts == {"folder": "cat"}
    assert source.record(0).facts == {}
    write_files(tmp_path, {"more/b_c.png": b"5"})
    assert FolderSource(tmp_path).splits is None  # since one folder is not named as a split


def test_links_are_followed_once(tmp_path: Path) -> None:
    write_files(tmp_path / "elsewhere", {"one_apple.png": b"1"})
    write_files(tmp_path / "data", {"two_apples.png": b"2"})
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone_apple.png").symlink_to(tmp_path / "nowhere.png")
    source = FolderSource(tmp_path / "data")
    assert [source.record(i).key for i in range(len(source))] == [
        "gone_apple.png",
        "two_apples.png",
        "linked/one_apple.png",
    ]
    with pytest.raises(BadSample, match="image file is missing"):
        source.image(0)


@pytest.mark.parametrize(
    "names",
    [
        ("TRAIN/a b.png", "Val/c d.png", "TEST/e f.png"),
        ("data/train/a b.png", "data/dev/c d.png", "data/test/e f.png"),
        ("train/cats/train/a b.png", "validation/dogs/c d.png", "test/x/y/e f.png"),
        ("a/train/a b.png", "b/valid/c d.png", "c/deep/test/e f.png"),
        ("train2017/a b.png", "val2017/c d.png", "test2017/e f.png"),
        ("images_train/a b.png", "validation-set/c d.png", "images_test/e f.png"),
        ("my_test/train/a b.png", "my_test/val/c d.png", "my_test/test/e f.png"),
    ],
)
def test_names_of_split_folders(tmp_path: Path, names: tuple[str, str, str]) -> None:
    source = FolderSource(write_images(tmp_path, *names))
    assert splits_by_key(source) == {split: [name] for split, name in zip(("train", "val", "test"), names)}
    folders = {source.record(index).key: source.record(index).facts.get("folder") for index in range(3)}
    above = "a" if names[0].startswith("a/") else None  # the classes may also be folders of splits
    assert folders[names[0]] == ("cats/train" if "cats" in names[0] else above)


def test_folders_that_are_not_splits(tmp_path: Path) -> None:
    source = FolderSource(write_images(tmp_path / "1", "train/a b.png", "test/c d.png", "my photo.png"))
    assert source.splits is None
    assert any("folders named test, train are not used as splits" in line for line in account_lines(source))
    source = FolderSource(write_images(tmp_path / "2", "test tube/a b.png", "train/c d.png", "car/e f.png"))
    assert source.splits is None
    assert source.record(0).facts == {"folder": "car"}
    source = FolderSource(write_images(tmp_path / "3", "test tube/a b.png", "test tube 2/c d.png"))
    assert source.splits is None
    assert not any("splits" in line for line in account_lines(source))


def test_a_named_pipe_is_an_empty_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a_pipe.jpg")
    source = FolderSource(write_images(tmp_path, "b c.png"))
    assert source.image(0) == b""


def test_linked_split_folders(tmp_path: Path) -> None:
    write_images(tmp_path / "store", "1/a b.png", "2/c d.png")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train").symlink_to(tmp_path / "store" / "1")
    (tmp_path / "data" / "test").symlink_to(tmp_path / "store" / "2")
    (tmp_path / "data" / "broken").symlink_to(tmp_path / "nowhere")
    source = FolderSource(tmp_path / "data")
    assert splits_by_key(source) == {"test": ["test/c d.png"], "train": ["train/a b.png"]}
    assert source.unread == ["broken"]


def test_image_types(tmp_path: Path) -> None:
    """Every type that Pillow can write is read, and types that it cannot open are left out, each with what would help."""
    types = [
        "jpg",
        "JPEG",
        "jfif",
        "jpe",
        "png",
        "webp",
        "gif",
        "bmp",
        "tif",
        "tga",
        "ppm",
        "ico",
        "jp2",
        "avif",
        "pcx",
    ]
    types = [each for each in types if Image.registered_extensions()[f".{each.lower()}"] in Image.SAVE]
    for each in types:
        name = Image.registered_extensions()[f".{each.lower()}"]
        Image.new("RGB", (32, 32), "red").save(tmp_path / f"a_{each}.{each}", name)
    closed = {"a.svg": "<svg/>", "b.SVG": "<svg/>", "c.cr2": "x", "d.svg": "x", "d.txt": "a caption", "a_png.txt": "x"}
    source = FolderSource(write_files(tmp_path, closed))
    assert sorted(account(source)) == sorted(f"a_{each}.{each}" for each in types)
    assert left_out_by_reason(source) == {
        ".cr2 files cannot be opened; convert raw photos to JPEG": 1,
        ".svg files cannot be opened; convert vector graphics to PNG": 3,
    }


def test_images_without_their_extension(tmp_path: Path) -> None:
    for number, (name, kind) in enumerate(
        [("noext", "JPEG"), ("a.jpg_large", "JPEG"), ("b.jpg?w=640", "PNG"), ("c.x.1", "WEBP"), ("d.bin2", "GIF")]
    ):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name, kind)
        write_files(tmp_path, {f"{name}.txt": f"caption {number}"})
    Image.new("RGB", (8, 8)).save(tmp_path / "old.png~", "PNG")  # an editor's backup
    source = FolderSource(write_files(tmp_path, {"text": "words", "Makefile": "", "empty": "", "x.foo": "y"}))
    assert account(source) == {
        "a.jpg_large": ("caption 1",),
        "b.jpg?w=640": ("caption 2",),
        "c.x.1": ("caption 3",),
        "d.bin2": ("caption 4",),
        "noext": ("caption 0",),
    }
    assert source.unread == ["empty", "text", "x.foo"]


def test_what_lies_unread(tmp_path: Path) -> None:
    data = ["b.tar", "c.tar.gz", "d.7z", "e.RAR", "f.parquet", "g.csv", "h.json", "i.xml", "j.mp4", "k.npy", "a.zip"]
    other = [
        "Thumbs.db",
        "desktop.ini",
        ".DS_Store",
        "README",
        "README.md",
        "LICENSE",
        "license.txt",
        "run.py",
        "x.html",
    ]
    other += ["__MACOSX/x/1.png", ".cache/2.png", "._a cat.png"]
    source = open_source(str(write_images(tmp_path, "a cat.png", "one dog.png", *data, *other)))
    assert [source.record(index).key for index in range(len(source))] == ["a cat.png", "one dog.png"]
    unread = " ".join(source.unread)
    assert [name for name in data if name not in unread] == []
    assert len(source.unread) == len(data)
    assert f"open {tmp_path}/f.parquet to read it" in unread
    assert left_out_by_reason(source) == {}


def test_shards_or_images(tmp_path: Path) -> None:
    """A folder with both is read as what there is more of; the other is named."""
    for number in range(3):
        write_tar(tmp_path / f"{number}.tar", samples(2))
    write_images(tmp_path, "a preview.png", "x.csv")
    source = open_source(str(tmp_path))
    assert len(source) == 6
    assert source.unread == ["a preview.png", f"x.csv (open {tmp_path}/x.csv to read it)"]
    write_images(tmp_path, "b c.png", "d e.png", "f g.png")
    source = open_source(str(tmp_path))
    assert len(source) == 4
    assert set(source.unread) > {"0.tar", "1.tar", "2.tar"}


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/gr\xfcn.png", "wb") as file:
        file.write(b"green")
    source = FolderSource(tmp_path)
    assert source.image(0) == b"green"
    with pytest.raises(BadSample, match="caption is not UTF-8"):
        source.record(0)
    (tmp_path / "red.png").write_bytes(b"")
    (tmp_path / "red.txt").write_bytes(b"red")
    with open(os.fsencode(tmp_path) + b"/gr\xfcn.txt", "wb") as file:
        file.write(b"green thing")
    record = FolderSource(tmp_path).record(0)
    assert record.captions == ("green thing",)
    assert record.key.encode() == rb"gr\xfcn.png"


def test_order_is_fixed_and_pickles(tmp_path: Path) -> None:
    names = [f"{folder}{name}.png" for folder in ("", "b/", "a/", "a/c/") for name in ("z y", "k l", "Z Y")]
    source = FolderSource(write_files(tmp_path, {name: name.encode() for name in names}))
    copy = pickle.loads(pickle.dumps(source))
    keys = [copy.record(i).key for i in range(len(copy))]
    assert sorted(keys) == sorted(names)
    assert keys == [FolderSource(tmp_path).record(i).key for i in range(len(source))]
    assert [copy.image(i).decode() for i in range(len(copy))] == keys
    with pytest.raises(IndexError):
        source.image(len(source))


def test_no_images(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No images found in .* \(no other files\)"):
        FolderSource(tmp_path)
    write_files(tmp_path, {"a.svg": b"", "b.svg": b"", "c.cr2": b""})
    with pytest.raises(
        UserError, match=r"\(2 \.svg, 1 \.cr2\); \.cr2 .* convert raw photos to JPEG; \.svg files cannot"
    ):
        FolderSource(tmp_path)
    (tmp_path / "t.csv").touch()
    with pytest.raises(UserError, match=r"to read a table, open .*/t\.csv"):
        FolderSource(tmp_path)
