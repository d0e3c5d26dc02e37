"""Caption files of images: image.txt, .caption, .captions or .text, one caption per line, and image.json.

Also image.jpg.txt or image.caption.txt, with extensions in any case, and in a folder of their own, as captions/image.txt is for
images/image.jpg. If an image has several text files, the first type in this order is read, else the captions of its .json. Tags and facts
are from the .json.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from coalign.data.sources.base import LeftOut, LeftOutPlaces
from coalign.data.sources.caption_content import (
    folded,
    json_captions,
    json_fields,
    json_tags,
    text_captions,
    without_words,
)
from coalign.data.sources.folders.scan import TEXT_EXTENSIONS, FolderScan, extension, is_document, is_list, name_files
from coalign.data.text.captions import clean_captions, printable
from coalign.errors import BadSample

_PROBED = 20  # .json files read to see whether such files have captions
_MAX_JSON = 1 << 20  # bytes; a larger .json file beside an image is an annotation
_IMAGE_FOLDERS, _TEXT_FOLDERS = (  # folders in which all images, and all caption files, may be
    frozenset(names.split())
    for names in (
        "image images img imgs jpg jpegs jpeg png pngs photo photos picture pictures",
        "annotation annotations caption captions description descriptions json jsons label labels meta metadata "
        "prompt prompts text texts txt txts",
    )
)


@dataclass
class SideFiles:
    """The text and .json file of each image, as paths relative to the root; "" for none."""

    texts: list[str]
    jsons: list[str]
    has_captions: bool
    left_out: list[LeftOut] = field(default_factory=list)
    unread: list[str] = field(default_factory=list)


def match_side_files(scan: FolderScan) -> SideFiles:
    """Finds the caption files of the images. Those without an image are left out, and those not needed unread."""
    matches = _match(scan)
    texts = [_first(paths, TEXT_EXTENSIONS) for paths in matches]
    jsons = [_first(paths, ("json",)) for paths in matches[: len(scan.images)]]
    jsons_have_captions, jsons_are_read = _probe(scan.root, jsons)
    result = SideFiles(
        texts[: len(scan.images)],
        jsons if jsons_are_read else [""] * len(jsons),
        jsons_have_captions or any(texts[: len(scan.images)]),
    )
    matched = {path for paths in matches for path in paths}
    orphans = [path for path in scan.texts if path not in matched and not is_document(path)]
    lists = [path for path in orphans if is_list(path)]
    loose_jsons = [path for path in scan.jsons if path not in matched]
    if jsons_have_captions:
        orphans += [path for path in loose_jsons if _has_captions(os.path.join(scan.root, path))]
    orphans = sorted(set(orphans).difference(lists))
    left_out = LeftOutPlaces()
    for path in orphans:
        left_out.add(printable(path), "caption file without an image")
    result.left_out = left_out.entries()
    used = {*texts, *result.jsons, *orphans}
    used.update(path for paths in matches[len(scan.images) :] for path in paths)  # counted with their images
    unused = [path for path in scan.texts if path in matched and path not in used]
    result.unread = name_files(unused, "another caption file of the image is read") if unused else []
    result.unread += name_files(lists)
    result.unread += name_files([path for path in scan.jsons if path not in used and not path.endswith("_stats.json")])
    if any(text and name and _differ(scan.root, text, name) for text, name in zip(texts, result.jsons[:_PROBED])):
        result.unread.append("captions in .json files (the text files beside the images are read)")
    return result


def _match(scan: FolderScan) -> list[list[str]]:
    """The side files of each image, those that cannot be opened last."""
    by_stem: dict[str, list[str]] = {}
    for path in scan.texts + scan.jsons:
        by_stem.setdefault(_stem(path), []).append(path)
    images = scan.images + scan.unsupported
    matches = []
    for image in images:  # image.jpg.txt before image.txt, which may also belong to image.png
        stem = _stem(image)
        matches.append(by_stem.get(image, []) + (by_stem.get(stem, []) if stem != image else []))
    taken = {path for paths in matches for path in paths}
    for of_side_file, of_image in _OTHER_NAMES:
        by_name: dict[str, list[str]] = {}
        for path in scan.texts + scan.jsons:
            if path not in taken and not is_document(path):
                by_name.setdefault(of_side_file(_stem(path)), []).append(path)
        for number, image in enumerate(images if by_name else ()):
            if not matches[number]:
                found = by_name.get(of_image(image)) or by_name.get(of_image(_stem(image))) or []
                matches[number] = sorted(found, key=lambda path: "label" in folded(path))  # last, what may be boxes
                taken.update(found)
    return matches


def _stem(path: str) -> str:
    return os.path.splitext(path)[0]


def _without_folders(stem: str, names: frozenset[str]) -> str:
    """A form of the path without the folders of these names: "train/labels/1" -> "train/1"."""
    *folders, name = folded(stem).split(os.sep)
    return os.sep.join([*(folder for folder in folders if folder not in names), name])


def _without_words(stem: str) -> str:
    return folded(without_words(stem))


# Forms of a side file's name and of the image's in which they agree if the names themselves do not.
_OTHER_NAMES: tuple[tuple[Callable[[str], str], Callable[[str], str]], ...] = (
    (folded, folded),
    (_without_words, _without_words),
    (partial(_without_folders, names=_TEXT_FOLDERS), partial(_without_folders, names=_IMAGE_FOLDERS)),
)


def _first(paths: list[str], extensions: tuple[str, ...]) -> str:
    return next((path for kind in extensions for path in paths if extension(path) == kind), "")


def _probe(root: str, jsons: list[str]) -> tuple[bool, bool]:
    """Whether the .json files of images have captions; and whether they have captions or tags. Reads a few."""
    found = [path for path in jsons if path]
    probed = found[:: -(-len(found) // _PROBED) or 1]
    fields = [read_fields(os.path.join(root, path), optional=True) for path in probed]
    captions = any(map(_with_text, fields))
    return captions, captions or any(map(json_tags, fields))


def _has_captions(path: str) -> bool:
    """Whether a .json file without an image is one of captions, rather than one on the dataset, which may have a title, too."""
    fields = read_fields(path, optional=True)
    return not fields.keys().isdisjoint(("caption", "captions", "text")) and _with_text(fields)


def _with_text(fields: Mapping[str, Any]) -> bool:
    return any(map(bytes.strip, json_captions(fields)))


def _differ(root: str, text: str, name: str) -> bool:
    try:
        from_json = clean_captions(json_captions(read_fields(os.path.join(root, name), optional=True)))
        return not set(from_json) <= set(clean_captions(read_lines(os.path.join(root, text))))
    except BadSample:
        return False


# ---------------------------------------------------------------- reading


def read_lines(path: str) -> list[bytes]:
    """The raw captions of a text file in UTF-8 or UTF-16. Raises BadSample."""
    return text_captions(_read(path))


def read_fields(path: str, optional: bool = False) -> dict[str, Any]:
    """The fields of a .json file beside an image. Raises BadSample if it is broken; if `optional`, returns {} instead."""
    try:
        if os.path.isfile(path) and os.path.getsize(path) > _MAX_JSON:
            raise BadSample("broken JSON", f"{printable(path)} has more than {_MAX_JSON:,} bytes")
        return json_fields(_read(path), printable(path))
    except BadSample:
        if optional:
            return {}
        raise


def _read(path: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise BadSample("caption file cannot be read", f"{printable(path)}: {error.strerror}") from None
