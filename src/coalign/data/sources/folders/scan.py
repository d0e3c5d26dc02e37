"""Finds the files of a folder by kind: images, caption files, tables, archives; and the splits that its folders are named for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from coalign.data.images.formats import IMAGE_EXTENSIONS, UNSUPPORTED, starts_like_image
from coalign.data.sources.base import LeftOut, canonical_split
from coalign.data.text.captions import printable
from coalign.errors import UserError
from coalign.progress import progress

TEXT_EXTENSIONS = ("txt", "caption", "captions", "text")  # of caption files beside the images, by precedence
TABLE_EXTENSIONS = ("jsonl", "csv", "tsv", "parquet", "ndjson", "json", "txt")  # of metadata tables, by precedence

_ARCHIVE_TYPES = "tar tgz tbz2 txz zip gz bz2 xz zst 7z rar"
_DATA_TYPES = (  # other data; such files are not searched for images
    "xml npy npz pt pth h5 hdf5 mat pkl arrow lmdb mdb tfrecord tfrecords bin safetensors sqlite "
    "pdf doc docx xls xlsx mp4 mov avi mkv webm m4v mpg mpeg 3gp wav mp3 flac"
)
_OTHER_TYPES = (  # files that are not mentioned
    "md rst html htm css js ts py pyc ipynb sh bat ps1 yaml yml toml ini cfg conf log lock url lnk db bak tmp part "
    "crdownload swp orig aae xmp thm md5 sha1 sha256 sig c cpp h java m r tex bib coalign-index"
)
# A text file named by these words only, such as class_names.txt, is a list for the whole dataset.
_LIST_NAMES = (
    "annotation annotations caption captions categories class classes file filelist files image images label labels list "
    "metadata name names prompt prompts synset synsets test train trainval val vocab words"
)
_DOCUMENT = re.compile(
    r"(read[-_ ]?me|licen[cs]e|copying|notice|changelog|authors|citation|makefile|requirements)", re.I
)
_WRITTEN = ("skipped.jsonl", "dropped.jsonl", "summary.json")  # by `coalign data` beside the data
ARCHIVE_EXTENSIONS, _DATA, _NOT_DATA, _LIST_WORDS = (
    frozenset(words.split()) for words in (_ARCHIVE_TYPES, _DATA_TYPES, _OTHER_TYPES, _LIST_NAMES)
)
_NOT_DATA_FOLDERS = frozenset(
    {"__macosx", "__pycache__", "@eadir", "#recycle", "$recycle.bin", "system volume information"}
)


@dataclass
class FolderScan:
    """The files below `root` by kind, as relative paths in a fixed order. `others` is by extension, or "" if there is none."""

    root: str
    images: list[str] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)  # images that this installation cannot open
    texts: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    jsons: list[str] = field(default_factory=list)
    others: dict[str, list[str]] = field(default_factory=dict)

    def add(self, folder: str, name: str) -> None:
        """Adds a file by its name; if that does not tell, by its first bytes."""
        path, kind = os.path.join(folder, name), extension(name)
        if name.startswith(".") or name.endswith("~"):
            return
        if kind in IMAGE_EXTENSIONS:
            self.images.append(path)
        elif kind in UNSUPPORTED:
            self.unsupported.append(path)
        elif kind in TEXT_EXTENSIONS:
            self.texts.append(path)
        elif kind == "json":
            self.jsons.append(path)
        elif kind in TABLE_EXTENSIONS:
            self.tables.append(path)
        elif kind in ARCHIVE_EXTENSIONS:
            self.archives.append(path)
        elif may_be_image(kind) and _is_image(os.path.join(self.root, path)):
            self.images.append(path)
        elif kind not in _NOT_DATA and not is_document(name):
            self.others.setdefault(kind, []).append(path)

    def left_out(self, except_for: Iterable[str] = ()) -> list[LeftOut]:
        """The images that cannot be opened, one entry per type, without the paths of `except_for`."""
        by_type: dict[str, list[str]] = {}
        for path in set(self.unsupported).difference(except_for):
            by_type.setdefault(extension(path), []).append(path)
        return [
            LeftOut(printable(min(paths)), f".{kind} files cannot be opened; {UNSUPPORTED[kind]}", len(paths))
            for kind, paths in sorted(by_type.items())
        ]

    def unread(self, used: Iterable[str] = ()) -> list[str]:
        """Names the files that look like data, without images, text files, and the paths of `used`."""
        used = {*used, *_WRITTEN}
        tables = [path for path in self.tables if path not in used and not self._lists_downloads(path)]
        lines = name_files(tables, f"open {printable(self.root)}/{printable(tables[0])} to read it" if tables else "")
        jsons = [path for path in self.jsons if not path.endswith("_stats.json")]  # img2dataset's statistics
        for paths in (jsons, self.archives, *self.others.values()):
            lines += name_files([path for path in paths if path not in used])
        return lines

    def _lists_downloads(self, table: str) -> bool:
        """Whether a table only lists what img2dataset downloaded to the shard or folder beside it: 00000.parquet of 00000.tar or 00000/."""
        stem, kind = os.path.splitext(table)
        if kind != ".parquet" or f"{stem}_stats.json" not in self.jsons:
            return False
        return f"{stem}.tar" in self.archives or os.path.isdir(os.path.join(self.root, stem))


def may_be_image(kind: str) -> bool:
    """Whether files of an extension that is not an image's may be images, by their content."""
    return kind not in _DATA and kind not in _NOT_DATA


def extension(name: str) -> str:
    """The file type, in lower case and without the dot; "" for none."""
    return os.path.splitext(name)[1][1:].lower().strip()


def is_hidden(folder: str) -> bool:
    """Whether a folder of this name holds what a system or a program keeps beside the data."""
    return folder.startswith(".") or folder.lower() in _NOT_DATA_FOLDERS


def is_document(path: str) -> bool:
    """Whether a file is named as a text about the data, such as README.txt."""
    return _DOCUMENT.fullmatch(os.path.splitext(os.path.basename(path))[0]) is not None


def is_list(path: str) -> bool:
    """Whether a text file is named as a list for the whole dataset, such as classes.txt."""
    words = re.split(r"[\W_]+", os.path.splitext(os.path.basename(path))[0].lower())
    return _LIST_WORDS.issuperset(words)


def name_files(paths: Sequence[str], hint: str = "") -> list[str]:
    """Names files: each of up to four, else their number, by type. `hint` says how the first can be read."""
    by_type: dict[str, list[str]] = {}
    for path in paths:
        by_type.setdefault(extension(path), []).append(path)
    lines = []
    for kind, group in by_type.items():
        if len(group) <= 4:
            lines += [printable(path) for path in group]
        else:
            lines.append(
                f"{len(group):,} {'.' + printable(kind) if kind else 'extensionless'} files such as {printable(group[0])}"
            )
    if hint:
        lines[0] += f" ({hint})"
    return lines


def scan_folder(root: str) -> FolderScan:
    """Finds the files below `root`. Follows links, and visits each folder once. Raises UserError if a folder cannot be read."""
    scan = FolderScan(root)
    found = 0
    with progress(f"Listing {printable(root)}", unit="files") as task:
        for folder, names in _walk(root):
            relative = os.path.relpath(folder, root)
            for name in names:
                scan.add("" if relative == "." else relative, name)
            found += len(names)
            task.update(found)
    return scan


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    seen: set[tuple[int, int]] = set()  # visits each folder once, however many links lead to it

    def raise_unreadable(error: OSError) -> None:
        raise UserError(f"Cannot read the folder {printable(str(error.filename))}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=raise_unreadable, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        yield folder, sorted(files)


def _is_image(path: str) -> bool:
    if not os.path.isfile(path):
        return False
    try:
        with open(path, "rb") as file:
            return starts_like_image(file.read(32))
    except OSError:
        return False


# ---------------------------------------------------------------- splits


def split_folder(folders: Sequence[str], exact: bool = True) -> tuple[str, int] | None:
    """The first of nested folders that is named for a split, such as "train" or "Dev", as (split, position).

    Unless `exact`, the name may also start or end with a split's name, such as "train2017" or "images_test".
    """
    for position, name in enumerate(folders):
        words = [name] if exact else re.findall(r"[a-z]+", name.lower()) or [""]
        if split := canonical_split(words[0]) or canonical_split(words[-1]):
            return split, position
    return None


@dataclass(frozen=True)
class PathSplits:
    """Splits by folder. `names` has the split of each path; None if the folders are not splits, and `note` says why if it may surprise."""

    names: list[str] | None = None
    exact: bool = True  # whether `split_folder` is to be exact
    note: LeftOut | None = None


def splits_of_paths(paths: Sequence[str]) -> PathSplits:
    """The folders are splits if every path is in one that is named for a split, such as "data/Dev/cats/1.jpg"."""
    for exact in (True, False):
        known = {folder: split_folder(folder.split(os.sep), exact) for folder in set(map(os.path.dirname, paths))}
        splits = {found[0] for found in known.values() if found}
        if not splits - {"train"} or (not exact and len(splits) < 2):
            continue
        names = [found[0] if (found := known[os.path.dirname(path)]) else "" for path in paths]
        if all(names):
            return PathSplits(names, exact)
        if exact:
            outside = printable(paths[names.index("")])
            reason = f"folders named {', '.join(sorted(splits))} are not used as splits, since some images are in none of them"
            return PathSplits(note=LeftOut(outside, reason, 0))
    return PathSplits()
