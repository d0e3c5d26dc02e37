"""A folder of image files, with captions in .txt files beside them or in the files' names."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path

import numpy as np

from coalign.data.common import (
    PackedStrings,
    Problems,
    Splits,
    canonical_split,
    captioned,
    is_image_name,
    printable,
    read_image_file,
    splits_by_name,
    text_lines,
)
from coalign.errors import BadSample, UserError
from coalign.types import Record

_SEPARATORS = re.compile(r"[\s_+.-]+")
_COUNTER = re.compile(r"(?:[\s_+.-]+\d+|\s*\(\d+\))$")


def caption_from_name(name: str) -> str:
    """The words of a file name: "red_apple-03.png" -> "red apple".

    The extension goes, then one counter at the end if something separates it ("-03", "_2", " (4)"; "mp3" keeps its 3),
    then underscores, hyphens, plus signs, dots and runs of them become single spaces. A name that is nothing but a
    number gives an empty caption.
    """
    stem = name.rsplit(".", 1)[0].strip()
    words = _SEPARATORS.sub(" ", _COUNTER.sub("", stem)).strip()
    return "" if words.isdigit() else words


class FolderSource:
    """Images anywhere below `root`, in the order of their paths. `facts["folder"]` is the path of the folder below the
    root (or below the split's folder).

    If any image has a .txt of the same name beside it, captions are in those files, one a line, and an image without
    one has no caption; otherwise the file's name is the caption. Where all images lie in folders named train, val,
    test (or the usual variants) these are the splits.
    """

    def __init__(self, root: str | Path) -> None:
        self.root = os.fspath(root)
        self.name = printable(self.root)
        images, texts, other = _scan(self.root)
        if not images:
            held = ", ".join(f"{count} {suffix}" for suffix, count in other.most_common(5)) or "nothing"
            raise UserError(
                f"no images found in {self.name}; it holds {held} (images: jpg, jpeg, png, gif, webp, bmp, tif, tiff)"
            )
        self._paths = PackedStrings(map(os.fsencode, images))
        beside = [os.path.splitext(path)[0] + ".txt" for path in images]
        has_text = np.array([path in texts for path in beside])
        self._has_text = has_text if has_text.any() else None
        tops = [path.split(os.sep)[0] if os.sep in path else "" for path in images]
        self.splits: Splits | None = splits_by_name(tops) if all(map(canonical_split, set(tops))) else None
        self.problems: Problems = [
            (self.name, f"{count} files of type {suffix} are not read") for suffix, count in other.items()
        ]
        if orphans := len(texts - set(beside)):
            self.problems.append((self.name, f"{orphans} .txt files have no image beside them"))

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> Record:
        relative = os.fsdecode(self._paths[index])
        folder, name = os.path.split(relative)
        where = relative
        if self._has_text is None:
            raws = [os.fsencode(caption_from_name(name))]
        elif not self._has_text[index]:
            raws, where = [], f"{printable(relative)} has no .txt beside it"
        else:
            raws = text_lines(_read_text(os.path.splitext(self.image_path(index))[0] + ".txt"))
        if self.splits is not None:
            folder = folder.partition(os.sep)[2]
        key = printable(relative.replace(os.sep, "/"))
        return captioned(key, raws, where, facts={"folder": printable(folder.replace(os.sep, "/"))} if folder else {})

    def image_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def image(self, index: int) -> bytes:
        return read_image_file(self.image_path(index))


def _scan(root: str) -> tuple[list[str], set[str], Counter[str]]:
    """Relative paths of images (in a fixed order) and of .txt files, and the number of other files by type. Hidden
    ones are left alone."""
    images: list[str] = []
    texts: set[str] = set()
    other: Counter[str] = Counter()
    seen: set[tuple[int, int]] = set()  # linked folders are followed, once

    def unreadable(error: OSError) -> None:
        raise UserError(f"cannot read the folder {printable(str(error.filename))}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        below = os.path.relpath(folder, root)
        for name in sorted(files):
            path = name if below == "." else os.path.join(below, name)
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
