"""Opens table files, compressed ones too, as bytes or as lines of text."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
from pathlib import Path
from typing import IO, Any, cast

from coalign.data.text.captions import text_encoding

_OPENERS: dict[str, Any] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}


def table_kind(path: Path) -> str:
    """The extension that tells the format of a table, in lower case, such as ".csv" for "x.csv" and "x.CSV.gz"."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return name.suffix.lower()


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file, and decompresses it if it is compressed."""
    return cast("IO[bytes]", _OPENERS.get(path.suffix.lower(), open)(path, "rb"))


def open_text(path: Path) -> IO[str]:
    """Opens a text file as UTF-8 or UTF-16. Its lines end in LF or CRLF; if the first or most of them end in CR, that ends lines, too.

    UTF-16 is detected by its byte order mark or by zero bytes. What is not UTF-8 becomes surrogates, which captions reject.
    """
    with open_bytes(path) as file:
        head = file.read(1 << 16)
    encoding = text_encoding(head)
    text = head.decode(encoding, "replace")
    errors = "surrogateescape" if encoding == "utf-8-sig" else "replace"
    returns = len(re.findall(r"\r(?!\n)", text))
    any_end = returns > text.count("\n") or re.match(r"[^\r\n]*\r(?!\n)", text)
    return io.TextIOWrapper(open_bytes(path), encoding, errors, newline=None if any_end else "\n")
