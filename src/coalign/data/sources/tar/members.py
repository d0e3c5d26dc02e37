"""Reads tar headers (ustar, GNU, pax) to locate members for random access. Nothing is extracted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

BLOCK = 512
_MAX_EXTENSION = 1 << 20  # bytes of a long name or pax header; a larger one counts as damage
_NO_DATA = frozenset(b"123456")  # types without content: links, devices, folders and pipes
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}

Read = Callable[[int, int], bytes]  # (offset, length) -> at most `length` bytes


class DamagedTarError(Exception):
    """The archive is damaged and cannot be read any further."""


@dataclass(frozen=True)
class Member:
    """A member of a tar archive: its name, type and position."""

    start: int  # byte offset of its first header
    name: str
    kind: str  # "file", "folder", or another type, such as "symbolic link"
    data: int  # byte offset of its content
    size: int  # of its content, in bytes

    @property
    def end(self) -> int:
        """Byte offset of the next member."""
        return self.data + -(-self.size // BLOCK) * BLOCK


def read_member(read: Read, start: int) -> Member | None:
    """The member whose first header is at `start`; None at the end-of-archive marker. Raises DamagedTarError."""
    offset = start
    long_name: bytes | None = None
    pax: dict[bytes, bytes] = {}
    while True:
        header = read(offset, BLOCK)
        if not header and offset == start:
            raise DamagedTarError("the end-of-archive marker is missing")
        if len(header) < BLOCK:
            raise DamagedTarError("truncated inside a header")
        if not any(header):
            return None
        _check(header, offset)
        kind, size = header[156], _number(header[124:136], offset)
        offset += BLOCK
        if kind in b"LKxgX":
            content = _extension(read, offset, size)
            if kind == ord("L"):
                long_name = content.rstrip(b"\0")
            elif kind in b"xX":
                pax |= _pax_records(content, offset)
            offset += -(-size // BLOCK) * BLOCK
            continue
        if b"size" in pax:
            size = _decimal(pax[b"size"], offset)
        return _member(header, kind, start, offset, size, pax.get(b"path", long_name), read, pax)


def _member(
    header: bytes, kind: int, start: int, data: int, size: int, name: bytes | None, read: Read, pax: dict[bytes, bytes]
) -> Member:
    if name is None:
        name = header[:100].split(b"\0", 1)[0]
        prefix = header[345:500].split(b"\0", 1)[0]
        if prefix and header[257:263] == b"ustar\0":  # old GNU archives store other fields there
            name = prefix + b"/" + name
    kind_name = _kind_name(kind, name)
    if kind == ord("S"):
        extended = header[482]
        while extended:  # the map of a sparse file continues in further blocks
            block = read(data, BLOCK)
            if len(block) < BLOCK:
                raise DamagedTarError("truncated inside a header")
            extended = block[504]
            data += BLOCK
    elif any(key.startswith(b"GNU.sparse") for key in pax):
        kind_name = "sparse file"
    if kind in _NO_DATA:
        size = 0
    return Member(start, name.decode("utf-8", "surrogateescape"), kind_name, data, size)


def _kind_name(kind: int, name: bytes) -> str:
    if kind in b"0\0" and name.endswith(b"/"):  # folders in pre-POSIX archives
        return "folder"
    names = {
        "0": "file",
        "\0": "file",
        "7": "file",
        "1": "hard link",
        "2": "symbolic link",
        "3": "device",
        "4": "device",
        "5": "folder",
    }
    return names.get(chr(kind)) or {"6": "pipe", "S": "sparse file"}.get(chr(kind), f"member of type {chr(kind)!r}")


def compression(head: bytes) -> str | None:
    """The compression format of a file that starts with these bytes, or None."""
    return next((name for magic, name in _COMPRESSED.items() if head.startswith(magic)), None)


def _check(header: bytes, offset: int) -> None:
    summed = header[:148] + b" " * 8 + header[156:]  # the checksum field counts as spaces
    stored = _number(header[148:156], offset)
    unsigned = sum(summed)
    signed = unsigned - 256 * sum(byte > 127 for byte in summed)  # some old writers sum signed bytes
    if stored not in (unsigned, signed):
        raise _invalid_header(offset)


def _number(field: bytes, offset: int) -> int:
    """Parses octal digits or, for large numbers, base 256 with the highest bit set."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip()
    try:
        number = int(digits or b"0", 8)
    except ValueError:
        number = -1
    if number < 0:
        raise _invalid_header(offset)
    return number


def _decimal(digits: bytes, offset: int) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise _invalid_header(offset)
    return int(digits)


def _extension(read: Read, offset: int, size: int) -> bytes:
    if size > _MAX_EXTENSION:
        raise _invalid_header(offset)
    content = read(offset, size)
    if len(content) < size:
        raise DamagedTarError("truncated inside a header")
    return content


def _pax_records(content: bytes, offset: int) -> dict[bytes, bytes]:
    """Parses "LENGTH key=value\\n" records. LENGTH includes its own digits."""
    records: dict[bytes, bytes] = {}
    position = 0
    while position < len(content) and content[position] != 0:
        length_digits = content[position : position + 20].split(b" ", 1)[0]
        length = _decimal(length_digits, offset)
        record = content[position : position + length]
        key, equals, value = record[len(length_digits) + 1 : -1].partition(b"=")
        if not equals or len(record) < length:
            raise _invalid_header(offset)
        records[key] = value
        position += length
    return records


def _invalid_header(offset: int) -> DamagedTarError:
    return DamagedTarError(f"no valid header at byte {offset:,}")
