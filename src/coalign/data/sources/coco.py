"""COCO captions JSON, and the JSON files of the Karpathy splits of COCO, Flickr30k and Flickr8k."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from coalign.data.sources.base import LeftOut
from coalign.data.sources.tables.columns import Columns
from coalign.data.sources.tables.image_paths import ImagePaths
from coalign.data.sources.tables.json_table import load_json
from coalign.data.sources.tables.table_source import Row, TableSource
from coalign.data.text.captions import caption_values, printable
from coalign.errors import BadSample, UserError

_PROBED = 10  # images by which their folder is found: some may be missing


def open_coco(path: Path, images: Path | None = None) -> TableSource:
    """Opens COCO captions JSON: one sample per image, with all its captions.

    `images` is the image folder; by default, it is searched for near the JSON file.
    """
    content = load_json(path)
    if not is_coco(content):
        raise UserError(f"{path} is not COCO captions JSON: 'images' or 'annotations' is missing.")
    captions: dict[str, list[Any]] = {_value(image, "id"): [] for image in content["images"]}
    captions.pop("", None)
    unmatched = 0
    for annotation in content["annotations"]:
        if (image_id := _value(annotation, "image_id")) not in captions:
            unmatched += 1
        else:
            captions[image_id].append(annotation.get("caption", annotation.get("captions")))
    if not any(map(caption_values, captions.values())):
        raise UserError(f"{path} contains no captions; COCO's caption files are named captions_….json.")
    left_out = [LeftOut(printable(str(path)), "caption of an unknown image_id", unmatched)] if unmatched else []

    def rows() -> Iterator[tuple[str, Row]]:
        for number, image in enumerate(content["images"]):
            if isinstance(image, dict):
                own = captions.get(_value(image, "id"), [])
                row = {"image": image.get("file_name"), "captions": own, "image_id": image.get("id")}
                yield f"image {image.get('id')}", row
            else:
                yield f"image {number}", BadSample("broken JSON", f"{image!r:.80} is not an object")

    return _open_rows(path, images, rows(), Columns("image", ("captions",)), left_out)


def _value(entry: Any, name: str) -> str:
    """The value of a field as a string; "" if there is none."""
    value = entry.get(name) if isinstance(entry, dict) else None
    return "" if value is None else str(value)


def open_karpathy(path: Path, images: Path | None = None) -> TableSource:
    """Opens JSON in Karpathy's format, such as dataset_coco.json: one sample per image, with all its sentences and his splits.

    The restval split is part of train. `images` is the image folder; by default, it is searched for near the JSON file.
    """
    content = load_json(path)
    if not is_karpathy(content):
        raise UserError(f"{path} is not Karpathy's JSON: 'images' with 'sentences' is missing.")
    rows = []
    for number, image in enumerate(content["images"]):
        file = str(image.get("filename") or "")
        relative = f"{image['filepath']}/{file}" if image.get("filepath") else file  # COCO: val2014 or train2014
        captions = [_sentence(each) for each in image["sentences"] if isinstance(each, dict)]
        rows.append((f"image {number}", {"image": relative, "captions": captions, "split": image.get("split")}))
    return _open_rows(path, images, rows, Columns("image", ("captions",), split="split"), [])


def _sentence(sentence: dict[str, Any]) -> Any:
    tokens = sentence.get("tokens")
    return sentence.get("raw", " ".join(map(str, tokens)) if isinstance(tokens, list) else None)


def _open_rows(
    path: Path, images: Path | None, rows: Iterable[tuple[str, Row]], columns: Columns, left_out: list[LeftOut]
) -> TableSource:
    if images is not None and not images.is_dir():
        raise UserError(f"The image folder {images} does not exist.")
    source = TableSource(printable(str(path)), images or path.parent, rows, columns, left_out)
    source.has_columns = False  # the format says where captions are
    found = source.image_folder
    if images is None and found is None:
        raise _no_images(path, source.record(0).key)
    if images is not None and found is not None and not found.is_relative_to(images):
        raise UserError(
            f"The images of {path}, such as {source.record(0).key}, are not in {images}, but in {found}; give that folder."
        )
    return source


def resolve_image_folder(path: Path, files: Sequence[str], images: Path | None) -> Path:
    """Image folder of the JSON file `path`: `images` if given, else one near the file that contains any of about ten of `files`.

    Raises UserError if there is none.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"The image folder {images} does not exist.")
    paths = ImagePaths(images or path.parent, files[:: -(-len(files) // _PROBED) or 1], path.stem)
    if images is None and not paths.found:
        raise _no_images(path, next(iter(files), ""))
    return images or paths.folder


def _no_images(path: Path, example: str) -> UserError:
    return UserError(
        f"Cannot find the images of {path}, such as {example}; give their folder, as in coco:{path}:FOLDER"
    )


def is_coco(content: Any) -> bool:
    return (
        isinstance(content, dict)
        and isinstance(content.get("images"), list)
        and isinstance(content.get("annotations"), list)
    )


def is_karpathy(content: Any) -> bool:
    images = content.get("images") if isinstance(content, dict) else None
    return (
        isinstance(images, list)
        and bool(images)
        and all(isinstance(image, dict) and isinstance(image.get("sentences"), list) for image in images)
    )
