"""Finds the image files that a table names, even if they are in another folder than the paths say, or the paths are written differently."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from urllib.parse import unquote

from coalign.data.sources.base import is_image_name
from coalign.data.sources.folders.scan import split_folder

_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".JPG", ".JPEG", ".PNG", ".gif", ".bmp", ".tif", ".tiff", ".avif")
# in names of folders beside a table's folder; others may be another dataset's
_IMAGE_FOLDER = r"ima?ge?s?|photo|pic|jpe?g|png|train|val|test|data"
_UNUSUAL = re.compile(r"\\|%[0-9A-Fa-f]{2}|file:", re.ASCII)


class ImagePaths:
    """The files of image paths that are relative to `folder`, or to a folder near it that has some of the images `probed`.

    `stem` is the table's name. If it names a split, as captions_train.csv does, a folder for this split is preferred.

    Attributes:
        found: Whether any of `probed` is a file.
        prefix: What is removed from the paths, which do not exist as they are: folders of another machine, such as "/home/me/data/".
    """

    def __init__(self, folder: Path, probed: Sequence[str], stem: str = "") -> None:
        self.folder, self.prefix, self._rewritten = folder, "", False
        self.found = any(os.path.isfile(folder / image) for image in probed) or self._search(folder, probed, stem)

    def path(self, image: str) -> str:
        """The path of an image's file; the plain path if there is no such file."""
        plain = os.path.join(self.folder, self._relative(image))
        if not (self._rewritten or _UNUSUAL.search(image)) and is_image_name(image):
            return plain
        paths = (os.path.join(self.folder, self._relative(form)) for form in _forms(image))
        return next(filter(os.path.isfile, paths), plain)

    def _relative(self, image: str) -> str:
        return image.removeprefix(self.prefix) if self.prefix else image

    def _search(self, folder: Path, probed: Sequence[str], stem: str) -> bool:
        plain = [image.replace("\\", "/") for image in probed]
        forms = list(zip_longest(*map(_forms, probed[:3]), fillvalue=""))
        below = _folders(folder)
        for base in (folder, folder.parent):
            candidates = below if base == folder else _folders(base, _IMAGE_FOLDER)
            for names in (plain, *forms):
                if found := _best_folder(base, candidates, names, _split(stem)):
                    self.folder, self._rewritten = found, names is not plain
                    return True
        return any(self._search_prefix(form, below, probed) for image in probed[:3] for form in _forms(image))

    def _search_prefix(self, image: str, near: Sequence[Path], probed: Sequence[str]) -> bool:
        """Removes the shortest prefix without which most of the images are found."""
        for end in (match.end() for match in re.finditer("/", image)):
            for base in near:
                if not os.path.isfile(base / image[end:]):
                    continue
                self.folder, self.prefix, self._rewritten = base, image[:end], True
                if 2 * sum(os.path.isfile(self.path(each)) for each in probed) > len(probed):
                    return True
        self.folder, self.prefix, self._rewritten = near[0], "", False
        return False


def _forms(image: str) -> Iterator[str]:
    """An image path as it is, and as it may be meant: with slashes, without %20, with an extension, or in the other case."""
    for path in dict.fromkeys([image, unquote(image.removeprefix("file://")).replace("\\", "/")]):
        stem, extension = os.path.splitext(path)
        yield path
        if is_image_name(path):
            yield from (stem + extension.lower(), stem + extension.upper())
        else:
            yield from (path + each for each in _EXTENSIONS)


def _best_folder(base: Path, candidates: Sequence[Path], names: Sequence[str], split: str | None) -> Path | None:
    """The folder of `candidates`, which are below `base`, with most of the files `names`; None if none has any.

    If several have equally many of the files, it is the one for the split, such as images/train.
    """
    best, rank = None, (0, False)
    for candidate in candidates:
        # Path.is_file raises OSError for long names
        found = sum(os.path.isfile(candidate / name) for name in names if name)
        own = (found, split is not None and split in map(_split, candidate.relative_to(base).parts))
        if found and own > rank:
            best, rank = candidate, own
    return best


def _split(name: str) -> str | None:
    found = split_folder([name], exact=False)
    return found[0] if found else None


def _folders(base: Path, kind: str = "") -> list[Path]:
    """`base` and the folders up to two levels below it whose names match `kind`."""

    def inside(folders: Iterable[Path]) -> list[Path]:
        return [each for folder in folders for each in sorted(folder.glob("*/")) if re.search(kind, each.name, re.I)]

    upper = inside([base])
    return [base, *upper, *inside(upper)]
