"""COCO captions JSON, and the JSON files of the Karpathy splits of COCO, Flickr30k and Flickr8k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalign.data.sources.table import Columns, TableSource, find_image_folder, load_json
from coalign.data.text.captions import printable
from coalign.errors import UserError


def open_coco(path: Path, images: Path | None = None) -> TableSource:
    """Opens COCO captions JSON: one sample per image, with all its captions.

    `images` is the image folder; by default, it is searched for near the JSON file.
    """
    content = load_json(path)
    if not is_coco(content):
        raise UserError(f"{path} is not COCO captions JSON: 'images' or 'annotations' is missing.")
    captions: dict[Any, list[Any]] = {image.get("id"): [] for image in content["images"]}
    unmatched = 0
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in captions:
            unmatched += 1
        elif "caption" in annotation:
            captions[annotation["image_id"]].append(annotation["caption"])
    if not any(captions.values()):
        raise UserError(f"{path} contains no captions; COCO's caption files are named captions_….json.")
    problems = [(printable(str(path)), f"{unmatched} captions have an unknown image_id")] if unmatched else []
    first = next((str(image["file_name"]) for image in content["images"] if image.get("file_name")), "")
    folder = resolve_image_folder(path, first, images)
    rows = (
        (
            f"image {image.get('id')}",
            {"image": image.get("file_name"), "captions": captions[image.get("id")], "image_id": image.get("id")},
        )
        for image in content["images"]
    )
    return TableSource(printable(str(path)), folder, rows, Columns("image", ("captions",)), problems)


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
        captions = [sentence.get("raw") for sentence in image["sentences"] if isinstance(sentence, dict)]
        rows.append((f"image {number}", {"image": relative, "captions": captions, "split": image.get("split")}))
    folder = resolve_image_folder(path, str(rows[0][1]["image"]), images)
    return TableSource(printable(str(path)), folder, rows, Columns("image", ("captions",), split="split"), [])


def resolve_image_folder(path: Path, first: str, images: Path | None) -> Path:
    """Image folder of the JSON file `path`: `images` if given, else one near the file that contains the image `first`.

    Raises UserError if there is none.
    """
    if images is not None and not images.is_dir():
        raise UserError(f"The image folder {images} does not exist.")
    folder = images or find_image_folder(path.parent, first) or find_image_folder(path.parent.parent, first)
    if folder is None:
        raise UserError(
            f"Cannot find the images of {path}, such as {first}; give their folder, as in coco:{path}:FOLDER"
        )
    return folder


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
