"""COCO captions JSON, and the JSON files with Karpathy's splits of COCO, Flickr30k and Flickr8k."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from coalign.data.common import printable
from coalign.data.tabular import Columns, TableSource, find_image_folder, load_json
from coalign.errors import UserError


def open_coco(path: Path, images: Path | None = None) -> TableSource:
    """COCO captions: every image of the JSON with all its captions. The image folder is searched for beside the JSON
    where not given."""
    content = load_json(path)
    if not is_coco(content):
        raise UserError(f"{path} is not COCO captions JSON: it lacks 'images' or 'annotations'")
    captions: dict[Any, list[Any]] = {image.get("id"): [] for image in content["images"]}
    strays = 0
    for annotation in content["annotations"]:
        if annotation.get("image_id") not in captions:
            strays += 1
        elif "caption" in annotation:
            captions[annotation["image_id"]].append(annotation["caption"])
    if not any(captions.values()):
        raise UserError(f"{path} holds no captions; COCO's captions are in files named captions_….json")
    problems = [(printable(str(path)), f"{strays} captions belong to no image")] if strays else []
    first = next((str(image["file_name"]) for image in content["images"] if image.get("file_name")), "")
    folder = image_folder(path, first, images)
    rows = (
        (
            f"image {image.get('id')}",
            {"image": image.get("file_name"), "captions": captions[image.get("id")], "image_id": image.get("id")},
        )
        for image in content["images"]
    )
    return TableSource(printable(str(path)), folder, rows, Columns("image", ("captions",)), problems)


def open_karpathy(path: Path, images: Path | None = None) -> TableSource:
    """Karpathy's JSON, such as dataset_coco.json: every image with all its sentences, and his splits (restval is for training). The image
    folder is searched for beside the JSON where not given."""
    content = load_json(path)
    if not is_karpathy(content):
        raise UserError(f"{path} is not Karpathy's JSON: it lacks 'images' with their 'sentences'")
    rows = []
    for number, image in enumerate(content["images"]):
        file = str(image.get("filename") or "")
        place = f"{image['filepath']}/{file}" if image.get("filepath") else file  # COCO's are in val2014 and train2014
        captions = [sentence.get("raw") for sentence in image["sentences"] if isinstance(sentence, dict)]
        rows.append((f"image {number}", {"image": place, "captions": captions, "split": image.get("split")}))
    folder = image_folder(path, str(rows[0][1]["image"]), images)
    return TableSource(printable(str(path)), folder, rows, Columns("image", ("captions",), split="split"), [])


def image_folder(path: Path, first: str, images: Path | None) -> Path:
    """The folder of the images that the JSON file `path` names: the given one, or one near the file. UserError without."""
    if images is not None and not images.is_dir():
        raise UserError(f"the image folder {images} is not there")
    folder = images or find_image_folder(path.parent, first) or find_image_folder(path.parent.parent, first)
    if folder is None:
        raise UserError(f"cannot find the images of {path} ({first} and others); name their folder: coco:{path}:FOLDER")
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
