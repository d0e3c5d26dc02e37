"""A folder of image files, captioned by .txt files next to the images or by the file names."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from coalign.data.sources.base import (
    PackedStrings,
    Source,
    canonical_split,
    is_image_name,
    read_image_file,
    splits_by_name,
)
from coalign.data.text.captions import make_record, printable, text_lines
from coalign.errors import BadSample, UserError
from coalign.types import Record

_SEPARATORS = re.compile(r"[\s_+.-]+")
_TRAILING_NUMBER = re.compile(r"(?:[\s_+.-]+\d+|\s*\(\d+\))$")


def caption_from_name(name: str) -> str:
    """Turns a file name into a caption: "red_apple-03.png" -> "red apple".

    Removes the extension and one trailing number after a separator ("-03", "_2", " (4)"; "mp3" keeps its 3), then
    replaces runs of underscores, hyphens, plus signs and dots with single spaces. Returns "" for a plain number.
    """
    stem = name.rsplit(".", 1)[0].strip()
    words = _SEPARATORS.sub(" ", _TRAILING_NUMBER.sub("", stem)).strip()
    return "" if words.isdigit() else words


class FolderSource(Source):
    """All images below `root`, in path order.

    If any image has a .txt file of the same name next to it, captions are read from such files, one per line, and images
    without one have no caption. Otherwise, captions are made from file names. If every image is in a top-level folder
    named train, val or test (or a common variant), these folders are the splits. `facts["folder"]` is an image's folder,
    relative to the root or to the folder of its split.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.fspath(root)
        self.name = printable(self.root)
        images, texts, other = _scan(self.root)
        if not images:
            content = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5)) or "no other files"
            raise UserError(
                f"No images found in {self.name} ({content}). Supported image types: jpg, jpeg, png, gif, webp, bmp, tif, tiff."
            )
        self._paths = PackedStrings(map(os.fsencode, images))
        text_paths = [os.path.splitext(path)[0] + ".txt" for path in images]
        has_text = np.array([path in texts for path in text_paths])
        self._has_text = has_text if has_text.any() else None
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in images]
        self.splits = splits_by_name(tops) if all(map(canonical_split, set(tops))) else None
        problems = [(self.name, f"skipped files: {count} {suffix}") for suffix, count in other.items()]
        if unmatched := len(texts - set(text_paths)):
            problems.append((self.name, f"skipped files: {unmatched} .txt without an image of the same name"))
        self.problems = problems

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> Record:
        relative = os.fsdecode(self._paths[index])
        folder, name = os.path.split(relative)
        missing = ""
        if self._has_text is None:
            raws = [os.fsencode(caption_from_name(name))]
        elif not self._has_text[index]:
            raws, missing = [], "no .txt file"
        else:
            raws = text_lines(_read_text(os.path.splitext(self.image_path(index))[0] + ".txt"))
        if self.splits is not None:
            folder = folder.partition(os.sep)[2]
        key = printable(relative.replace(os.sep, "/"))
        facts = {"folder": printable(folder.replace(os.sep, "/"))} if folder else {}
        return make_record(key, raws, facts=facts, missing=missing)

    def image_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def image(self, index: int) -> bytes:
        return read_image_file(self.image_path(index))


def _scan(root: str) -> tuple[list[str], set[str], Counter[str]]:
    """Relative paths of the images (in a fixed order) and .txt files, and counts of other files by type.

    Hidden folders are skipped; hidden files are counted as "hidden".
    """
    images: list[str] = []
    texts: set[str] = set()
    other: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()  # visits each folder once, however many links lead to it

    def raise_unreadable(error: OSError) -> None:
        raise UserError(f"Cannot read the folder {printable(str(error.filename))}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=raise_unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        relative = os.path.relpath(folder, root)
        for name in sorted(files):
            path = name if relative == "." else os.path.join(relative, name)
            if name.startswith("."):
                other["hidden"] += 1
            elif is_image_name(name):
                images.append(path)
            elif name.endswith(".txt"):
                texts.add(path)
            else:
                other[printable(os.path.splitext(name)[1].lower()) or "without extension"] += 1
    return images, texts, other


def _read_text(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadSample("caption file cannot be read", f"{printable(path)}: {error.strerror}") from None
