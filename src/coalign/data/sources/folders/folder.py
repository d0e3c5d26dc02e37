"""A folder of image files, captioned by files beside the images or by the file names."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from coalign.data.sources.base import LeftOut, PackedStrings, Source, read_image_file, splits_by_name
from coalign.data.sources.caption_content import json_facts, json_tags, raw_captions
from coalign.data.sources.folders.scan import FolderScan, extension, scan_folder, split_folder, splits_of_paths
from coalign.data.sources.folders.side_files import match_side_files, read_fields, read_lines
from coalign.data.text.captions import make_record, printable
from coalign.errors import UserError
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

    If any image has a caption file beside it (see `side_files`), captions are read from such files, and images without one have no
    caption. Otherwise, captions are made from file names. If every image is in a folder named train, val or test (or a common
    variant), these folders are the splits. `facts["folder"]` is an image's folder, relative to the root or to the folder with all splits,
    without the split's folder: "cats" for an image in "data/train/cats" or "cats/train". With `needs_captions`, `left_out` notes that
    captions are made from file names.
    """

    def __init__(self, root: str | Path, scan: FolderScan | None = None, needs_captions: bool = True) -> None:
        self.root = os.fspath(root)
        self.name = printable(self.root)
        scan = scan or scan_folder(self.root)
        if not scan.images:
            raise UserError(_no_images(self.name, scan))
        side = match_side_files(scan)
        self._paths = PackedStrings(map(os.fsencode, scan.images))
        self._texts, self._jsons = (PackedStrings(map(os.fsencode, paths)) for paths in (side.texts, side.jsons))
        self._has_captions = side.has_captions
        splits = splits_of_paths(scan.images)
        self.splits = splits_by_name(splits.names) if splits.names else None
        self._exact_splits = splits.exact
        self._num_shared = _num_shared(set(map(os.path.dirname, scan.images)), splits.exact)
        self.left_out = [*scan.left_out(), *side.left_out, *([splits.note] if splits.note else [])]
        self.unread = [*side.unread, *scan.unread(used=scan.jsons)]
        examples = filter(None, (caption_from_name(os.path.basename(path)) for path in scan.images))
        if needs_captions and not self._has_captions and (example := next(examples, "")):
            reason = f"captions are the file names, such as {printable(example)!r}, since no image has a caption file"
            self.left_out.append(LeftOut("", reason, 0))

    def __len__(self) -> int:
        return len(self._paths)

    def record(self, index: int) -> Record:
        relative = os.fsdecode(self._paths[index])
        folder, name = os.path.split(relative)
        text, json_file = (self._side_path(names, index) for names in (self._texts, self._jsons))
        fields = read_fields(json_file, optional=bool(text)) if json_file else {}
        missing = ""
        if not self._has_captions:
            raws = [os.fsencode(caption_from_name(name))]
        else:
            raws = raw_captions(read_lines(text) if text else [], fields)
            missing = "no caption in the .json file" if json_file else "no caption file"
        key = printable(relative.replace(os.sep, "/"))
        folder = self._folder(folder)
        facts = json_facts(fields) | ({"folder": printable(folder.replace(os.sep, "/"))} if folder else {})
        return make_record(key, raws, json_tags(fields), facts, missing)

    def _side_path(self, paths: PackedStrings, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(paths[index])) if paths[index] else ""

    def _folder(self, folder: str) -> str:
        """The folder, without the one that is named for the split."""
        parts = folder.split(os.sep)
        if self.splits is None or not (found := split_folder(parts, self._exact_splits)):
            return folder
        return os.sep.join([*parts[self._num_shared : found[1]], *parts[found[1] + 1 :]])

    def image_path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self._paths[index]))

    def image(self, index: int) -> bytes:
        return read_image_file(self.image_path(index))


def _num_shared(folders: Iterable[str], exact: bool) -> int:
    """The number of outermost folders that all splits are in, such as 1 for "data/train" and "data/test"."""
    above = []
    for folder in folders:
        parts = folder.split(os.sep)
        found = split_folder(parts, exact)
        above.append(parts[: found[1]] if found else [])
    return sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, zip(*above)))


def _no_images(name: str, scan: FolderScan) -> str:
    content = Counter(map(extension, scan.unsupported + scan.texts + scan.tables + scan.jsons + scan.archives))
    content.update({kind: len(paths) for kind, paths in scan.others.items()})
    kinds = [f"{count} {'.' + kind if kind else 'without extension'}" for kind, count in content.most_common(5)]
    reasons = [each.reason for each in scan.left_out()]
    if scan.archives:
        reasons.append(f"extract {printable(scan.archives[0])} first")
    if scan.tables:
        reasons.append(f"to read a table, open {name}/{printable(scan.tables[0])}")
    found = "".join(f"; {reason}" for reason in reasons)
    return (
        f"No images found in {name} ({', '.join(kinds) or 'no other files'}){found}. "
        "Supported image types: jpg, png, gif, webp, bmp, tif, avif and others that Pillow opens."
    )
