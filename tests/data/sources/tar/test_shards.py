"""Shards written by Python's tarfile and read through the index, including damaged and hostile ones."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import tarfile
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from helpers.data_files import samples, write_tar

from coalign.data.sources.tar import shard_index
from coalign.data.sources.tar.shard_index import build_index
from coalign.data.sources.tar.shards import ShardSource, expand_braces, open_shards
from coalign.data.text.captions import require_captions
from coalign.errors import BadSample, UserError

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("form", FORMATS)
def test_samples_agree_with_tarfile(tmp_path: Path, form: str) -> None:
    entries = samples(50)
    folder = "deep/" * (12 if form == "ustar" else 60)
    entries += [(folder + "long.PNG", b"image"), (folder + "long.txt", "grüne Äpfel\nred apples".encode())]
    if form != "ustar":
        entries += [("ü" * 120 + ".webp", b"w"), ("ü" * 120 + ".txt", b"umlauts")]
    path = write_tar(tmp_path / "a.tar", entries, FORMATS[form])
    source = open_shards(str(path))
    with tarfile.open(path) as tar:
        content = {info.name: tar.extractfile(info).read() for info in tar}
    images = [name for name in content if name.lower().endswith((".jpg", ".png", ".webp"))]
    assert len(source) == len(images)
    assert source.left_out == []
    for index, name in enumerate(images):
        record = source.record(index)
        stem = name.rsplit(".", 1)[0]
        assert record.key == f"a/{stem}"
        assert source.image(index) == content[name]
        assert record.captions == tuple(content[stem + ".txt"].decode().split("\n"))
    assert source.record(3).facts == {"url": "u3", "key": "000000003", "width": 64}


def test_members_of_a_sample_need_not_be_adjacent(tmp_path: Path) -> None:
    entries = samples(30)
    np.random.default_rng(1).shuffle(entries)
    source = open_shards(str(write_tar(tmp_path / "a.tar", entries)))
    content = dict(samples(30))
    assert len(source) == 30
    for i in range(30):
        stem = source.record(i).key.removeprefix("a/")
        assert source.image(i) == content[f"{stem}.jpg"]
        assert source.record(i).captions == (content[f"{stem}.txt"].decode(),)


def test_captions_and_tags(tmp_path: Path) -> None:
    def meta(**fields: object) -> bytes:
        return json.dumps(fields).encode()

    entries = [
        ("list.jpg", b"1"),
        ("list.json", meta(captions=["one", "", "two"], tags=["red", "round"])),
        ("words.jpg", b"2"),
        ("words.json", meta(caption="a cat", keywords="cat, pet;fur")),
        ("none.jpg", b"3"),
        ("empty.jpg", b"4"),
        ("empty.txt", b""),
        ("broken.jpg", b"5"),
        ("broken.json", b'{"caption": "cut o'),
        ("latin.jpg", b"6"),
        ("latin.txt", "grün".encode("latin-1")),
        ("bom.jpg", b"7"),
        ("bom.txt", b"\xef\xbb\xbfwith a mark\r\n\r\nand another\r\n"),
        ("nul.jpg", b"8"),
        ("nul.txt", b"a\0b"),
        ("huge.jpg", b"9"),
        ("huge.txt", b"word " * 200_000),
    ]
    source = open_shards(str(write_tar(tmp_path / "a.tar", entries)))
    keys = [name.split(".")[0] for name, _ in entries if name.endswith(".jpg")]
    assert len(source) == len(keys)
    results = {}
    for index, key in enumerate(keys):
        try:
            results[key] = (require_captions(source.record(index)), source.record(index).tags)
        except BadSample as bad:
            results[key] = bad.reason
    assert results == {
        "list": (("one", "two"), ("red", "round")),
        "words": (("a cat",), ("cat", "pet", "fur")),
        "none": "no caption",
        "empty": "empty caption",
        "broken": "broken JSON",
        "latin": "caption is not UTF-8",
        "bom": (("with a mark", "and another"), ()),
        "nul": "caption contains NUL",
        "huge": "caption too long",
    }


# ---------------------------------------------------------------- hostile and damaged shards


def special(name: str, kind: bytes, target: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def test_hostile_members_are_reported_and_harmless(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "executed"),)

    entries = [
        ("ok.jpg", b"fine"),
        ("ok.txt", b"an apple"),
        ("ok.pyd", pickle.dumps(Bomb())),
        ("evil.pickle", pickle.dumps(Bomb())),
        ("../outside.jpg", b"up"),
        ("../outside.txt", b"a pear"),
        ("/absolute.png", b"root"),
        ("/absolute.txt", b"a plum"),
        special("link.jpg", tarfile.SYMTYPE, "/etc/passwd"),
        special("hard.jpg", tarfile.LNKTYPE, "ok.jpg"),
        special("null.jpg", tarfile.CHRTYPE),
        special("folder", tarfile.DIRTYPE),
        ("._ok.jpg", b"mac"),
        ("folder/orphan.txt", b"no image"),
        ("ok.png", b"second"),
    ]
    path = write_tar(tmp_path / "deep" / "down" / "x.tar", entries)
    source = open_shards(str(path))
    assert [source.record(i).captions[0] for i in range(len(source))] == ["an apple", "a pear", "a plum"]
    assert [source.image(i) for i in range(3)] == [b"fine", b"up", b"root"]
    reasons = {each.reason: each.where for each in source.left_out}
    assert reasons == {
        "caption file without an image": "x.tar: folder/orphan",
        "not an image, caption file or .json file": "x.tar: ok.pyd",
        "path points outside the archive (harmless, nothing is extracted)": "x.tar: ../outside.jpg",
        "symbolic link, not a file": "x.tar: link",
        "hard link, not a file": "x.tar: hard",
        "device, not a file": "x.tar: null",
        "another image of the same sample is used": "x.tar: ok.png",
    }
    written = sorted(str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file())
    assert written == ["deep/down/x.tar", "deep/down/x.tar.coalign-index"]  # nothing extracted, nothing executed
    assert not (tmp_path / "executed").exists()


def test_truncation_anywhere_keeps_complete_samples(tmp_path: Path) -> None:
    whole = write_tar(tmp_path / "whole.tar", samples(6), tarfile.USTAR_FORMAT)
    archive = whole.read_bytes()
    with tarfile.open(whole) as tar:
        ends = [info.offset_data + info.size for info in tar]  # of the members' content
    complete_at = ends[2::3]  # a sample is complete if its last member is
    for cut in [*range(1, len(archive), 397), *ends, *(-(-end // 512) * 512 for end in ends)]:
        path = tmp_path / "cut.tar"
        path.write_bytes(archive[:cut])
        expected = sum(end <= cut for end in complete_at)
        if ends[1] <= cut < -(-ends[1] // 512) * 512 + 512:
            expected = 1  # right after the first sample's .json, a missing .txt cannot be noticed
        index = build_index(str(path))
        assert len(index.starts) == expected, cut
        has_marker = cut > -(-ends[-1] // 512) * 512 + 511  # the first block of the end-of-archive marker
        assert bool(index.left_out) != has_marker, cut
        if not has_marker:
            [damage] = index.left_out
            assert "truncated" in damage.reason or "end-of-archive marker is missing" in damage.reason
            started = sum(end <= cut for end in ends[::3])  # samples whose first member is complete
            assert damage.count >= started - expected


def test_samples_of_a_truncated_shard_can_be_read(tmp_path: Path) -> None:
    archive = write_tar(tmp_path / "00001.tar", samples(6)).read_bytes()
    write_tar(tmp_path / "00000.tar", samples(4, first=100))
    (tmp_path / "00001.tar").write_bytes(archive[: len(archive) // 2])
    (tmp_path / "00002.tar").write_bytes(b"")
    (tmp_path / "00003.tar").write_bytes(b"<html>not found</html>" * 99)
    source = open_shards(str(tmp_path / "{00000..00003}.tar"))
    content = dict(samples(4, first=100)) | dict(samples(6))
    assert 4 < len(source) < 10
    for i in range(len(source)):
        assert source.image(i) == content[source.record(i).key.split("/")[1] + ".jpg"]
    assert [each.where for each in source.left_out] == ["00001.tar", "00002.tar", "00003.tar"]
    assert "truncated" in source.left_out[0].reason
    assert source.left_out[0].count == 1
    assert source.left_out[1].reason == "the file is empty"
    assert "no valid header at byte 0" in source.left_out[2].reason


def test_bytes_after_the_end_of_archive_marker_are_reported(tmp_path: Path) -> None:
    one, two = write_tar(tmp_path / "1.tar", samples(2)), write_tar(tmp_path / "2.tar", samples(2, first=2))
    joined = tmp_path / "joined.tar"
    joined.write_bytes(one.read_bytes() + two.read_bytes())
    source = open_shards(str(joined))
    assert len(source) == 2
    assert "bytes after the end-of-archive marker" in source.left_out[0].reason


def test_shards_truncated_or_deleted_after_opening_yield_bad_samples(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", samples(5))
    source = open_shards(str(path))
    os.truncate(path, 2000)
    with pytest.raises(BadSample, match="damaged shard"):
        source.image(4)
    source = pickle.loads(pickle.dumps(source))
    path.unlink()
    with pytest.raises(BadSample, match="shard cannot be read"):
        source.image(4)


@pytest.mark.parametrize("name", ["a.tar.gz", "b.tar"])
def test_compressed_shards_are_rejected(tmp_path: Path, name: str) -> None:
    plain = write_tar(tmp_path / "plain", samples(2))
    (tmp_path / name).write_bytes(gzip.compress(plain.read_bytes()))
    with pytest.raises(UserError, match="compressed with gzip"):
        open_shards(str(tmp_path / name))


def test_shards_without_samples_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"No images found in .*empty\.tar"):
        open_shards(str(write_tar(tmp_path / "empty.tar", [])))
    (tmp_path / "zero.tar").write_bytes(b"")
    with pytest.raises(UserError, match="the file is empty"):
        open_shards(str(tmp_path / "zero.tar"))


# ---------------------------------------------------------------- the index


def test_the_index_is_built_once_and_rebuilt_if_the_shard_changes(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "a.tar", samples(3))
    built = []
    monkeypatch.setattr(shard_index, "build_index", lambda shard: built.append(shard) or build_index(shard))
    first = open_shards(str(path))
    assert len(open_shards(str(path))) == len(first) == 3
    assert len(built) == 1
    write_tar(path, samples(5))
    assert len(open_shards(str(path))) == 5
    assert len(built) == 2
    swapped = [(name, content[::-1]) for name, content in samples(5)]
    write_tar(path, swapped)
    os.utime(path, ns=(1, 1))  # another file of the same size
    assert open_shards(str(path)).image(0) == swapped[0][1]
    assert len(built) == 3
    stored = tmp_path / "a.tar.coalign-index"
    whole = stored.read_bytes()
    for damaged in (b"", b"nonsense", whole[:-1], whole[: len(whole) // 2]):
        stored.write_bytes(damaged)
        source = open_shards(str(path))
        # opening reads only the offsets; the fingerprints need the whole index
        assert len(source) == len(source.fingerprints().keys) == 5
        assert stored.read_bytes() == whole
    assert len(built) == 7
    # no temporary file is left
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.tar", "a.tar.coalign-index"]


def test_the_index_is_cached_if_the_folder_is_read_only(tmp_path: Path, monkeypatch) -> None:
    path = write_tar(tmp_path / "read-only" / "a.tar", samples(3))
    write = shard_index._write

    def write_if_allowed(index_path: Path, *args: object) -> None:
        if index_path.parent == path.parent:
            raise PermissionError("read-only")
        write(index_path, *args)

    monkeypatch.setattr(shard_index, "_write", write_if_allowed)
    assert len(open_shards(str(path))) == 3
    assert len(list((tmp_path / "cache").rglob("*.coalign-index"))) == 1
    monkeypatch.setattr(shard_index, "build_index", lambda shard: pytest.fail("built twice"))
    assert len(open_shards(str(path))) == 3


def test_memory_per_sample(tmp_path: Path) -> None:
    source = open_shards(str(write_tar(tmp_path / "a.tar", samples(300))))
    arrays = [value for value in vars(source).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) <= 16 * 300
    one = open_shards(str(write_tar(tmp_path / "b.tar", samples(1))))
    assert len(pickle.dumps(source)) - len(pickle.dumps(one)) <= 17 * 299


def _read_all(source: ShardSource, queue) -> None:
    queue.put([source.image(i) for i in range(len(source))])


def test_forked_and_pickled_sources_read_the_same(tmp_path: Path) -> None:
    source = open_shards(str(write_tar(tmp_path / "a.tar", samples(5))))
    expected = [source.image(i) for i in range(5)]  # opens the shard before the fork
    assert expected == [content for name, content in samples(5) if name.endswith(".jpg")]
    copy = pickle.loads(pickle.dumps(source))
    assert not copy._open
    assert [copy.image(i) for i in range(5)] == expected
    context = get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_read_all, args=(source, queue)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [queue.get(timeout=20) for _ in workers] == [expected, expected]
    for worker in workers:
        worker.join()


def test_more_shards_than_may_stay_open(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("coalign.data.sources.tar.shards._MAX_OPEN", 2)
    for number in range(5):
        write_tar(tmp_path / f"{number}.tar", samples(1, first=number))
    source = open_shards(str(tmp_path))
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    for _ in range(3):
        assert [source.record(i).captions for i in range(5)] == [(f"caption {i}",) for i in range(5)]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 2


# ---------------------------------------------------------------- patterns


def test_brace_patterns() -> None:
    assert list(expand_braces("a/{08..11}.tar")) == ["a/08.tar", "a/09.tar", "a/10.tar", "a/11.tar"]
    assert list(expand_braces("{8..11}")) == ["8", "9", "10", "11"]
    assert list(expand_braces("{a,b}-{0..1}")) == ["a-0", "a-1", "b-0", "b-1"]
    assert len(list(expand_braces("cc3m/{00000..00331}.tar"))) == 332
    for pattern in ("{x}.tar", "{5..3}.tar", "{}.tar"):
        with pytest.raises(UserError, match="Invalid braces"):
            list(expand_braces(pattern))


def test_missing_shards_are_reported(tmp_path: Path) -> None:
    for number in (0, 2):
        write_tar(tmp_path / f"{number:05d}.tar", samples(1))
    with pytest.raises(UserError, match=r"2 of 4 shards .* are missing, starting with .*00001\.tar"):
        open_shards(str(tmp_path / "{00000..00003}.tar"))
    with pytest.raises(UserError, match="No shards match"):
        open_shards(str(tmp_path / "x*.tar"))


def test_folders_globs_and_splits(tmp_path: Path) -> None:
    for name, first in [("train/0", 0), ("train/1", 2), ("validation/0", 4)]:
        write_tar(tmp_path / f"{name}.tar", samples(2, first=first))
    source = open_shards(str(tmp_path))
    assert {name: indices.tolist() for name, indices in source.splits.items()} == {"train": [0, 1, 2, 3], "val": [4, 5]}
    assert source.record(4).key == "validation/0/000000004"
    for spec in (tmp_path / "train", tmp_path / "train" / "*.tar", tmp_path / "train" / "{0,1}.tar"):
        source = open_shards(str(spec))
        assert [source.record(i).key for i in (0, 3)] == ["0/000000000", "1/000000003"]
        assert source.splits is None
