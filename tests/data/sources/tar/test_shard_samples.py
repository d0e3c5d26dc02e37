"""Members of shards: which form a sample, what is read of it, and that every sample is counted exactly once, as used or left out."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
from helpers.data_files import account, left_out_by_reason, splits_by_key, write_files, write_tar

from coalign.config import DataConfig
from coalign.data.account import account_lines
from coalign.data.images.formats import IMAGE_EXTENSIONS, UNSUPPORTED
from coalign.data.sources.open import open_source
from coalign.data.sources.tar import shard_index
from coalign.data.sources.tar.shards import open_shards
from coalign.errors import UserError

JPEG, PNG = b"\xff\xd8\xff\xe0" + bytes(40), b"\x89PNG\r\n\x1a\n" + bytes(40)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def opened(tmp_path: Path, *members: tuple[str, bytes | str] | tarfile.TarInfo, form: int = tarfile.PAX_FORMAT):
    entries = [member if isinstance(member, tarfile.TarInfo) else (member[0], content(member[1])) for member in members]
    return open_shards(str(write_tar(tmp_path / "s.tar", entries, form)))


def content(value: bytes | str) -> bytes:
    return value.encode() if isinstance(value, str) else value


def special(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "elsewhere"
    return info


@pytest.mark.parametrize("extension", sorted(IMAGE_EXTENSIONS))
def test_image_types(tmp_path: Path, extension: str) -> None:
    source = opened(
        tmp_path, (f"0.{extension}", "lower"), ("0.txt", "a"), (f"1.{extension.upper()}", "upper"), ("1.TXT", "b")
    )
    assert account(source) == {"s/0": ("a",), "s/1": ("b",)}
    assert [source.image(0), source.image(1)] == [b"lower", b"upper"]
    assert not source.left_out


def test_images_that_cannot_be_opened_are_left_out_by_type(tmp_path: Path) -> None:
    kinds = sorted(UNSUPPORTED)
    members = [(f"{i}.{kind.upper() if i % 2 else kind}", "image") for i, kind in enumerate(2 * kinds)]
    members += [(f"{i}.txt", f"caption {i}") for i in range(len(members))]
    source = opened(tmp_path, *members, ("used.jpg", "image"), ("used.txt", "a circle"), ("used.heic", "the original"))
    assert account(source) == {"s/used": ("a circle",)}
    reasons = left_out_by_reason(source)
    assert {reason.split()[0].removeprefix("."): count for reason, count in reasons.items()} == dict.fromkeys(kinds, 2)
    assert f"Left out {2 * len(kinds)} of {2 * len(kinds) + 1}" in account_lines(source)[0]
    with pytest.raises(UserError, match=r"\.svg files cannot be opened; convert"):
        opened(tmp_path, ("0.svg", "image"), ("0.txt", "a"))


@pytest.mark.parametrize(
    "name", ["a.txt", "a.caption", "a.captions", "a.text", "a.CAPTION", "a.Txt", "a.jpg.txt", "a.jpg.caption"]
)
def test_caption_files(tmp_path: Path, name: str) -> None:
    for order in (1, -1):
        source = opened(tmp_path, *[(name, "one\ntwo"), ("a.jpg", "image")][::order], ("b.jpg", "other"))
        assert account(source) == {"s/a": ("one", "two"), "s/b": "no caption"}
        assert source.fingerprints().caption_counts.tolist() == (
            [0, 2] if len(source) == 2 and source.record(0).key == "s/b" else [2, 0]
        )
        assert not source.left_out


@pytest.mark.parametrize(
    ("members", "captions"),
    [
        ({"a.caption": "second", "a.txt": "first"}, ("first",)),
        ({"a.json": '{"caption": "json"}', "a.text": "text"}, ("text",)),
        ({"a.json": '{"caption": "json"}', "a.txt": " \n"}, ("json",)),
        ({"a.json": '{"caption": "json"}', "a.txt": ""}, ("json",)),
        ({"a.json": '{"captions": ["one", "two"]}'}, ("one", "two")),
        ({"a.json": '{"text": "three"}'}, ("three",)),
        ({"a.jpg.json": '{"text": "four"}'}, ("four",)),
        ({"a.json": "{broken", "a.txt": "text"}, ("text",)),
        ({"a.json": "{broken"}, "broken JSON"),
        ({"a.json": "[1]"}, "broken JSON"),
        ({"a.json": '{"width": 3}'}, "no caption"),
        ({"a.json": '{"width": 3}', "a.txt": ""}, "empty caption"),
        ({"a.txt": "grün".encode("utf-16")}, ("grün",)),
        ({"a.txt": "grün".encode("latin-1"), "a.json": '{"caption": "json"}'}, "caption is not UTF-8"),
        ({"A.TXT": "other case"}, ("other case",)),
    ],
)  # fmt: skip
def test_captions_by_precedence(tmp_path: Path, members: dict[str, bytes | str], captions: object) -> None:
    for order in (1, -1):
        source = opened(tmp_path, *[("a.jpg", "image"), *members.items()][::order])
        assert list(account(source).values()) == [captions]
        expected = len(captions) if isinstance(captions, tuple) else 0
        assert source.fingerprints().caption_counts.tolist() == [expected]


def test_tags_and_facts_beside_a_text(tmp_path: Path) -> None:
    fields = json.dumps({"tags": ["red"], "url": "u", "caption": "json"})
    record = opened(tmp_path, ("a.jpg", "image"), ("a.txt", "text"), ("a.json", fields)).record(0)
    assert (record.captions, record.tags, record.facts) == (("text",), ("red",), {"url": "u"})


def test_dots_in_names(tmp_path: Path) -> None:
    source = opened(
        tmp_path,
        ("IMG.2020.01.jpg", "one"), ("IMG.2020.01.txt", "first"),
        ("IMG.2020.02.jpg", "two"), ("IMG.2020.02.txt", "second"),
        ("x/v1.0/0.jpg", "three"), ("x/v1.0/0.json", '{"caption": "third"}'),
        ("no.caption.here.png", "four"),
    )  # fmt: skip
    assert account(source) == {
        "s/IMG.2020.01": ("first",),
        "s/IMG.2020.02": ("second",),
        "s/x/v1.0/0": ("third",),
        "s/no.caption.here": "no caption",
    }
    assert not source.left_out


def test_several_images_of_a_sample(tmp_path: Path) -> None:
    members = [
        ("0.jpg", "used"), ("0.png", "copy"), ("0.seg.png", "mask"), ("0.txt", "captioned"),
        ("0.1.jpg", "own"), ("0.1.txt", "own caption"), ("1.depth", PNG), ("1.jpg", JPEG), ("1.txt", "second"),
    ]  # fmt: skip
    source = opened(tmp_path, *members)
    assert account(source) == {"s/0": ("captioned",), "s/0.1": ("own caption",), "s/1": ("second",)}
    assert [source.image(i) for i in range(3)] == [b"used", b"own", JPEG]
    assert left_out_by_reason(source) == {}
    assert [each.reason for each in source.left_out] == ["another image of the same sample is used"]


@pytest.mark.parametrize("captions", [["0.caption.txt"], ["0.txt"], ["0.prompt.json"]])
@pytest.mark.parametrize("images", [["0.image.jpg"], ["0.input.jpg", "0.output.png"]])
def test_members_with_words_after_dots(tmp_path: Path, captions: list[str], images: list[str]) -> None:
    for order in (1, -1):
        members = [(name, f"content of {name}") for name in images]
        members += [(name, '{"caption": "one"}' if "json" in name else "one") for name in captions]
        source = opened(tmp_path, *members[::order], ("v.01.jpg", "other"), ("v.02.txt", "two"))
        assert sorted(map(str, account(source).values())) == ["('one',)", "no caption"]
        assert left_out_by_reason(source) == {"caption file without an image": 1}


def test_class_labels_and_folders(tmp_path: Path) -> None:
    members = [
        (f"{split}/{name}/{number}{name}.{kind}", f"{index}\n" if kind == "cls" else f"{split}{number}{name}")
        for split in ("train", "test")
        for index, name in enumerate(("cat", "red_dog"))
        for number in range(4)
        for kind in ("cls", "jpg")
    ]
    source = opened(tmp_path, *members, (".ipynb_checkpoints/0.jpg", "x"), ("__MACOSX/0.jpg", "x"))
    assert {name: len(keys) for name, keys in splits_by_key(source).items()} == {"train": 8, "test": 8}
    assert source.record(0).facts == {"cls": "0", "folder": "train/cat"}
    for named, column in [(False, "folder"), (False, "cls"), (True, "cls")]:
        if named:
            write_files(tmp_path, {"classnames.txt": "cat\nred dog\n"})
        labeled = open_source(str(tmp_path / "s.tar"), reading=DataConfig(captions_from=column, prompts=("a {}",)))
        expected = ["0", "1"] if column == "cls" and not named else ["cat", "red dog"]
        assert list(labeled.classes.names) == expected
        assert account(labeled) == {
            f"s/{split}/{name}/{number}{name}": (f"a {label}",)
            for split in ("train", "test")
            for name, label in zip(("cat", "red_dog"), expected)
            for number in range(4)
        }
        assert set(labeled.splits) == {"train", "test"}
    assert not source.left_out


def test_images_by_content(tmp_path: Path) -> None:
    source = opened(
        tmp_path, ("0", JPEG), ("0.txt", "a"), ("1.image", PNG), ("1.txt", "b"), ("2.npy", JPEG), ("2.txt", "c")
    )
    assert account(source) == {"s/0": ("a",), "s/1": ("b",)}
    assert left_out_by_reason(source) == {"caption file without an image": 1}


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_sample_is_counted_once(tmp_path: Path, form: int) -> None:
    long = "folder/" * 12 if form == tarfile.USTAR_FORMAT else "folder/" * 40
    source = opened(
        tmp_path,
        ("used.jpg", "1"), ("used.txt", "a"),
        (long + "used.jpg", "2"), (long + "used.json", '{"caption": "b"}'),
        ("uncaptioned.jpg", "3"),
        ("text.txt", "c"), ("both.txt", "d"), ("both.json", '{"caption": "d"}'), ("json.json", '{"caption": "e"}'),
        special("link.jpg", tarfile.SYMTYPE), ("link.txt", "f"), special("hard.jpg", tarfile.LNKTYPE),
        special("device.png", tarfile.CHRTYPE), ("device.txt", "g"), special("pipe.png", tarfile.FIFOTYPE),
        ("vector.svg", "4"), ("vector.txt", "h"), ("raw.cr2", "5"),
        special("folder", tarfile.DIRTYPE), special("latest", tarfile.SYMTYPE),
        ("._used.jpg", "mac"), (".DS_Store", "mac"), ("README.txt", "about"), ("LICENSE", "terms"),
        ("classes.txt", "a\nb"), ("metadata.json", "{}"), ("captions.csv", "a,b"), ("inner.tar", "tar"),
        form=form,
    )  # fmt: skip
    assert account(source) == {"s/used": ("a",), f"s/{long}used": ("b",), "s/uncaptioned": "no caption"}
    reasons = left_out_by_reason(source)
    assert reasons.pop("caption file without an image") == 3
    assert sum(count for reason, count in reasons.items() if "not a file" in reason) == 4
    assert {reason.split(",")[0] for reason in reasons if "not a file" in reason} == {
        "symbolic link", "hard link", "device", "pipe",
    }  # fmt: skip
    assert sum(count for reason, count in reasons.items() if "cannot be opened" in reason) == 2
    assert source.unread == ["s.tar: captions.csv"]  # the first of its kind


def test_damage_and_other_reasons_are_counted_separately(tmp_path: Path) -> None:
    members = [("lonely.txt", "x"), ("h.svg", "image"), ("h.txt", "y")]
    members += [(f"{i}.{kind}", "content" * 100) for i in range(5) for kind in ("jpg", "txt")]
    archive = write_tar(tmp_path / "s.tar", [(name, content(value)) for name, value in members]).read_bytes()
    with tarfile.open(tmp_path / "s.tar") as tar:
        ends = {info.name: info.offset_data + info.size for info in tar}
    for cut, used, lost in (
        (ends["4.txt"], 5, 0),
        (ends["4.txt"] - 9, 4, 1),
        (ends["4.jpg"] - 9, 4, 1),
        (ends["4.jpg"], 4, 1),
    ):
        (tmp_path / "cut.tar").write_bytes(archive[:cut])
        source = open_shards(str(tmp_path / "cut.tar"))
        reasons = left_out_by_reason(source)
        assert len(source) == used
        assert reasons.pop("caption file without an image") == 1
        assert sorted(reasons.values()) == ([1, lost] if lost else [1])


def test_the_index_is_rebuilt_when_more_image_types_can_be_opened(tmp_path: Path, monkeypatch) -> None:
    members = (("0.jpg", "image"), ("0.txt", "a"), ("1.svg", "image"), ("1.txt", "b"))
    assert len(opened(tmp_path, *members)) == 1
    types = IMAGE_EXTENSIONS | {"svg"}
    monkeypatch.setattr(shard_index, "IMAGE_EXTENSIONS", types)
    monkeypatch.setattr("coalign.data.sources.tar.shard_samples.IMAGE_EXTENSIONS", types)
    source = open_shards(str(tmp_path / "s.tar"))
    assert len(source) == 2
    assert not source.left_out


# ---------------------------------------------------------------- folders of shards


def write_shards(root: Path, *names: str) -> None:
    for number, name in enumerate(names):
        write_tar(root / name, [(f"{number}.jpg", b"image"), (f"{number}.txt", f"caption {number}".encode())])


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (("train/0.tar", "val/0.tar"), {"train": 1, "val": 1}),
        (("data/Train/0.tar", "data/dev/0.tar", "data/testing/0.tar"), {"train": 1, "val": 1, "test": 1}),
        (("train2017/0.tar", "val2017/0.tar"), {"train": 1, "val": 1}),
        (("cc3m-train-0000.tar", "cc3m-train-0001.tar", "cc3m-validation-0000.tar"), {"train": 2, "val": 1}),
        (("train-00000-of-00002.tar", "train-00001-of-00002.tar", "test-00000-of-00001.tar"), {"train": 2, "test": 1}),
        (("train.tar", "val.TAR"), {"train": 1, "val": 1}),
        (("test.tar",), {}),
        (("train/0.tar",), {}),
        (("0.tar", "1.tar"), {}),
        (("part-1/0.tar", "part-2/deep/1.tar"), {}),
        (("train-0.tar", "extra.tar", "val-0.tar"), {}),
    ],
)
def test_splits(tmp_path: Path, names: tuple[str, ...], splits: dict[str, int]) -> None:
    write_shards(tmp_path, *names)
    source = open_source(str(tmp_path))
    assert len(source) == len(names)
    assert {name: len(keys) for name, keys in splits_by_key(source).items()} == splits


def test_what_lies_beside_shards_is_named(tmp_path: Path) -> None:
    write_shards(tmp_path, "0.tar", "1.tar", "old/2.tar")
    write_files(tmp_path, {"a.jpg": "image", "b.tar.gz": "archive", "c.zip": "archive", "captions.parquet": "table"})
    source = open_source(str(tmp_path))
    assert len(source) == 2
    named = " ".join(source.unread)
    for name in ("a.jpg", "b.tar.gz", "c.zip", "captions.parquet", "old/2.tar"):
        assert name in named
    assert "0.tar" not in named
