"""The header reader against Python's tarfile."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest

from coalign.data.sources.tar.members import BLOCK, DamagedTarError, compression, read_member

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def reader(archive: bytes):
    return lambda offset, size: archive[offset : offset + size]


def members(archive: bytes) -> list:
    result, offset = [], 0
    while (member := read_member(reader(archive), offset)) is not None:
        result.append(member)
        offset = member.end
    return result


def write(entries: list[tuple[str, bytes]], form: int) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as tar:
        for name, content in entries:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def random_entries(form: str) -> list[tuple[str, bytes]]:
    rng = np.random.default_rng(7)
    names = [f"{i:09d}.jpg" for i in range(20)] + ["dir/" * 20 + "x.txt", "p" * 90 + "/" + "n" * 95 + ".png"]
    if form != "ustar":
        names += ["long/" * 60 + "name.json", "ä" * 200 + ".txt", "한국어/사과.txt"]
    sizes = [0, 1, 511, 512, 513, *rng.integers(0, 5000, len(names) - 5)]
    return [(name, rng.bytes(int(size))) for name, size in zip(names, sizes)]


@pytest.mark.parametrize("form", FORMATS)
def test_agrees_with_tarfile(form: str) -> None:
    entries = random_entries(form)
    archive = write(entries, FORMATS[form])
    ours = members(archive)
    assert [(m.name, archive[m.data : m.data + m.size]) for m in ours] == entries
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert [(m.name, m.data, m.size, m.start) for m in ours] == [
            (info.name, info.offset_data, info.size, info.offset) for info in tar.getmembers()
        ]


@pytest.mark.parametrize("form", FORMATS)
def test_member_types_without_content(form: str) -> None:
    stream = io.BytesIO()
    kinds = {
        tarfile.LNKTYPE: "hard link",
        tarfile.SYMTYPE: "symbolic link",
        tarfile.CHRTYPE: "device",
        tarfile.BLKTYPE: "device",
        tarfile.DIRTYPE: "folder",
        tarfile.FIFOTYPE: "pipe",
        tarfile.CONTTYPE: "file",
    }
    with tarfile.open(fileobj=stream, mode="w", format=FORMATS[form]) as tar:
        for number, kind in enumerate(kinds):
            info = tarfile.TarInfo(f"m{number}")
            info.type, info.linkname = kind, "t" * 150 if form != "ustar" else "target"
            tar.addfile(info)
        info = tarfile.TarInfo("last.jpg")
        info.size = 3
        tar.addfile(info, io.BytesIO(b"end"))
    ours = members(stream.getvalue())
    assert [m.kind for m in ours] == [*kinds.values(), "file"]
    assert stream.getvalue()[ours[-1].data :][:3] == b"end"


def test_links_have_no_content_even_if_their_header_has_a_size() -> None:
    link, last = tarfile.TarInfo("link"), tarfile.TarInfo("last")
    link.type, link.linkname, link.size = tarfile.LNKTYPE, "target", 5000  # old writers store the target's size
    archive = link.tobuf(tarfile.USTAR_FORMAT) + last.tobuf(tarfile.USTAR_FORMAT) + bytes(2 * BLOCK)
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        assert [info.name for info in tar] == [member.name for member in members(archive)] == ["link", "last"]


def test_large_numbers_in_base_256() -> None:
    info = tarfile.TarInfo("huge.jpg")
    info.size = 20 * 1024**3  # beyond eleven octal digits
    header = info.tobuf(tarfile.GNU_FORMAT)
    member = read_member(reader(header), 0)
    assert member is not None
    assert member.size == info.size
    assert member.end == BLOCK + info.size
    member = read_member(reader(info.tobuf(tarfile.PAX_FORMAT)), 0)
    assert member is not None
    assert member.size == info.size


def test_old_gnu_header_fields_are_not_a_name_prefix() -> None:
    header = bytearray(tarfile.TarInfo("a.jpg").tobuf(tarfile.GNU_FORMAT))
    header[345:356] = b"13371337000"  # access time in an incremental GNU archive
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    member = read_member(reader(bytes(header)), 0)
    assert member is not None
    assert member.name == "a.jpg"


def test_damage_is_described() -> None:
    archive = write([("a.jpg", b"x" * 700)], tarfile.USTAR_FORMAT)
    for end, message in [(0, "end-of-archive marker is missing"), (100, "inside a header"), (511, "inside a header")]:
        with pytest.raises(DamagedTarError, match=message):
            read_member(reader(archive[:end]), 0)
    for position in (0, 124, 130, 148, 156, 300):
        broken = bytearray(archive)
        broken[position] ^= 0x41
        with pytest.raises(DamagedTarError, match="no valid header at byte 0"):
            read_member(reader(bytes(broken)), 0)
    with pytest.raises(DamagedTarError, match="no valid header"):
        read_member(reader(b"<html><body>404</body></html>" + b" " * 600), 0)


@pytest.mark.parametrize(
    "records",
    [
        b"x path=a\n",
        b"999999 path=a\n",
        b"0 path=a\n",
        b"9 pathaaa\n",
        b"12 size=-5\n\n",
        b"99999999999999999999999 a=b\n",
    ],
)
def test_malformed_pax_records_are_damage(records: bytes) -> None:
    info = tarfile.TarInfo("x")
    info.type, info.size = tarfile.XHDTYPE, len(records)
    block = info.tobuf(tarfile.USTAR_FORMAT) + records.ljust(BLOCK, b"\0")
    with pytest.raises(DamagedTarError):
        read_member(reader(block + tarfile.TarInfo("a.jpg").tobuf(tarfile.USTAR_FORMAT)), 0)


def test_random_damage_never_hangs_or_crashes() -> None:
    archive = write(random_entries("pax"), tarfile.PAX_FORMAT)
    rng = np.random.default_rng(3)
    for _ in range(200):
        broken = bytearray(archive[: rng.integers(1, len(archive))])
        for position in rng.integers(0, len(broken), 20):
            broken[position] = rng.integers(256)
        try:
            for member in members(bytes(broken)):
                assert member.end > member.start
        except DamagedTarError:
            pass


def test_compression_is_recognized() -> None:
    for mode, name in [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz")]:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode=f"w:{mode}"):
            pass
        assert compression(stream.getvalue()[:6]) == name
    assert compression(write([("BZ.jpg", b"")], tarfile.GNU_FORMAT)[:6]) is None
