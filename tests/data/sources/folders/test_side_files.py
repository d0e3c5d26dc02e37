"""Caption files beside images."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from helpers.data_files import account, left_out_by_reason, write_files, write_images

from coalign.data.account import account_lines
from coalign.data.sources.folders.folder import FolderSource


@pytest.mark.parametrize("side", ["{stem}.{kind}", "{stem}.{KIND}", "{stem}.JPG.{kind}", "{lower}.{Kind}"])
@pytest.mark.parametrize("kind", ["txt", "caption", "captions", "text", "json"])
def test_names_of_caption_files(tmp_path: Path, side: str, kind: str) -> None:
    for number in (1, 2):
        stem = f"DSC000{number}"
        name = side.format(stem=stem, lower=stem.lower(), kind=kind, KIND=kind.upper(), Kind=kind.title())
        captions = [f"caption {number}", "another one"]
        content = json.dumps({"caption": captions}) if kind == "json" else "\n".join(captions)
        write_files(write_images(tmp_path, f"a/{stem}.JPG"), {f"a/{name}": content})
    source = FolderSource(tmp_path)
    assert account(source) == {f"a/DSC000{number}.JPG": (f"caption {number}", "another one") for number in (1, 2)}
    assert not source.left_out
    assert not source.unread


def test_an_empty_field_does_not_hide_another(tmp_path: Path) -> None:
    write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    fields = {"a": {"captions": [], "caption": "one"}, "b": {"caption": None, "text": "two"}, "c": {"captions": []}}
    write_files(tmp_path, {f"{name}.json": json.dumps(each) for name, each in fields.items()})
    assert account(FolderSource(tmp_path)) == {"a.jpg": ("one",), "b.jpg": ("two",), "c.jpg": "no caption"}


def test_precedence(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.jpg", "e.png")
    order = ["txt", "caption", "captions", "text", "json"]
    for skipped, stem in enumerate("abcd"):
        kinds = order[skipped:]
        files = {f"{stem}.{kind}": json.dumps({"caption": kind}) if kind == "json" else kind for kind in kinds}
        write_files(tmp_path, dict(reversed(files.items())))
    write_files(tmp_path, {"e.txt": "both", "e.png.txt": "only the png"})
    source = FolderSource(tmp_path)
    assert account(source) == {
        "a.png": ("txt",),
        "b.png": ("caption",),
        "c.png": ("captions",),
        "d.png": ("text",),
        "e.jpg": ("both",),
        "e.png": ("only the png",),
    }
    assert not source.left_out
    assert source.unread == [
        "a.caption (another caption file of the image is read)",
        "a.captions",
        "b.captions",
        "a.text",
        "b.text",
        "c.text",
        "captions in .json files (the text files beside the images are read)",
    ]


@pytest.mark.parametrize("field", ["caption", "captions", "text"])
def test_json_as_img2dataset_writes_it(tmp_path: Path, field: str) -> None:
    write_images(tmp_path, "00000/000000001.jpg", "00000/000000002.jpg", "00000/000000003.jpg", "00000/000000004.jpg")
    fields = {"url": "u", "key": "1", "width": 64, "exif": None, "tags": ["red", "round"]}
    files = {
        "00000/000000001.json": json.dumps(fields | {field: "a red circle"}),
        "00000/000000002.json": json.dumps({"keywords": "blue, square"}),
        "00000/000000003.json": "{broken",
        "00000/000000004.json": json.dumps({field: ["one", "two"]}),
        "00000/000000009.json": json.dumps({field: "no image"}),
        "00000_stats.json": "{}",
    }
    source = FolderSource(write_files(tmp_path, files))
    assert account(source) == {
        "00000/000000001.jpg": ("a red circle",),
        "00000/000000002.jpg": "no caption",
        "sample 2": "broken JSON",
        "00000/000000004.jpg": ("one", "two"),
    }
    assert source.record(0).tags == ("red", "round")
    assert source.record(0).facts == {"url": "u", "key": "1", "width": 64, "folder": "00000"}
    assert source.record(1).tags == ("blue", "square")
    assert left_out_by_reason(source) == {"caption file without an image": 1}
    assert not source.unread


def test_json_beside_text(tmp_path: Path) -> None:
    """Captions are from the text, tags and facts from the JSON, which may be broken; an empty text is none."""
    write_images(tmp_path, "a.png", "b.png", "c.png")
    fields = {"caption": "a", "tags": ["t"], "width": 3}
    files = {"a.txt": "a", "a.json": json.dumps(fields), "b.txt": "b", "b.json": "{broken", "c.txt": "\n"}
    files["c.json"] = json.dumps({"caption": "from json"})
    source = FolderSource(write_files(tmp_path, files))
    assert account(source) == {"a.png": ("a",), "b.png": ("b",), "c.png": ("from json",)}
    assert (source.record(0).tags, source.record(0).facts) == (("t",), {"width": 3})


@pytest.mark.parametrize("captions", [True, False])
def test_annotations_are_not_captions(tmp_path: Path, captions: bool) -> None:
    """Files of labelme and VOC, and lists for the whole dataset."""
    write_images(tmp_path, *(f"a_{word}.jpg" for word in ("cat", "dog", "cow", "owl", "fox")))
    for word in ("cat", "dog", "cow", "owl", "fox"):
        shapes = json.dumps({"shapes": [{"label": word}], "imageData": "A" * 1000})
        write_files(tmp_path, {f"a_{word}.json": shapes, f"a_{word}.xml": "<annotation/>"})
        if captions:
            write_files(tmp_path, {f"a_{word}.txt": f"my {word}"})
    write_files(
        tmp_path,
        {"classes.txt": "cat\ndog\n", "README.txt": "", "LICENSE": "", "skipped.jsonl": "", "instances.json": "{}"},
    )
    source = FolderSource(tmp_path)
    assert source.record(1).captions == (("my cow",) if captions else ("a cow",))
    assert source.record(0).facts == {}
    assert left_out_by_reason(source) == {}
    assert source.unread == ["classes.txt", "6 .json files such as a_cat.json", "5 .xml files such as a_cat.xml"]


def test_tags_without_captions(tmp_path: Path) -> None:
    write_files(write_images(tmp_path, "red_apple.png"), {"red_apple.png.json": json.dumps({"tags": ["fruit"]})})
    record = FolderSource(tmp_path).record(0)
    assert (record.captions, record.tags) == (("red apple",), ("fruit",))


def test_captions_from_names_are_announced(tmp_path: Path) -> None:
    lines = account_lines(FolderSource(write_images(tmp_path, "red_apple.png", "green_pear.png")))
    assert lines == ["Note: captions are the file names, such as 'green pear', since no image has a caption file."]
    write_files(tmp_path, {"red_apple.txt": "an apple"})
    assert account_lines(FolderSource(tmp_path)) == []


def test_encodings(tmp_path: Path) -> None:
    write_images(tmp_path, "a.png", "b.png", "c.png", "d.png", "e.png", "f.png")
    texts = {
        "a": "grün".encode("utf-16"),
        "b": "grün".encode("utf-8-sig"),
        "c": b"\xfe\xff" + "grün".encode("utf-16-be"),
    }
    texts |= {"d": "grün".encode("latin-1"), "e": "eins\r\nzwei\r\n".encode("utf-16"), "f": "grün".encode("utf-16-le")}
    source = FolderSource(write_files(tmp_path, {f"{name}.txt": text for name, text in texts.items()}))
    assert account(source) == {
        "a.png": ("grün",),
        "b.png": ("grün",),
        "c.png": ("grün",),
        "sample 3": "caption is not UTF-8",
        "e.png": ("eins", "zwei"),
        "f.png": ("grün",),
    }


def test_unicode_forms_of_names(tmp_path: Path) -> None:
    names = [unicodedata.normalize(form, "Äpfel") for form in ("NFC", "NFD")]
    write_files(write_images(tmp_path, f"{names[0]}.png"), {f"{names[1]}.txt": "apples"})
    source = FolderSource(tmp_path)
    assert source.record(0).captions == ("apples",)
    assert not source.left_out


@pytest.mark.parametrize("side", ["{}.caption.txt", "{}.jpg.original_prompt.txt"])
def test_names_with_words_after_dots(tmp_path: Path, side: str) -> None:
    write_images(tmp_path, "IMG.2020.01.jpg", "IMG.2020.02.jpg")
    source = FolderSource(
        write_files(tmp_path, {side.format(f"IMG.2020.0{number}"): f"number {number}" for number in (1, 2)})
    )
    assert account(source) == {f"IMG.2020.0{number}.jpg": (f"number {number}",) for number in (1, 2)}
    assert not source.left_out


@pytest.mark.parametrize(
    ("image", "side"),
    [
        ("images/{}.jpg", "captions/{}.txt"),
        ("Images/{}.JPG", "Text/{}.TXT"),
        ("train/images/{}.jpg", "train/labels/{}.txt"),
        ("images/train/{}.jpg", "labels/train/{}.txt"),
        ("photos/cats/{}.jpg", "cats/{}.caption"),
        ("jpg/{}.jpg", "json/{}.json"),
        ("{}.jpg", "annotations/{}.json"),
    ],
)
def test_caption_files_in_a_folder_of_their_own(tmp_path: Path, image: str, side: str) -> None:
    contents = {f"{number}": f"caption {number}" for number in range(3)}
    write_images(tmp_path, *map(image.format, contents), "labels/0.png")  # a mask has no caption
    for number, caption in contents.items():
        text = json.dumps({"caption": caption}) if side.endswith("json") else caption
        write_files(tmp_path, {side.format(number): text})
    source = FolderSource(tmp_path)
    captions = {image.format(number): (caption,) for number, caption in contents.items()}
    assert account(source) == captions | {"labels/0.png": "no caption"}
    assert not source.left_out


def test_captions_come_before_labels(tmp_path: Path) -> None:
    files = {"labels/1.txt": "0 0.5 0.5 0.1 0.1", "text/1.txt": "a cat"}
    source = FolderSource(write_files(write_images(tmp_path, "images/1.jpg"), files))
    assert account(source) == {"images/1.jpg": ("a cat",)}
    assert source.unread == ["labels/1.txt (another caption file of the image is read)"]


@pytest.mark.parametrize(
    ("content", "captions"),
    [
        ({"Caption": "a"}, ("a",)),
        ({"prompt": ["a", "b"]}, ("a", "b")),
        ({"title": "t", "description": "d"}, ("d",)),
        ({"caption": "", "text": "a"}, ("a",)),
        ({"sentences": [{"raw": "a"}, {"raw": "b"}]}, ("a", "b")),
        (["a", "b"], ("a", "b")),
        ("a", ("a",)),
    ],
)
def test_fields_with_captions(tmp_path: Path, content: object, captions: tuple[str, ...]) -> None:
    write_files(write_images(tmp_path, "1.png"), {"1.json": json.dumps(content)})
    write_files(tmp_path, {"dataset.json": '{"title": "about the dataset"}'})
    source = FolderSource(tmp_path)
    assert account(source) == {"1.png": captions}
    assert not source.left_out
    assert source.unread == ["dataset.json"]
