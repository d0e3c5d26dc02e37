from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from coalign.data.sources.folder import FolderSource, caption_from_name
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample, UserError


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


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
    root = write(
        tmp_path,
        {
            "b/dog.jpg": b"dog",
            "b/dog.txt": b"a dog\n\n  a brown   dog \n",
            "a.png": b"a",
            "a.txt": "ein Hündchen".encode(),
            "bare.tiff": b"bare",
            "bad.gif": b"bad",
            "bad.txt": b"\xff\xfe\x00x",
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
    reasons = " ".join(reason for _, reason in source.problems)
    assert "skipped files: 1 .md" in reasons
    assert "skipped files: 1 .txt without an image" in reasons
    assert "skipped files: 1 hidden" in reasons


def test_file_names_are_captions_if_no_txt_matches_an_image(tmp_path: Path) -> None:
    source = FolderSource(write(tmp_path, {"LICENSE.txt": b"x", "fruit/red_apple-03.png": b"1", "fruit/17.png": b"2"}))
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
    source = FolderSource(write(tmp_path, files))
    assert {name: [source.record(int(i)).key for i in indices] for name, indices in source.splits.items()} == {
        "test": ["test/x_y.png"],
        "train": ["train/cat/a_cat.png", "train/dog/a_dog.png"],
        "val": ["validation/cat/old_cat.png"],
    }
    assert source.record(1).facts == {"folder": "cat"}
    assert source.record(0).facts == {}
    write(tmp_path, {"more/b_c.png": b"5"})
    assert FolderSource(tmp_path).splits is None  # since one folder is not named as a split


def test_links_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", {"one_apple.png": b"1"})
    write(tmp_path / "data", {"two_apples.png": b"2"})
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
    source = FolderSource(write(tmp_path, {name: name.encode() for name in names}))
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
    write(tmp_path, {"a.svg": b"", "b.svg": b"", "c.heic": b""})
    with pytest.raises(UserError, match=r"\(2 \.svg, 1 \.heic\)"):
        FolderSource(tmp_path)
