"""Detection datasets with boxes and masks: scenes, COCO instances and PASCAL VOC."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coalign.data.images.decode import open_image
from coalign.data.scenes.drawing import masks
from coalign.data.scenes.layout import SHAPES
from coalign.data.scenes.source import Scenes, open_scenes
from coalign.data.sources.base import Source, read_image_file
from coalign.data.sources.coco import resolve_image_folder
from coalign.data.sources.tables.json_table import load_json
from coalign.errors import UserError
from coalign.types import Record

# The twenty classes in the order of the VOC development kit.
VOC_CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse", "motorbike",
    "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip


# Shorter image side in pixels, and regions sampled per image, in the papers' training schedules.
PUBLISHED_SIDE, PUBLISHED_REGIONS = 800, 512


@dataclass(frozen=True)
class Objects:
    """Annotated objects of an image, in pixel coordinates."""

    boxes: np.ndarray  # float32 [object, 4]: left, top, right, bottom
    labels: np.ndarray  # int64 [object], 0 … classes - 1
    ignored: np.ndarray  # bool [object]: crowds and objects marked as difficult, excluded from evaluation
    masks: np.ndarray | None = None  # bool [object, height, width]


class DetectionSource(Source):
    """Images without captions, with boxes, labels and, optionally, masks."""

    classnames: list[str]
    side: int  # shorter image side in pixels after resizing, for detectors
    regions: int  # regions sampled per image to train a detector's heads
    has_masks: bool

    def record(self, index: int) -> Record:
        return Record(f"{self.name}[{index}]", ())

    @abstractmethod
    def image(self, index: int) -> np.ndarray:
        """Upright RGB pixels, uint8 [height, width, 3]. Raises BadSample if the image cannot be decoded."""

    @abstractmethod
    def objects(self, index: int) -> Objects: ...


def open_detection(spec: str) -> DetectionSource:
    """Opens `scenes…` (classes are shapes; with masks), `coco:instances.json:images` (with masks) or `voc:VOCdevkit`.

    For VOC, train is the trainval set of every year present, and test is the VOC2007 test set. Raises UserError for other specs.
    """
    if spec == "scenes" or spec.startswith("scenes:"):
        return SceneObjects(open_scenes(spec.partition(":")[2]))
    if spec.startswith("coco:"):
        path, _, images = spec[5:].partition(":")
        return CocoObjects(Path(path), Path(images) if images else None)
    if spec.startswith("voc:"):
        return VocObjects(Path(spec[4:]))
    raise UserError(f"{spec} has no boxes; use scenes:…, coco:instances.json:images or voc:VOCdevkit.")


def _to_objects(
    boxes: list[Any], labels: list[int], ignored: list[bool], object_masks: np.ndarray | None = None
) -> Objects:
    return Objects(
        np.array(boxes, np.float32).reshape(-1, 4), np.array(labels, np.int64), np.array(ignored, bool), object_masks
    )


class SceneObjects(DetectionSource):
    """Scenes with their objects' boxes and masks; the classes are the shapes."""

    has_masks = True

    def __init__(self, scenes: Scenes) -> None:
        self.scenes, self.name, self.splits = scenes, scenes.name, scenes.splits
        self.classnames, self.side, self.regions = list(SHAPES), 2 * scenes.size, 16

    def __len__(self) -> int:
        return len(self.scenes)

    def image(self, index: int) -> np.ndarray:
        return self.scenes.image(index)

    def objects(self, index: int) -> Objects:
        scene = self.scenes.scene(index)
        scene_masks = masks(scene, self.scenes.size)
        boxes, labels = [], []
        for mask, item in zip(scene_masks, scene.objects):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            boxes.append((columns[0], rows[0], columns[-1] + 1, rows[-1] + 1))
            labels.append(SHAPES.index(item.shape))
        return _to_objects(boxes, labels, [False] * len(labels), scene_masks)


class CocoObjects(DetectionSource):
    """COCO instances JSON. `images` is the image folder; by default, it is searched for near the JSON file."""

    side, regions = PUBLISHED_SIDE, PUBLISHED_REGIONS

    def __init__(self, path: Path, images: Path | None = None) -> None:
        if not path.is_file():
            raise UserError(f"No such file: {path}")
        content, self.name = load_json(path), str(path)
        try:
            categories = sorted(content["categories"], key=lambda entry: entry["id"])
            label_of = {entry["id"]: label for label, entry in enumerate(categories)}
            self._images = list(content["images"])
            by_image: dict[Any, list[dict[str, Any]]] = {entry["id"]: [] for entry in self._images}
            for annotation in content["annotations"]:
                if min(annotation["bbox"][2:4]) > 0:
                    label = label_of[annotation["category_id"]]
                    by_image[annotation["image_id"]].append(annotation | {"class": label})
            files = [str(entry["file_name"]) for entry in self._images]
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not COCO instances JSON: {type(error).__name__} {error}") from error
        if not files:
            raise UserError(f"{path} lists no images.")
        self.classnames = [str(entry["name"]) for entry in categories]
        self._annotations = [by_image[entry["id"]] for entry in self._images]
        self.has_masks = all("segmentation" in annotation for entries in self._annotations for annotation in entries)
        self.folder = resolve_image_folder(path, files, images)

    def __len__(self) -> int:
        return len(self._images)

    def image(self, index: int) -> np.ndarray:
        return open_image(read_image_file(self.folder / self._images[index]["file_name"])).decode(1.0)

    def objects(self, index: int) -> Objects:
        entries, entry = self._annotations[index], self._images[index]
        boxes = [(x, y, x + width, y + height) for x, y, width, height in (a["bbox"] for a in entries)]
        object_masks = None
        if self.has_masks:
            height, width = entry["height"], entry["width"]
            decoded = [_mask(a["segmentation"], height, width) for a in entries]
            object_masks = np.array(decoded, bool).reshape(-1, height, width)
        labels, ignored = [a["class"] for a in entries], [bool(a.get("iscrowd")) for a in entries]
        return _to_objects(boxes, labels, ignored, object_masks)


def _mask(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Decodes COCO polygons or run lengths to a mask, bool [height, width]."""
    try:
        from pycocotools import mask
    except ImportError:
        raise UserError('COCO masks require the "detection" extra: pip install "coalign[detection]"') from None
    if isinstance(segmentation, list):
        segmentation = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = mask.frPyObjects(segmentation, height, width)
    return mask.decode(segmentation).astype(bool)


class VocObjects(DetectionSource):
    """A VOCdevkit folder with VOC2007, VOC2012 or both."""

    has_masks = False
    side, regions = PUBLISHED_SIDE, PUBLISHED_REGIONS

    def __init__(self, root: Path) -> None:
        self.name, self.classnames = str(root), list(VOC_CLASSES)
        years = [folder for folder in sorted(root.glob("VOC20*")) if (folder / "ImageSets" / "Main").is_dir()]
        if not years:
            raise UserError(f"{root} contains no folder VOC2007 or VOC2012 with ImageSets/Main.")
        self._samples: list[tuple[Path, str]] = []
        self.splits = {}
        for split, file, folders in (
            ("train", "trainval.txt", years),
            ("test", "test.txt", [folder for folder in years if folder.name == "VOC2007"]),
        ):
            first = len(self._samples)
            for folder in folders:
                image_set = folder / "ImageSets" / "Main" / file
                if image_set.is_file():
                    self._samples += [
                        (folder, line.strip()) for line in image_set.read_text().splitlines() if line.strip()
                    ]
            if len(self._samples) > first:
                self.splits[split] = np.arange(first, len(self._samples))
        if not self._samples:
            raise UserError(f"The files in ImageSets/Main of {root} list no images.")

    def __len__(self) -> int:
        return len(self._samples)

    def image(self, index: int) -> np.ndarray:
        folder, name = self._samples[index]
        return open_image(read_image_file(folder / "JPEGImages" / f"{name}.jpg")).decode(1.0)

    def objects(self, index: int) -> Objects:
        folder, name = self._samples[index]
        path = folder / "Annotations" / f"{name}.xml"
        boxes, labels, ignored = [], [], []
        try:
            for entry in ElementTree.parse(path).iter("object"):
                corners = [float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax")]
                boxes.append((corners[0] - 1, corners[1] - 1, corners[2], corners[3]))  # VOC's pixels start at 1
                labels.append(VOC_CLASSES.index(entry.findtext("name", "")))
                ignored.append(entry.findtext("difficult", "0").strip() == "1")
        except (OSError, ValueError, ElementTree.ParseError) as error:
            raise UserError(f"{path} is not a valid VOC annotation: {error}") from error
        return _to_objects(boxes, labels, ignored)
